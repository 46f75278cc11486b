"""The course of the learning rate."""

import pytest

from grpo.config import Train
from grpo.trainer.schedule import learning_rate


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
