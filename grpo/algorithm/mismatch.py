"""How far apart trainer and sampler are about the same tokens, before a step's first update: sums that add up, figures.

All about w = trainer / sampler of each token whose sampler's logprob is known, before a correction bounds it, and about
its product over each row. The 99th percentile is read off a histogram, whose bounds are 15 % apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from grpo.algorithm.correction import Bounds, sequence_weights
from grpo.algorithm.inputs import LOG_RATIO_LIMIT, LossInputs, k3
from grpo.types import Stats

WEIGHTS = (0.25, 0.5, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 2.0, 4.0)
"""Upper bounds of the histogram of w; one more bucket takes the rest."""
SMALLEST = 1e-6
DIFFERENCES: tuple[float, ...] = tuple(SMALLEST * (LOG_RATIO_LIMIT / SMALLEST) ** (place / 120) for place in range(121))
"""Upper bounds, in nats, of the histogram of |log w|."""
FURTHEST = 1.0
"""Nats that one token counts at most in the bounded mean: one of a thousand that moves by 20, as happens where a policy
becomes sure, decides the other, and a part of the tokens may lack it."""
SUMS = (
    *("tokens", "k1", "k3", "difference", "bounded", "far", "weight", "weight_squared"),
    *("above", "below", "dropped"),
    *("sequences", "sequence_weight", "sequence_weight_squared", "perplexity", "dropped_sequences"),
)
MAXIMA = ("difference", "prob_difference", "weight", "minus_weight")
LENGTH = len(SUMS) + len(WEIGHTS) + 1 + len(DIFFERENCES) + 1


@dataclass(frozen=True, slots=True)
class Mismatch:
    """`sums` of LENGTH numbers add up over micro-batches, ranks and minibatches, of `maxima` the largest counts."""

    sums: torch.Tensor
    maxima: torch.Tensor

    @classmethod
    def none(cls, device: torch.device) -> "Mismatch":
        """Of no token."""
        sums = torch.zeros(LENGTH, dtype=torch.float64, device=device)
        return cls(sums, torch.full((len(MAXIMA),), -math.inf, dtype=torch.float64, device=device))

    def __add__(self, other: "Mismatch") -> "Mismatch":
        return Mismatch(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))


def measure(inputs: LossInputs, bounds: Bounds, weights_C: torch.Tensor | None) -> Mismatch:
    """Of one micro-batch; `weights_C` are those of the correction, None without one."""
    known_C = inputs.known_C
    log_C = inputs.log_weights_C.double()
    w_C, far_C = log_C.exp(), log_C.abs() > inputs.far
    known_R, rows_R = inputs.sum_R(known_C.double()), inputs.lengths_R > 0
    seen_R = known_R > 0
    w_R = sequence_weights(inputs).double()
    mean_R = inputs.sum_R(log_C) / known_R.clamp(min=1.0)
    kept_C = torch.ones_like(known_C) if weights_C is None else weights_C != 0.0
    dropped_R = rows_R & (inputs.sum_R(kept_C.double()) == 0)
    tokens = {
        "tokens": torch.ones_like(log_C),
        "k1": -log_C,
        "k3": k3(-log_C),
        "difference": log_C.abs(),
        "bounded": log_C.abs().clamp(max=FURTHEST),
        "far": far_C,
        "weight": w_C,
        "weight_squared": w_C**2,
        "above": w_C > bounds.high,
        "below": w_C < 1.0 / bounds.high,
        "dropped": ~kept_C,
    }
    sequences = {
        "sequences": torch.ones_like(w_R),
        "sequence_weight": w_R,
        "sequence_weight_squared": w_R**2,
        "perplexity": (-mean_R).exp(),
        "dropped_sequences": dropped_R,
    }
    sums = torch.stack(
        [(value_C.double() * known_C).sum() for value_C in tokens.values()]
        + [(value_R.double() * seen_R).sum() for value_R in sequences.values()]
    )
    probs_C = (inputs.trainer_C.double().exp() - inputs.rollout_logprobs_C.double().exp()).abs()
    largest = torch.stack([log_C.abs(), probs_C, w_C, -w_C])
    maxima = torch.where(known_C, largest, -math.inf).amax(dim=1)
    histograms = [_counts(w_C, known_C, WEIGHTS), _counts(log_C.abs(), known_C, DIFFERENCES)]
    return Mismatch(torch.cat([sums, *histograms]), maxima)


def _counts(values_C: torch.Tensor, known_C: torch.Tensor, bounds: Sequence[float]) -> torch.Tensor:
    """How many known values are at most each bound and above the one before; the last are above all."""
    limits = torch.tensor(bounds, dtype=values_C.dtype, device=values_C.device)
    counts = torch.zeros(len(bounds) + 1, dtype=values_C.dtype, device=values_C.device)
    return counts.index_add(0, torch.bucketize(values_C, limits), known_C.to(values_C.dtype))


def figures(mismatch: Mismatch) -> Stats:
    """Means, extremes and effective sample sizes; without any known token there are none."""
    values: list[float] = mismatch.sums.tolist()
    sums = dict(zip(SUMS, values, strict=False))
    of_weights, of_differences = values[len(SUMS) :][: len(WEIGHTS) + 1], values[-len(DIFFERENCES) - 1 :]
    largest = dict(zip(MAXIMA, mismatch.maxima.tolist(), strict=True))
    n, rows = sums["tokens"], sums["sequences"]
    if not n:
        return {}
    buckets = zip((*(f"{bound:g}" for bound in WEIGHTS), "+Inf"), accumulate(of_weights), strict=True)
    return {
        "rollout_kl": sums["k3"] / n,
        "rollout_kl_k1": sums["k1"] / n,
        "rollout_abs_diff": sums["difference"] / n,
        "rollout_abs_diff_bounded": sums["bounded"] / n,
        "rollout_abs_diff_p99": quantile(of_differences, 0.99),
        "rollout_abs_diff_max": largest["difference"],
        "rollout_prob_diff_max": largest["prob_difference"],
        "rollout_far": sums["far"] / n,
        "rollout_perplexity_ratio": sums["perplexity"] / rows,
        "weight_mean": sums["weight"] / n,
        "weight_min": -largest["minus_weight"],
        "weight_max": largest["weight"],
        "weight_above": sums["above"] / n,
        "weight_below": sums["below"] / n,
        "ess_tokens": sums["weight"] ** 2 / (n * sums["weight_squared"]),
        "ess_sequences": sums["sequence_weight"] ** 2 / (rows * sums["sequence_weight_squared"]),
        "chi2_tokens": sums["weight_squared"] / n - 1.0,
        "chi2_sequences": sums["sequence_weight_squared"] / rows - 1.0,
        "dropped_tokens": sums["dropped"] / n,
        "dropped_sequences": sums["dropped_sequences"] / rows,
    } | {f"weights_le_{bound}": count for bound, count in buckets}


def quantile(counts: Sequence[float], share: float) -> float:
    """Of |log w|, from the histogram's counts: the upper bound of the bucket that it falls into; at least SMALLEST."""
    wanted = share * sum(counts)
    below = accumulate(counts)
    place = next(place for place, count in enumerate(below) if count >= wanted)
    return DIFFERENCES[min(place, len(DIFFERENCES) - 1)]
