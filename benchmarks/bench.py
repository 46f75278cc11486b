"""TRL's GRPOTrainer and grpo, side by side on this machine's CPU: the same model, prompts, lengths, reward and update.

    python benchmarks/bench.py --trl-python .venv-bench/bin/python

The halves run one after the other, each alone. grpo goes first, through its own command line; TRL then gets the
prompts of the same steps. Both load a copy of the model whose end-of-text id is one that is never sampled, so every
completion has its full length on both sides; that is checked afterwards.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
NEVER_SAMPLED = (16, "<empty_output>")
"""A special token of SmolLM2 that its training data does not hold. It takes the place of end-of-text."""
PHASES = ("total", "generation", "update", "sync", "other")
SPEEDS = (
    ("generated", "generation", "completion"),
    ("trained", "update", "rows"),
    ("whole step", "total", "completion"),
)
"""Name, the phase whose seconds count, and which tokens."""
Json = dict[str, Any]


def main() -> None:
    options = parse_options()
    folder = options.out / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    model = copy_model(options.model, folder / "model")
    result: Json = {"threads": options.threads, "limits": measure_machine(options), "runs": []}
    for dtype in options.dtypes:
        ours = run_grpo(options, model, dtype, folder)
        theirs = run_trl(options, model, dtype, folder)
        result["runs"].append({"dtype": dtype, "grpo": ours, "trl": theirs})
    shutil.rmtree(model)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    table = "\n\n".join(render(run, options.warmup) for run in result["runs"])
    (folder / "result.md").write_text(table + "\n")
    print(f"\n{table}\n\nlimits of the machine: {json.dumps(result['limits'])}\nfiles: {folder}/result.json, result.md")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="interpreter of TRL's environment")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=3, help="steps that are")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of TRL; grpo finds its own")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of TRL's forward pass; 8 was its fastest")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser.parse_args()


def copy_model(source: Path, target: Path) -> Path:
    """The same weights with another end-of-text id."""
    if not (source / "config.json").exists():
        sys.exit(f"{source}: the model is missing; build it with: python examples/smollm2.py")
    shutil.copytree(source, target)
    number, text = NEVER_SAMPLED
    for name, key, value in (
        ("config.json", "eos_token_id", number),
        ("generation_config.json", "eos_token_id", number),
        ("tokenizer_config.json", "eos_token", text),
    ):
        path = target / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}, indent=2))
    return target


def measure_machine(options: argparse.Namespace) -> Json:
    command = [options.trl_python, HERE / "machine.py", str(options.threads)]
    limits: Json = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return limits


def run_grpo(options: argparse.Namespace, model: Path, dtype: str, folder: Path) -> Json:
    """`grpo train benchmarks/bench.yaml`; the figures are those of the run's own metrics.jsonl."""
    run = folder / f"grpo-{dtype}"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "grpo",
        "train",
        HERE / "bench.yaml",
        f"run.dir={run}",
        f"model.path={model}",
    ]
    command += [
        f"model.dtype={dtype}",
        f"data.source={HERE / 'questions.jsonl'}",
        f"run.steps={options.warmup + options.steps}",
    ]
    busy, wall = watch(command, {"PYTHONPATH": str(HERE.parent)})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = load_config()["rollout"]["samples_per_prompt"]
    steps = [our_step(row, samples) for row in rows if row["event"] == "step"]
    return {"system": "grpo", "busy_before": busy, "wall": wall, "steps": steps}


def our_step(row: Json, samples: int) -> Json:
    phases = {"generation": row["phase/rollout"], "update": row["phase/train"], "sync": row["phase/weight_sync"]}
    prompt, completion = samples * row["rollout/prompt_tokens"], row["rollout/completion_tokens"]
    return phases | {
        "total": row["step/seconds"],
        "other": row["step/seconds"] - sum(phases.values()),
        "optimizer": row["train/seconds_optimizer"],
        "tokens": {"prompt": prompt, "completion": completion},
    }


def run_trl(options: argparse.Namespace, model: Path, dtype: str, folder: Path) -> Json:
    """TRL on the prompts that grpo's steps had, in their order."""
    config = load_config()
    prompts, result = folder / f"prompts-{dtype}.jsonl", folder / f"trl-{dtype}.json"
    rows = [json.loads(line) for line in (folder / f"grpo-{dtype}" / "samples.jsonl").read_text().splitlines()]
    prompts.write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in rows))
    work = {
        "model": str(model),
        "data": str(prompts),
        "dtype": dtype,
        "prompts": config["rollout"]["prompts_per_step"],
        "samples": config["rollout"]["samples_per_prompt"],
        "max_tokens": config["rollout"]["max_tokens"],
        "learning_rate": config["train"]["learning_rate"],
        "seed": config["run"]["seed"],
        "steps": options.warmup + options.steps,
        "micro_batch": options.micro_batch,
        "threads": options.threads,
    }
    (folder / f"work-{dtype}.json").write_text(json.dumps(work))
    command = [options.trl_python, HERE / "trl_side.py", folder / f"work-{dtype}.json", result]
    busy, wall = watch(command, {"OMP_NUM_THREADS": str(options.threads)})
    theirs: Json = json.loads(result.read_text())
    return theirs | {"busy_before": busy, "wall": wall}


def load_config() -> Json:
    config: Json = yaml.safe_load((HERE / "bench.yaml").read_text())
    return config


def watch(command: Sequence[str | Path], environment: dict[str, str]) -> tuple[float, float]:
    """Runs one half, offline; how busy the machine was just before, and the seconds of the whole process."""
    busy = busy_share()
    if busy > 0.1:
        print(f"warning: others use {busy:.0%} of this machine, the figures will be off", file=sys.stderr)
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)
    return busy, time.perf_counter() - start


def busy_share(seconds: float = 3.0) -> float:
    """Share of all cores that was in use during the next seconds, while we do nothing."""

    def read() -> tuple[int, int]:
        ticks = [int(tick) for tick in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]

    total, idle = read()
    time.sleep(seconds)
    later, later_idle = read()
    return 1.0 - (later_idle - idle) / max(later - total, 1)


def render(run: Json, warmup: int) -> str:
    """The table: seconds and tokens per second of the median step, and how many times faster grpo is."""
    theirs, ours = (medians(run[side], warmup) for side in ("trl", "grpo"))
    lines = [f"| {run['dtype']}, median step | {run['trl']['system']} | grpo | TRL / grpo |", "|---|---|---|---|"]
    for phase in PHASES:
        ratio = f"{theirs[phase] / ours[phase]:.2f}x" if phase not in ("sync", "other") else ""
        lines.append(f"| {phase}, s | {theirs[phase]:.2f} | {ours[phase]:.2f} | {ratio} |")
    for name, phase, tokens in SPEEDS:
        speeds = [side[tokens] / side[phase] for side in (theirs, ours)]
        lines.append(f"| {name}, tokens/s | {speeds[0]:.0f} | {speeds[1]:.0f} | |")
    spread = [" ".join(f"{step['total']:.1f}" for step in run[side]["steps"]) for side in ("trl", "grpo")]
    lines.append(f"| every step's total, the first {warmup} not counted, s | {spread[0]} | {spread[1]} | |")
    return "\n".join(lines)


def medians(side: Json, warmup: int) -> dict[str, float]:
    """Medians over the steps after the warm-up: seconds of each phase, completion tokens, and tokens of all rows.

    A row is a prompt and a completion; padding never counts. Ends the program if a completion was shorter.
    """
    wanted = load_config()["rollout"]
    completion = wanted["prompts_per_step"] * wanted["samples_per_prompt"] * wanted["max_tokens"]
    steps = side["steps"][warmup:]
    found = [step["tokens"]["completion"] for step in steps]
    if any(tokens != completion for tokens in found):
        sys.exit(
            f"{side['system']}: a step has {completion} completion tokens, found {found}; the figures do not compare"
        )
    values = {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in PHASES}
    rows = statistics.median(step["tokens"]["prompt"] + completion for step in steps)
    return values | {"completion": completion, "rows": rows}


if __name__ == "__main__":
    main()
