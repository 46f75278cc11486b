"""Clipped policy-gradient losses as pure functions of tensors, with their statistics as sums that add up.

A token's loss is the same in every variant (PPO's clipped surrogate, arXiv:1707.06347, with separate bounds as in DAPO,
arXiv:2503.14476); a variant only says with which weight a token counts. The weights hold the *global* normaliser, so
losses and gradients of micro-batches and ranks add up to those of the whole minibatch. Dividing by local token counts
would not: it can even turn the sign.

The old logprobs are the sampler's own. That saves a forward pass, and the ratio corrects the difference between
sampler and trainer too; there is no further importance weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

LOG_RATIO_LIMIT = 20.0
"""exp() of more than this is no ratio but an accident."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Size of the global minibatch: completion tokens and sequences of all ranks, the skipped ones included."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss` is a scalar with a gradient; the rest is detached. Add up the `sums`, then divide by `sums["tokens"]`."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


TokenWeights = Callable[[torch.Tensor, Normaliser], torch.Tensor]
"""(completion length of each token's row, normaliser) -> weight of each token."""


def token_mean(lengths_C: torch.Tensor, normaliser: Normaliser) -> torch.Tensor:
    """1 / N: each token of the minibatch counts the same (DAPO)."""
    return torch.full_like(lengths_C, 1.0 / max(normaliser.tokens, 1))


def sequence_mean(lengths_C: torch.Tensor, normaliser: Normaliser) -> torch.Tensor:
    """1 / (B * length): each sequence counts the same, its tokens share that (GRPO, arXiv:2402.03300)."""
    return 1.0 / (lengths_C * max(normaliser.sequences, 1))


LOSSES: dict[str, TokenWeights] = {"dapo": token_mean, "grpo": sequence_mean}


def policy_loss(
    variant: str,
    logprobs_C: torch.Tensor,
    rollout_logprobs_C: torch.Tensor,
    advantages_C: torch.Tensor,
    lengths_C: torch.Tensor,
    normaliser: Normaliser,
    *,
    entropy_C: torch.Tensor | None = None,
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,
    reference_logprobs_C: torch.Tensor | None = None,
) -> LossOutput:
    """sum_C weight * (-min(r A, clip(r, 1 - low, 1 + high) A) + kl_coef * k3), with r = exp(logprob - rollout logprob).

    `lengths_C` is the number of completion tokens of each token's row, in the logprobs' dtype. A rollout logprob that
    is NaN (engines can return it) gives r = 1 and stays out of the statistics. All in nats.
    """
    known_C = ~rollout_logprobs_C.isnan()
    old_C = torch.where(known_C, rollout_logprobs_C, logprobs_C.detach())
    log_ratio_C = (logprobs_C - old_C).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_C = log_ratio_C.exp()
    clipped_C = ratio_C.clamp(1.0 - clip_low, 1.0 + clip_high)
    token_loss_C = -torch.minimum(ratio_C * advantages_C, clipped_C * advantages_C)
    sums = _statistics(log_ratio_C.detach(), advantages_C, known_C, clip_low, clip_high)
    if entropy_C is not None:
        sums["entropy"] = entropy_C[known_C].sum()
    if reference_logprobs_C is not None:
        kl_C = k3(logprobs_C - reference_logprobs_C)
        token_loss_C = token_loss_C + kl_coef * kl_C
        sums["kl_reference"] = kl_C.detach()[known_C].sum()
    loss = (LOSSES[variant](lengths_C, normaliser) * token_loss_C).sum()
    ratio_max = torch.where(known_C, ratio_C.detach(), 0.0).max()
    return LossOutput(loss, sums, {"ratio_max": ratio_max})


def k3(log_ratio_C: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per token of p's samples, from x = log p - log q: e^-x - 1 + x, never negative and unbiased.

    Source: http://joschu.net/blog/kl-approx.html
    """
    limited_C = log_ratio_C.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-limited_C) + limited_C  # e^-x - 1 would lose the digits of a small divergence


def _statistics(
    log_ratio_C: torch.Tensor, advantages_C: torch.Tensor, known_C: torch.Tensor, clip_low: float, clip_high: float
) -> dict[str, torch.Tensor]:
    """Sums over tokens with a known ratio: how many, how many lost their gradient to a bound, how far off they are."""
    log_ratio_C, advantages_C = log_ratio_C[known_C], advantages_C[known_C]
    ratio_C = log_ratio_C.exp()
    return {
        "tokens": known_C.sum(),
        "clip_low": ((ratio_C < 1.0 - clip_low) & (advantages_C < 0)).sum(),
        "clip_high": ((ratio_C > 1.0 + clip_high) & (advantages_C > 0)).sum(),
        "approx_kl": k3(-log_ratio_C).sum(),
        "abs_diff": log_ratio_C.abs().sum(),
    }
