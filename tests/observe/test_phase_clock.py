"""Seconds by phase: up to now, and always as many as have passed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.observe.metrics import PHASES, Metric
from grpo.observe.phase_clock import BETWEEN, PhaseClock

METRIC = Metric("grpo_phase_seconds_total", "counter", "seconds", "Time by phase.", ("phase",))


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def seconds(clock: PhaseClock) -> dict[str, float]:
    """What a scrape sees, without the phases in which no time went by."""
    (family,) = clock.collect()
    assert [sample.labels["run"] for sample in family.samples] == ["mine"] * (len(PHASES) + 1)
    return {sample.labels["phase"]: sample.value for sample in family.samples if sample.value}


def test_a_phase_that_is_not_over_counts_up_to_now() -> None:
    time = Time()
    clock = PhaseClock(METRIC, "mine", time)
    assert seconds(clock) == {}
    time.now += 3
    clock.began("rollout")
    time.now += 600
    assert seconds(clock) == {BETWEEN: 3, "rollout": 600}
    time.now += 1
    clock.ended("rollout")
    time.now += 5
    assert seconds(clock) == {BETWEEN: 8, "rollout": 601}


def test_a_phase_inside_of_another_has_the_time_of_the_other() -> None:
    time = Time()
    clock = PhaseClock(METRIC, "mine", time)
    clock.began("train")
    time.now += 1
    clock.began("checkpoint")
    time.now += 2
    clock.ended("checkpoint")
    time.now += 4
    assert seconds(clock) == {"train": 5, "checkpoint": 2}


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.booleans(), st.floats(0, 1e6)), max_size=20))
def test_all_phases_together_are_the_time_that_has_passed(events: list[tuple[str, bool, float]]) -> None:
    time = Time()
    clock = PhaseClock(METRIC, "mine", time)
    for phase, begins, after in events:
        time.now += after
        (clock.began if begins else clock.ended)(phase)
    assert sum(seconds(clock).values()) == pytest.approx(time.now - 100)
