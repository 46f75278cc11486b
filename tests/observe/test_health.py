"""When a run counts as stuck, and from when on it is ready."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import Config
from grpo.observe.health import Health, limits
from grpo.observe.metrics import PHASES

DEADLINES = {"start": 100, "rollout": 2000, "reward": 400, "train": 3000, "sync": 500, "save": 700, "health": 10}


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def make_config(**deadlines: float) -> Config:
    return Config.model_validate({"model": {"path": "x"}, "deadlines": DEADLINES | deadlines})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(make_config(), clock)


def test_every_phase_has_a_limit_and_what_it_follows_from() -> None:
    assert limits(make_config()) == {
        "": (810, "deadlines.save + start + health"),
        "rollout": (2110, "deadlines.rollout + start + health"),
        "reward": (510, "deadlines.reward + start + health"),
        "advantage": (110, "deadlines.start + health"),
        "train": (3110, "deadlines.train + start + health"),
        "weight_sync": (610, "deadlines.sync + start + health"),
        "checkpoint": (810, "deadlines.save + start + health"),
        "eval": (2510, "deadlines.rollout + reward + start + health"),
    }
    assert set(limits(make_config())) == {"", *PHASES}


@given(st.fixed_dictionaries({key: st.integers(1, 10_000) for key in DEADLINES}))
def test_nothing_is_stuck_before_its_deadline_and_a_replacement_have_passed(deadlines: dict[str, float]) -> None:
    found = limits(make_config(**deadlines))
    for phase, key in {"rollout": "rollout", "train": "train", "weight_sync": "sync", "checkpoint": "save"}.items():
        assert found[phase][0] >= deadlines[key] + deadlines["start"] + deadlines["health"]


def test_a_stalled_phase_is_named_with_its_time_and_limit(
    health: Health, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo.observe.health.time.time", lambda: 1.8e9)
    health.alive("reward")
    clock.now += 510
    good = "reward: last progress 510 s ago, at 2027-01-15T08:00:00Z; the limit is 510 s"
    assert health.health() == (True, good)
    clock.now += 1
    bad = "reward: no progress for 511 s, since 2027-01-15T08:00:00Z; the limit is 510 s (deadlines.reward + start + "
    assert health.health() == (False, f"{bad}health)")


def test_any_sign_of_progress_begins_the_wait_anew(health: Health, clock: Clock) -> None:
    health.alive("reward")
    clock.now += 511
    assert not health.health()[0]
    health.alive()
    assert health.health()[0]
    assert health.health()[1].startswith("reward: ")


def test_the_limit_is_that_of_the_running_phase(health: Health, clock: Clock) -> None:
    health.alive("train")
    clock.now += 3000
    assert health.health()[0]
    health.alive("")
    clock.now += 811
    good, line = health.health()
    assert not good and line.startswith("between phases: no progress for 811 s")


def test_a_start_has_a_limit_too(health: Health, clock: Clock) -> None:
    clock.now += 810
    assert health.health()[0]
    clock.now += 1
    assert not health.health()[0]


def test_ready_comes_once_and_stays(health: Health, clock: Clock) -> None:
    text = "engines and ranks must be ready and the first weight sync verified"
    assert health.readiness() == (False, f"starting: {text}")
    health.alive("weight_sync")
    assert health.readiness() == (False, f"weight_sync: {text}")
    health.ready()
    health.alive("rollout")
    clock.now += 1e6
    assert health.readiness() == (True, "ready")
