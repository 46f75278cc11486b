"""KL to the reference outside of the loss: a controller of its coefficient, and the penalty that a reward loses."""

from collections.abc import Sequence
from dataclasses import replace

from grpo.algorithm.advantages import advantages
from grpo.config import Algorithm
from grpo.types import Group, Prompt, Sample

MOST_ERROR = 0.2
"""Relative error of the KL that counts at most."""


class KlController:
    """The coefficient of KL(policy || reference), moved so that the KL stays near `algorithm.kl_target`.

    After every step it is multiplied by 1 + e n / horizon, e the relative error of the step's KL, bounded, and n the
    step's completions (arXiv:1909.08593, section 2.2). It belongs to the checkpoint.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.target, self.horizon = algorithm.kl_target, algorithm.kl_horizon
        self.coef = algorithm.kl_coef

    def update(self, kl: float, completions: int) -> None:
        """After a step whose policy was so many nats a token from the reference."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -MOST_ERROR), MOST_ERROR)
            self.coef *= 1.0 + error * min(completions / self.horizon, 1.0)


def with_kl_penalty(batch: Sequence[Sample], kl_B: Sequence[float], coef: float, algorithm: Algorithm) -> list[Sample]:
    """The samples with advantages of reward - coef * KL; `kl_B` are the nats of their whole completions (k1)."""
    groups: list[list[Sample]] = []
    for sample, kl in zip(batch, kl_B, strict=True):
        before = groups[-1][-1] if groups else None
        if before is None or before.prompt_id != sample.prompt_id or before.index >= sample.index:
            groups.append([])
        groups[-1].append(replace(sample, penalty=sample.penalty - coef * kl))
    prompt = Prompt("", "", "", ())
    compared = advantages([Group(prompt, tuple(group)) for group in groups], algorithm)
    return [replace(sample, advantage=found.advantage) for sample, found in zip(batch, compared, strict=True)]
