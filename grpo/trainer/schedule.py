"""The course of the learning rate over the steps of a run."""

import math

from grpo.config import Train


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """Rate of a step (the first is 1): rises over the warm-up, then stays or falls to reach 0 after the last step."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - 1 - train.warmup_steps) / max(total_steps - train.warmup_steps, 1)
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return train.learning_rate * factors[train.schedule]
