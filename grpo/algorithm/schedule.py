"""The course of the learning rate over the steps of a run."""

import math
from collections.abc import Mapping

from grpo.config import Config, Train


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """Rate of a step (the first is 1): rises over the warm-up, then stays or falls to reach 0 after the last step."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = min((step - 1 - train.warmup_steps) / max(total_steps - train.warmup_steps, 1), 1.0)
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return train.learning_rate * factors[train.schedule]


def rate_change(before: Mapping[str, object], config: Config, step: int) -> str | None:
    """What the next step's rate is, where the configuration of the run before, as JSON, gives it another one.

    A schedule that falls is that of the whole run: with more steps it is stretched, and with fewer it falls sooner.
    """
    old_train, old_run = before.get("train"), before.get("run")
    if not isinstance(old_train, dict) or not isinstance(old_run, dict):
        return None
    known = {key: old_train[key] for key in ("learning_rate", "schedule", "warmup_steps") if key in old_train}
    old, old_steps = Train.model_validate(known), int(old_run.get("steps", config.run.steps))
    was, now = learning_rate(old, step + 1, old_steps), learning_rate(config.train, step + 1, config.run.steps)
    if math.isclose(was, now, rel_tol=1e-9, abs_tol=1e-30):
        return None
    return (
        f"the learning rate of step {step + 1} is {now:.4g} ({config.train.schedule} over {config.run.steps} steps); "
        f"with the configuration before it would be {was:.4g} ({old.schedule} over {old_steps} steps)"
    )
