"""What the presets learn on the same budget: the quickstart's task with one after the other, over several seeds.

    python -m benchmarks.learning --seeds 5 --presets grpo dapo dr_grpo gspo cispo

Each is a run of `grpo train` on examples/quickstart.yaml, whose section `algorithm` is the preset alone, and shorter
(SETTINGS): a minute or two on two cores, half of it start. One that has ended is not run again, and what was
interrupted goes on where it was; `--at-most 5` makes five of those that are missing. What is kept
of each is a line of docs/algorithms-learning.jsonl; the picture beside it and the table in docs/algorithms.md are made
from that alone, again with `--at-most 0`. With another file (`--kept`) the table is printed only.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning_plot import picture
from grpo.config.variants import PRESETS as KNOWN

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "docs" / "algorithms-learning.jsonl", ROOT / "docs" / "algorithms.md"
PRESETS = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
BESIDE = "dapo"
"""The preset that the others are compared with, seed by seed."""
SETTINGS: dict[str, Any] = {
    "run.steps": 12,
    "rollout.prompts_per_step": 16,
    "eval.prompts": 0,  # each step draws new questions, so its own answers tell as much
    "rollout.refill": False,  # `dapo` sets it, and would then sample more than the others
    "model.fp32_head": False,  # `cispo` sets it; the model is in float32, so it changes nothing
}
PARTS = ((1, 4), (5, 8), (9, 12))
"""Steps whose mean the table says."""
Run = dict[str, Any]
Runs = dict[tuple[str, int], Run]


def config_of(preset: str) -> dict[str, Any]:
    """The quickstart with this algorithm; its own keys would be written ones, which win over a preset's."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    return config | {"algorithm": {"preset": preset}}


def make(folder: Path, preset: str, seed: int) -> None:
    """Runs it, or goes on with what was interrupted. Raises CalledProcessError, after the run has said why."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{preset}.yaml"
    file.write_text(yaml.safe_dump(config_of(preset), sort_keys=False), encoding="utf-8")
    settings = {"run.dir": folder.resolve(), "run.seed": seed} | SETTINGS
    written = [f"{key}={str(value).lower() if value is False else value}" for key, value in settings.items()]
    subprocess.run([sys.executable, "-m", "grpo", "train", str(file), *written], cwd=ROOT, check=True)


def ended(folder: Path, preset: str, seed: int) -> Run | None:
    """What is kept of a run; None if it is not there or has not ended."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    steps = {row["step"]: row for row in rows if row["event"] == "step"}  # of a repeated step the last
    last = SETTINGS["run.steps"]
    if last not in steps or not any(row["event"] == "end" and row["outcome"] == "ok" for row in rows):
        return None
    in_order = [steps[step] for step in range(1, last + 1)]
    return {
        **{"preset": preset, "seed": seed, "settings": SETTINGS},
        "reward": [round(row["reward/mean"], 4) for row in in_order],
        "clipped": [round(row["train/clip_low"] + row["train/clip_high"], 4) for row in in_order],
    }


def load(file: Path) -> Runs:
    """The runs that are kept, by preset and seed. Raises ValueError if their budget is another."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    runs: list[Run] = [json.loads(line) for line in lines]
    for run in runs:
        if run["settings"] != SETTINGS:
            raise ValueError(
                f"runs of one picture share their budget, but {file} has some with {run['settings']}, and this program "
                f"makes {SETTINGS}; move the file away, or name another one with --kept"
            )
    return {(run["preset"], run["seed"]): run for run in runs}


def keep(file: Path, runs: Runs) -> None:
    """A line a run, and the picture of all of them."""
    file.write_text("".join(json.dumps(run) + "\n" for run in in_order(runs)), encoding="utf-8")
    file.with_suffix(".svg").write_text(picture(in_order(runs)), encoding="utf-8")


def in_order(runs: Runs) -> list[Run]:
    """By preset, those of PRESETS first, and seed."""
    names = [*PRESETS, *sorted({preset for preset, _ in runs})]
    return [runs[key] for key in sorted(runs, key=lambda key: (names.index(key[0]), key[1]))]


def table(runs: Runs) -> str:
    """Markdown: the share of right answers, mean and deviation over the seeds."""
    heads = ["preset", "seeds", *(f"steps {first} to {last}, %" for first, last in PARTS)]
    heads += [f"the last minus `{BESIDE}`", "tokens clipped"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(run["preset"] for run in in_order(runs)):
        own = [run for run in in_order(runs) if run["preset"] == name]
        both = [(run, runs[BESIDE, run["seed"]]) for run in own if (BESIDE, run["seed"]) in runs]
        cells = [f"`{name}`", str(len(own)), *(spread([part(run, *steps) for run in own]) for steps in PARTS)]
        more = [part(run, *PARTS[-1]) - part(beside, *PARTS[-1]) for run, beside in both]
        cells.append("" if name == BESIDE else spread(more, "+"))
        cells.append(f"{statistics.fmean(statistics.fmean(run['clipped']) for run in own):.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def part(run: Run, first: int, last: int) -> float:
    """Mean share of right answers of these steps."""
    return statistics.fmean(run["reward"][first - 1 : last])


def tell(page: Path, new: str) -> None:
    """Puts the table in the place of the one that the page has."""
    text = page.read_text(encoding="utf-8")
    heading = re.escape(new.partition(" steps")[0])
    page.write_text(
        re.sub(rf"^{heading}.*\n(\|.*\n)*", lambda _: new + "\n", text, flags=re.MULTILINE), encoding="utf-8"
    )


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation, in points of a hundred."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.1f}{deviation}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(KNOWN), help="those to run")
    parser.add_argument("--at-most", type=int, help="make so many runs now, of those that are missing")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where what is kept of the runs lies")
    chosen = parser.parse_args(arguments)
    try:
        runs = load(chosen.kept)
        missing = []
        for key in [(preset, seed) for seed in range(chosen.seeds) for preset in chosen.presets]:
            if found := ended(chosen.out / f"{key[0]}-{key[1]}", *key):
                runs[key] = found
            elif key not in runs:
                missing.append(key)
    except ValueError as error:
        parser.error(str(error))
    for preset, seed in missing[: chosen.at_most]:
        folder = chosen.out / f"{preset}-{seed}"
        make(folder, preset, seed)
        if found := ended(folder, preset, seed):
            runs[preset, seed] = found
            keep(chosen.kept, runs)
    if runs:
        keep(chosen.kept, runs)
        print(table(runs))
        if chosen.kept == KEPT:
            tell(PAGE, table(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
