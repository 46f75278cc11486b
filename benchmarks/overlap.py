"""How much of both pools' time is used: sampling of 1 s and training of 1 s a step, with and without overlap.

    python -m benchmarks.overlap

The loop, Ray, weights and rewards are the product's; engines and ranks only take time (tests/chaos/timed.py). Each pool
needs 1 s for its part of a step, so the share of the time in which it works is 1 s / step.
"""

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from grpo.cluster.job import Makers, placed_engine, placed_rank, train
from grpo.config.load import load_config
from tests.chaos.timed import BATCH_SECONDS, EvenEngine, TailEngine, TimedRank

RUN = Path(__file__).parents[1] / "tests" / "chaos" / "run.yaml"
STEPS, WARM = 16, 6
"""Steps of a run, and those at its beginning that are not counted."""
CASES = {
    "no overlap": (EvenEngine, 0, "between_batches"),
    "between_batches, s = 1": (EvenEngine, 1, "between_batches"),
    "in_flight, s = 1": (EvenEngine, 1, "in_flight"),
    "tail, no overlap": (TailEngine, 0, "between_batches"),
    "tail, between_batches, s = 2": (TailEngine, 2, "between_batches"),
    "tail, in_flight, s = 2": (TailEngine, 2, "in_flight"),
    "tail, in_flight, s = 3": (TailEngine, 3, "in_flight"),
}


def main() -> None:
    wanted = sys.argv[1:] or list(CASES)
    print(f"{'case':32} {'s a step':>9} {'pools busy':>11}")
    for name in wanted:
        engine, staleness, update = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            seconds = step_seconds(Path(folder), engine, staleness, update)
        print(f"{name:32} {seconds:9.2f} {BATCH_SECONDS / seconds:11.0%}", flush=True)


def step_seconds(folder: Path, engine: type[EvenEngine], staleness: int, update: str) -> float:
    """Median seconds from the end of a step to that of the next."""
    settings = {
        "run.dir": folder / "run",
        "run.steps": STEPS,
        "rollout.engines": 1,
        "rollout.prompts_per_step": 8,
        "rollout.samples_per_prompt": 8,
        "rollout.max_staleness": staleness,
        "rollout.update": update,
        "train.ranks": 1,
        "eval.prompts": 0,
        "checkpoint.every": 0,
    }
    config = load_config(RUN, [f"{key}={value}" for key, value in settings.items()])
    makers = Makers(partial(placed_engine, actor=engine), partial(placed_rank, actor=TimedRank))
    train(config, makers)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = [row["time"] for row in rows if row["event"] == "step"]
    return statistics.fmean(after - before for before, after in zip(ends[WARM:], ends[WARM + 1 :], strict=False))


if __name__ == "__main__":
    main()
