"""The rule of versions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import Config
from grpo.run.clock import Clock, due


def clock(
    staleness: int = 0, held_out: bool = False, base: int = 0, update: str = "between_batches", **sections: object
) -> Clock:
    run = {"model": {"path": "x"}, "run": {"steps": 20}}
    rollout = {"max_staleness": staleness, "update": update}
    return Clock.of(Config.model_validate(run | {"rollout": rollout} | sections), held_out, base)


def test_the_synchronous_loop_samples_from_the_step_before() -> None:
    assert [clock().oldest(step) for step in range(1, 5)] == [0, 1, 2, 3]
    assert [clock().newest(step) for step in range(1, 5)] == [0, 1, 2, 3]
    assert clock().furthest(trained=3) == 4


def test_a_batch_ahead_is_of_a_version_that_is_older_by_the_staleness() -> None:
    assert [clock(2).oldest(step) for step in range(1, 7)] == [0, 0, 0, 1, 2, 3]
    assert clock(2).furthest(trained=3) == 6 and clock(2).furthest(trained=19) == 20


def test_in_flight_newer_weights_may_join() -> None:
    in_flight = clock(2, update="in_flight")
    assert [(in_flight.oldest(step), in_flight.newest(step)) for step in (1, 3, 5)] == [(0, 0), (0, 2), (2, 4)]
    assert not clock(0, update="in_flight").in_flight  # nothing runs ahead


def test_versions_are_published_every_n_steps_and_where_they_are_evaluated() -> None:
    every = {"sync": {"every": 4}, "checkpoint": {"every": 4}, "eval": {"every": 6}}
    assert [step for step in range(21) if clock(1, **every).published(step)] == [0, 4, 8, 12, 16, 20]
    assert [step for step in range(21) if clock(1, True, **every).published(step)] == [0, 4, 6, 8, 12, 16, 18, 20]
    assert [clock(1, True, **every).oldest(step) for step in range(6, 12)] == [4, 4, 6, 6, 8, 8]


def test_a_resumed_run_has_no_older_version_than_that_of_its_checkpoint() -> None:
    resumed = clock(2, base=7, sync={"every": 4}, checkpoint={"every": 4})
    assert [resumed.oldest(step) for step in range(8, 13)] == [7, 7, 7, 8, 8]
    assert resumed.published(7)


@given(st.integers(0, 6), st.integers(1, 5), st.integers(0, 12), st.booleans(), st.booleans())
def test_a_version_is_never_too_old_and_never_of_the_future(
    staleness: int, every: int, base: int, held_out: bool, in_flight: bool
) -> None:
    update = "in_flight" if in_flight else "between_batches"
    sections = {"sync": {"every": every}, "checkpoint": {"every": every}, "eval": {"every": 3}}
    rule = clock(staleness, held_out, base, update, **sections)
    before = base
    for step in range(base + 1, 21):
        oldest, newest = rule.oldest(step), rule.newest(step)
        assert max(base, step - staleness - every) <= oldest <= newest <= step - 1 and rule.published(oldest)
        assert oldest >= before
        before = oldest
        assert rule.furthest(trained=step - 1) >= step


@pytest.mark.parametrize(("step", "every", "wanted"), [(0, 5, True), (5, 5, True), (6, 5, False), (5, 0, False)])
def test_due(step: int, every: int, wanted: bool) -> None:
    assert due(step, every) is wanted
