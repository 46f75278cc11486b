"""Corrections of the policy loss for samples that other weights, or another engine's arithmetic, have made.

With one, the loss is decoupled PPO (arXiv:2110.00641, arXiv:2505.24298): the clipped ratio is new / start, with `start`
the trainer's own policy before the step's first update, and what lies between that and the sampler is a weight
w = start / sampler, bounded here and without a gradient. Without one, the ratio is new / sampler, which is the whole
importance weight already: there is then none to multiply.

A weight of 0 drops its tokens from the sum and not from the normaliser, which all ranks know before any weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo.algorithm.inputs import LOG_RATIO_LIMIT, LossInputs
from grpo.config import Config

WEIGHT_LIMIT = 2.0
"""Bound of w above which a token is counted as outlying in runs without a correction; that of TIS."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a correction, by name, with the bounds of its weight or of what masks."""

    name: str = "none"
    low: float = 0.0
    high: float = WEIGHT_LIMIT


NONE = Bounds()


@dataclass(frozen=True, slots=True)
class Correction:
    """A variant: the weight of each token, and the bounds that hold unless the configuration has others."""

    weights: Callable[[LossInputs, Bounds], torch.Tensor]
    low: float
    high: float


def truncated(inputs: LossInputs, bounds: Bounds) -> torch.Tensor:
    """w between the bounds: variance is bounded, nothing is dropped (truncated importance sampling, TIS)."""
    return inputs.log_weights_C.exp().clamp(bounds.low, bounds.high)


def within(inputs: LossInputs, bounds: Bounds) -> torch.Tensor:
    """w, and 0 outside of the bounds: a token on which the two disagree teaches nothing (IcePop)."""
    weights_C = inputs.log_weights_C.exp()
    return weights_C * _inside(weights_C, bounds)


def sequence_weight(inputs: LossInputs, bounds: Bounds) -> torch.Tensor:
    """The product of a row's w for all its tokens, and 0 outside of the bounds (masked sequence importance sampling).

    Unbiased, but the product's spread grows with the length.
    """
    weights_R = sequence_weights(inputs)
    return (weights_R * _inside(weights_R, bounds))[inputs.rows_C]


def geometric_mask(inputs: LossInputs, bounds: Bounds) -> torch.Tensor:
    """w, and 0 in rows whose geometric mean of w is outside of the bounds, whatever their length."""
    known_R = inputs.sum_R(inputs.known_C.to(inputs.log_weights_C.dtype)).clamp(min=1.0)
    mean_R = (inputs.sum_R(inputs.log_weights_C) / known_R).exp()
    return inputs.log_weights_C.exp() * _inside(mean_R, bounds)[inputs.rows_C]


def uncapped(inputs: LossInputs, bounds: Bounds) -> torch.Tensor:
    """w as it is: unbiased, with the variance that it has (decoupled PPO, as published)."""
    return inputs.log_weights_C.exp()


def off_policy_rows(inputs: LossInputs, limit: float) -> torch.Tensor:
    """Which rows of negative advantage the policy is further from than so many nats a token, sampler by policy.

    Pushing down what the policy would hardly say any more teaches nothing (DeepSeek-V3.2, arXiv:2512.02556, eq. 9).
    """
    apart_R = inputs.mean_R(inputs.behaviour_C - inputs.logprobs_C.detach())
    return (apart_R > limit) & (inputs.mean_R(inputs.advantages_C) < 0)


def sequence_weights(inputs: LossInputs) -> torch.Tensor:
    """The product of w over each row's tokens."""
    return inputs.sum_R(inputs.log_weights_C).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _inside(values: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    return (values >= bounds.low) & (values <= bounds.high)


CORRECTIONS: dict[str, Correction] = {
    "tis": Correction(truncated, 0.0, WEIGHT_LIMIT),
    "icepop": Correction(within, 0.5, 5.0),
    "seq_mask": Correction(sequence_weight, 0.0, 3.0),
    "geo_mask": Correction(geometric_mask, 0.8, 1.2),
    "decoupled": Correction(uncapped, 0.0, WEIGHT_LIMIT),
}
"""By the name in `algorithm.correction`; `none` is no row."""


def bounds_of(config: Config) -> Bounds:
    """The correction of a run."""
    algorithm = config.algorithm
    name = algorithm.correction or config.default_correction
    if name == "none":
        return NONE
    row = CORRECTIONS[name]
    low = row.low if algorithm.correction_low is None else algorithm.correction_low
    high = row.high if algorithm.correction_high is None else algorithm.correction_high
    return Bounds(name, low, high)
