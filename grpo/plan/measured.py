"""Rates of a run that was made, from its own rows: what it would do with other numbers of engines and ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.plan.gpus import CPU_ADAM, FLOOR, HOST_LINK, LINK_SHARE, Gpu
from grpo.plan.model_size import read_shape
from grpo.plan.speed import Rates, Work, slowed_by_syncs, talk_seconds, train_flops, trains_beside

Row = Mapping[str, object]
WARM_UP = 2
"""Steps at the start of a run that are left out where more follow."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run did: its work, its rates, and the median seconds of a step."""

    steps: int
    work: Work
    rates: Rates
    seconds: float


def measured(rows: Sequence[Row], spans: Sequence[Row], config: Config, gpu: Gpu, name: str) -> Measured:
    """From the rows of metrics.jsonl and timeline.jsonl and the configuration of the run `name`. Raises ConfigError."""
    steps = [row for row in rows if row.get("event") == "step"]
    steps = steps[WARM_UP:] or steps
    first = min((int(_number(row, "step") or 0) for row in steps), default=0)
    rollout, shape, where = config.rollout, read_shape(config), f"--from {name}"
    completion = _median(steps, "rollout/completion_tokens", where)
    prompt = _median(steps, "rollout/prompt_tokens", where)
    drawn_rows = rollout.prompts_per_step * rollout.samples_per_prompt
    work = Work(
        rollout.prompts_per_step,
        rollout.samples_per_prompt,
        prompt / rollout.prompts_per_step,
        completion / drawn_rows,
        completion / drawn_rows,  # what the longest one cost is in the rate
    )
    seconds = {
        "sample": _lasted(spans, "rollout", "sample", first, where),
        "train": _median(steps, "phase/train", where),
    }
    syncs = [row for row in rows if _number(row, "sync/seconds") is not None and (_number(row, "step") or 0) >= first]
    whole = _middle(syncs, "sync/seconds")
    receive = _middle(syncs, "sync/receive_seconds") or whole
    if trains_beside(config):
        slowed = slowed_by_syncs(config) * receive / config.sync.every
        seconds["train"] = max(seconds["train"] - slowed, seconds["train"] / 4)
    counts = [count for row in steps if (count := _number(row, "pipeline/engines"))]
    engines = sum(counts) / len(counts) if counts and rollout.elastic else float(rollout.fewest_engines)
    rates = Rates(completion / engines / seconds["sample"], 1.0, whole, 0.0, 0.0, FLOOR, LINK_SHARE * gpu.link)
    talked = min(talk_seconds(config, shape, work, rates, config.train.ranks), seconds["train"] / 2)
    return Measured(
        len(steps),
        work,
        Rates(
            engine_tokens=rates.engine_tokens,
            rank_flops=train_flops(config, shape, work) / config.train.ranks / (seconds["train"] - talked),
            sync=whole,
            switch=_middle(syncs, "sync/switch_seconds") or whole,
            receive=receive,
            floor=FLOOR,
            link=rates.link,
            slowed=slowed_by_syncs(config),
            # Else it is in the FLOP/s.
            adam=math.inf if config.train.offloads else CPU_ADAM,
            host_link=math.inf if config.train.offloads else HOST_LINK,
        ),
        _median(steps, "step/seconds", where),
    )


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15
    return float(value) if good and isinstance(value, int | float) else None


def _middle(rows: Sequence[Row], key: str) -> float:
    found = [value for row in rows if (value := _number(row, key)) is not None]
    return median(found) if found else 0.0


def _median(rows: Sequence[Row], key: str, where: str) -> float:
    found = _middle(rows, key)
    if not found > 0:
        raise ConfigError(f"{where}: a finished step must say its {key}, but none does; give the folder of another run")
    return found


def _lasted(spans: Sequence[Row], lane: str, what: str, first: int, where: str) -> float:
    """Mean seconds a step in which the pool did that; what overlaps, as batches in flight do, counts once."""
    by_step: dict[float, list[tuple[float, float]]] = {}
    for span in spans:
        step, start, end = (_number(span, key) for key in ("step", "start", "end"))
        if (span.get("lane"), span.get("what")) == (lane, what) and None not in (step, start, end):
            assert step is not None and start is not None and end is not None
            if step >= first:
                by_step.setdefault(step, []).append((start, end))
    busy = _covered([edges for each in by_step.values() for edges in each])
    if not busy > 0:
        raise ConfigError(
            f"{where}: its timeline.jsonl must say when it sampled, but does not; give the folder of another run"
        )
    return busy / len(by_step)


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
