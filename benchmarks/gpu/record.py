"""What one system did with one kind of length: plain numbers, as result.json has them."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.limits import limits_of
from benchmarks.gpu.setting import Setting

Json = dict[str, Any]
FILES = ("metrics.jsonl", "timeline.jsonl", "config.yaml")
"""Of a run's folder, those that are kept."""


def rows_of(file: Path) -> list[Json]:
    """Whole lines of a .jsonl file that is being written; none without one."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def p90(values: Sequence[float]) -> float:
    """Nine tenths of the values are at most that."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def covered(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """Seconds between two times in which at least one span was open."""
    total, until = 0.0, start
    for left, right in sorted(spans):
        left, right = max(left, until), min(right, end)
        total += max(0.0, right - left)
        until = max(until, right)
    return total


def record(measured: Mapping[str, Any], setting: Setting, turns: bool = False) -> Json:
    """Rates, shares and limits, from what was measured: seconds of steps, of their parts (median), tokens of a step.

    `measured`: steps (seconds of each), update, generation, sync (median seconds, None where it is not known),
    completion_tokens (of a step). `turns`: every GPU samples and trains.
    """
    rows, prompt = setting.work.rows, setting.work.mean_prompt
    seconds = statistics.fmean(measured["steps"])  # steps that overlap come in bursts: rates are of all together
    drawn = measured["completion_tokens"]
    tokens = rows * prompt + drawn
    update, generation, sync = (measured.get(part) for part in ("update", "generation", "sync"))
    found = {
        **measured,
        "seconds": statistics.median(measured["steps"]),
        "mean": seconds,
        "p90": p90(measured["steps"]),
        "completions_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
        "train_tokens_per_second": tokens / update if update else None,
        "sample_tokens_per_second": drawn / generation if generation else None,
    }
    if setting.device == "cpu":
        return {**found, "limits": None, "shares": dict.fromkeys(("step", "train", "sample", "sync", "mfu_step"))}
    pool = setting.pool(turns)
    limits = limits_of(setting.shape, setting.gpu, rows, prompt, drawn / rows, pool, pool, turns)
    return {
        **found,
        "limits": {
            "step": limits.step,
            "completions_per_second": rows / limits.step,
            "tokens_per_second": tokens / limits.step,
            "train_tokens_per_second": limits.train_tokens,
            "sample_tokens_per_second": limits.sample_tokens,
            "sync": limits.sync,
        },
        "shares": {  # train: MFU of the update; mfu_step: the same over the whole step
            "step": limits.step / seconds,
            "train": tokens / update / limits.train_tokens if update else None,
            "sample": drawn / generation / limits.sample_tokens if generation else None,
            "sync": limits.sync / sync if sync else None,
            "mfu_step": tokens / seconds / limits.train_tokens,
        },
    }
