"""The course of the learning rate."""

import pytest

from grpo.algorithm.schedule import learning_rate, rate_change
from grpo.config import Config, Train


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_rises_over_the_warm_up_and_then_follows_the_schedule(schedule, rates):
    train = Train(learning_rate=0.5, warmup_steps=2, schedule=schedule)
    found = [learning_rate(train, step, total_steps=6) for step in range(1, 7)]
    assert found == pytest.approx([0.5 * rate for rate in rates], abs=1e-6)


def config(steps: int, **train: object) -> Config:
    train = {"learning_rate": 1.0, "schedule": "cosine"} | train
    return Config.model_validate({"model": {"path": "x"}, "run": {"steps": steps}, "train": train})


def change(before: Config, after: Config, step: int) -> str | None:
    return rate_change(before.model_dump(mode="json"), after, step)


def test_a_prolonged_or_shortened_run_says_what_its_rate_does():
    assert change(config(100), config(200), 50) == (
        "the learning rate of step 51 is 0.8536 (cosine over 200 steps); with the configuration before it would be 0.5 "
        "(cosine over 100 steps)"
    )
    assert "step 101 is 0.5 (linear over 200 steps); with the configuration before it would be 0 (" in str(
        change(config(100, schedule="linear"), config(200, schedule="linear"), 100)
    )
    assert "step 51 is 0.1667 (linear over 60 steps)" in str(
        change(config(100, schedule="linear"), config(60, schedule="linear"), 50)
    )


def test_another_schedule_rate_or_warm_up_says_so_too():
    assert "is 1 (constant over 100 steps)" in str(change(config(100), config(100, schedule="constant"), 50))
    assert "is 0.25 (cosine" in str(change(config(100), config(100, learning_rate=0.5), 50))
    assert "step 6 is 0.6" in str(change(config(100), config(100, warmup_steps=10), 5))


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        (config(100), config(100), 50),
        (config(100, schedule="constant"), config(200, schedule="constant"), 100),
        (config(100, schedule="linear", warmup_steps=20), config(200, schedule="linear", warmup_steps=20), 7),
    ],
    ids=["the same", "constant", "still warming up"],
)
def test_a_rate_that_stays_as_it_was_is_not_worth_a_word(before, after, step):
    assert change(before, after, step) is None


def test_a_checkpoint_of_a_version_without_these_keys():
    assert rate_change({}, config(100), 5) is None
    before = {"train": {"learning_rate": 1.0, "older": 3}, "run": {}}
    assert rate_change(before, config(9, schedule="constant"), 5) is None


def test_behind_its_end_a_schedule_stays_at_nothing():
    for schedule in ("linear", "cosine"):
        assert learning_rate(Train(schedule=schedule), 300, 100) == pytest.approx(0.0)
