"""What older samples cost in learning: the quickstart with s = 0, 1, 2 and 4, in both modes, over several seeds.

    python -m benchmarks.staleness --seeds 5 --out runs/staleness

Runs go one after the other, through the command line; what is there already is not run again. The table says the
accuracy on held-out questions at the end, its mean and spread over the seeds; the page shows reward against steps and
against time.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CASES: dict[str, tuple[str, ...]] = {
    "s = 0": (),
    "s = 1": ("rollout.max_staleness=1",),
    "s = 1, in flight": ("rollout.max_staleness=1", "rollout.update=in_flight"),
    "s = 2": ("rollout.max_staleness=2",),
    "s = 2, in flight": ("rollout.max_staleness=2", "rollout.update=in_flight"),
    "s = 4": ("rollout.max_staleness=4",),
    "s = 4, no correction": ("rollout.max_staleness=4", "algorithm.correction=none"),
}
Rows = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "staleness")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args(arguments)
    found: dict[str, list[Rows]] = {name: [] for name in chosen.cases}
    for seed in range(chosen.seeds):
        for name in chosen.cases:
            found[name].append(run(chosen.out, name, seed))
    show(found)
    draw(found, chosen.out / "staleness.html")


def run(out: Path, name: str, seed: int) -> Rows:
    """The rows of a run, which is made if it is not there or did not end."""
    folder = out / f"{name.replace(' ', '').replace(',', '-').replace('=', '')}-{seed}"
    file = folder / "metrics.jsonl"
    if not file.exists() or not any(row["event"] == "end" and row["outcome"] == "ok" for row in rows(file)):
        settings = [f"run.dir={folder}", f"run.seed={seed}", *CASES[name]]
        command = [sys.executable, "-m", "grpo", "train", "examples/quickstart.yaml", *settings]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return rows(file)


def rows(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def show(found: dict[str, list[Rows]]) -> None:
    print(f"{'case':24} {'accuracy at the end':>20} {'seeds':>30} {'seconds':>8}")
    for name, runs in found.items():
        ends = [[row["eval/accuracy"] for row in run if row["event"] == "eval"][-1] for run in runs]
        times = [[row["time"] for row in run if row["event"] == "step"] for run in runs]
        spread = f"{statistics.fmean(ends):.3f} ± {statistics.stdev(ends) if len(ends) > 1 else 0.0:.3f}"
        each = " ".join(f"{end:.2f}" for end in ends)
        print(f"{name:24} {spread:>20} {each:>30} {statistics.fmean(t[-1] - t[0] for t in times):8.0f}")


def draw(found: dict[str, list[Rows]], page: Path) -> None:
    """Mean reward over the seeds, by step and by seconds since the first step ended."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("reward by step", "reward by second"), shared_yaxes=True)
    for name, runs in found.items():
        steps = [[row for row in run if row["event"] == "step"] for run in runs]
        reward = [statistics.fmean(row["reward/mean"] for row in at) for at in zip(*steps, strict=True)]
        seconds = [
            statistics.fmean(row["time"] - run[0]["time"] for row, run in zip(at, steps, strict=True))
            for at in zip(*steps, strict=True)
        ]
        for column, x in ((1, list(range(1, len(reward) + 1))), (2, seconds)):
            figure.add_scatter(x=x, y=reward, name=name, legendgroup=name, showlegend=column == 1, row=1, col=column)
    figure.write_html(page)
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
