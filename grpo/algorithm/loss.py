"""Policy-gradient losses as pure functions of tensors, with their statistics as sums that add up.

A variant in LOSSES makes each token's loss out of a ratio: of the token, or of its whole sequence. What TERMS add to it
(KL, entropy) and how tokens add up (`aggregation.py`) are choices of their own.

What a loss or a term needs to be right it declares (`Needs`), and the trainer asks `needs_of` before it skips a row or
leaves out a gradient. A term that shall teach and comes without a gradient is an error, not a constant.

Without a correction (`correction.py`) the old logprobs are the sampler's own. That saves a forward pass, and the ratio
corrects the difference between sampler and trainer too; there is no further importance weight. With one they are the
trainer's before the step's first update, and the correction's weight multiplies the policy's term alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from grpo.algorithm.aggregation import AGGREGATIONS
from grpo.algorithm.correction import CORRECTIONS, NONE, Bounds, off_policy_rows
from grpo.algorithm.inputs import LossInputs, bounded, k3
from grpo.algorithm.mismatch import Mismatch, measure
from grpo.algorithm.needs import Needs
from grpo.algorithm.terms import active_terms, attached
from grpo.config import Algorithm


def ratio_bounds(algorithm: Algorithm) -> tuple[float, float]:
    """Of the ratio; of a loss without any, what no ratio is beyond."""
    if algorithm.clip_low is None or algorithm.clip_high is None:
        return 0.0, float("inf")
    return 1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high


def token_ratio(inputs: LossInputs) -> torch.Tensor:
    """log of each token's own ratio."""
    return inputs.log_ratio_C


def sequence_ratio(inputs: LossInputs) -> torch.Tensor:
    """log of the geometric mean of a row's ratios, the same for all its tokens (GSPO, arXiv:2507.18071, eq. 7)."""
    return inputs.mean_R(inputs.log_ratio_C)[inputs.rows_C]


def sequence_token_ratio(inputs: LossInputs) -> torch.Tensor:
    """Its value is the sequence's, its gradient that of the token alone (GSPO-token, eq. 14)."""
    logprobs_C = inputs.logprobs_C
    return sequence_ratio(inputs).detach() + logprobs_C - logprobs_C.detach()


def sequence_product(inputs: LossInputs) -> torch.Tensor:
    """log of the product of a row's ratios: of the probabilities of whole sequences."""
    return inputs.sum_R(bounded(inputs.log_ratio_C))[inputs.rows_C]


def clipped(log_ratio_C: torch.Tensor, inputs: LossInputs, algorithm: Algorithm) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv:1707.06347) with separate bounds (DAPO).

    With a dual clip c it is -c A at most where A < 0 (arXiv:1912.09729, eq. 5).
    """
    advantages_C, ratio_C = inputs.advantages_C, log_ratio_C.exp()
    surrogate_C = torch.minimum(ratio_C * advantages_C, ratio_C.clamp(*ratio_bounds(algorithm)) * advantages_C)
    if algorithm.dual_clip is not None:
        floor_C = algorithm.dual_clip * advantages_C
        surrogate_C = torch.where(advantages_C < 0, torch.maximum(surrogate_C, floor_C), surrogate_C)
    return -surrogate_C


def capped(log_ratio_C: torch.Tensor, inputs: LossInputs, algorithm: Algorithm) -> torch.Tensor:
    """-sg(clip(r, 1 - low, 1 + high)) A log p: no token loses its gradient (CISPO, arXiv:2506.13585, eq. 4)."""
    weight_C = log_ratio_C.detach().exp().clamp(*ratio_bounds(algorithm))
    return -weight_C * inputs.advantages_C * inputs.logprobs_C


def softly_gated(log_ratio_C: torch.Tensor, inputs: LossInputs, algorithm: Algorithm) -> torch.Tensor:
    """-(4 / t) sigmoid(t (r - 1)) A, with a temperature t by the sign of A (SAPO, arXiv:2511.20347)."""
    assert algorithm.sapo_temperature is not None, "the configuration fills it in"
    above, below = algorithm.sapo_temperature
    temperature_C = torch.where(inputs.advantages_C > 0, above, below)
    gate_C = torch.sigmoid(temperature_C * (log_ratio_C.exp() - 1.0)) * 4.0 / temperature_C
    return -gate_C * inputs.advantages_C


def gamma_weighted(log_ratio_C: torch.Tensor, inputs: LossInputs, algorithm: Algorithm) -> torch.Tensor:
    """-sg(W^k e^(l (1 - W))) A log p, W the ratio of whole sequences, k and l by the sign of A (VESPO)."""
    assert algorithm.vespo_k is not None and algorithm.vespo_lambda is not None, "the configuration fills them in"
    positive_C, log_w_C = inputs.advantages_C >= 0, log_ratio_C.detach()
    k_C, decay_C = (torch.where(positive_C, *pair) for pair in (algorithm.vespo_k, algorithm.vespo_lambda))
    weight_C = (decay_C + k_C * log_w_C - decay_C * log_w_C.exp()).exp()
    return -weight_C * inputs.advantages_C * inputs.logprobs_C


def unbounded(log_ratio_C: torch.Tensor, inputs: LossInputs, algorithm: Algorithm) -> torch.Tensor:
    """-r A: the policy gradient with its whole importance weight (REINFORCE)."""
    return -log_ratio_C.exp() * inputs.advantages_C


@dataclass(frozen=True, slots=True)
class Loss:
    """A variant: each token's loss, the log-ratio that it is made of, and what it needs."""

    value: Callable[[torch.Tensor, LossInputs, Algorithm], torch.Tensor]
    log_ratio: Callable[[LossInputs], torch.Tensor] = token_ratio
    needs: Needs = field(default_factory=Needs)


LOSSES: dict[str, Loss] = {
    "dapo": Loss(clipped),
    "grpo": Loss(clipped),
    "dr_grpo": Loss(clipped),
    "gspo": Loss(clipped, sequence_ratio),
    "gspo_token": Loss(clipped, sequence_token_ratio),
    "luspo": Loss(clipped, sequence_ratio),
    "cispo": Loss(capped),
    "sapo": Loss(softly_gated),
    "vespo": Loss(gamma_weighted, sequence_product),
    "reinforce": Loss(unbounded),
}
"""By the name in `algorithm.loss`; what each fills in stands in `grpo/config/variants.py`."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss` is a scalar with a gradient; the rest is detached. Add up the `sums`, then divide by `sums["tokens"]`."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    ratio_max: torch.Tensor
    """Largest ratio of a token, policy by sampler."""
    mismatch: Mismatch


def needs_of(algorithm: Algorithm) -> Needs:
    """What the configured loss and its terms need."""
    needs = LOSSES[algorithm.loss].needs
    if algorithm.kl_coef:
        needs |= Needs(reference=True, zero_advantage_rows=True)  # also where its KL is taken off the reward
    for term in active_terms(algorithm):
        needs |= term.needs
    return needs


def statistics_of(algorithm: Algorithm) -> list[str]:
    """Names of the `sums` that every output of the configured loss has."""
    names = ["tokens", "clip_low", "clip_high", "approx_kl", "entropy"]
    names += ["kl_reference"] * needs_of(algorithm).reference
    return names + [term.statistic for term in active_terms(algorithm) if term.statistic]


def policy_loss(inputs: LossInputs, algorithm: Algorithm, bounds: Bounds = NONE) -> LossOutput:
    """sum_C aggregation * (w * loss(r) + terms), with r = exp(logprob - old logprob) of a token or its sequence.

    `bounds` are those of the correction, whose weight is w; without one, w is 1 and the old logprobs are the sampler's.
    Unknown rollout logprobs stay out of the statistics. All in nats.
    """
    correction, loss = CORRECTIONS.get(bounds.name), LOSSES[algorithm.loss]
    inputs = replace(inputs, corrected=correction is not None)
    known_C = inputs.known_C
    log_ratio_C = bounded(loss.log_ratio(inputs))
    token_loss_C = loss.value(log_ratio_C, inputs, algorithm)
    weights_C = correction.weights(inputs, bounds) if correction else None
    if algorithm.off_policy_mask is not None:
        kept_C = (~off_policy_rows(inputs, algorithm.off_policy_mask))[inputs.rows_C].to(token_loss_C.dtype)
        weights_C = kept_C if weights_C is None else weights_C * kept_C
    if weights_C is not None:
        token_loss_C = weights_C * token_loss_C
    sums = _statistics(log_ratio_C.detach(), inputs, algorithm)
    if inputs.entropy_C is not None:
        sums["entropy"] = inputs.entropy_C.detach()[known_C].sum()
    if inputs.reference_logprobs_C is not None:
        sums["kl_reference"] = k3((inputs.logprobs_C.detach() - inputs.reference_logprobs_C)[known_C]).sum()
    for term in active_terms(algorithm):
        value_C = attached(term, inputs)
        token_loss_C = token_loss_C + term.coefficient(algorithm, inputs) * value_C
        if term.statistic:
            sums[term.statistic] = value_C.detach()[known_C].sum()
    total = (AGGREGATIONS[str(algorithm.aggregation)](inputs) * token_loss_C).sum()
    moved_C = bounded(inputs.logprobs_C.detach() - inputs.behaviour_C).exp()
    ratio_max = torch.where(known_C, moved_C, 0.0).max()
    return LossOutput(total, sums, ratio_max, measure(inputs, bounds, weights_C))


def _statistics(log_ratio_C: torch.Tensor, inputs: LossInputs, algorithm: Algorithm) -> dict[str, torch.Tensor]:
    """Sums over tokens with a known sampler: how many, how many a bound has cut, how far they moved.

    A clip cuts the gradient of tokens whose advantage would move them on; a cap cuts the weight of all.
    """
    known_C = inputs.known_C
    ratio_C, advantages_C = log_ratio_C[known_C].exp(), inputs.advantages_C[known_C]
    low, high = ratio_bounds(algorithm)
    below_C, above_C = ratio_C < low, ratio_C > high
    if LOSSES[algorithm.loss].value is clipped:
        below_C, above_C = below_C & (advantages_C < 0), above_C & (advantages_C > 0)
        if algorithm.dual_clip is not None:
            above_C = above_C | ((ratio_C > algorithm.dual_clip) & (advantages_C < 0))
    return {
        "tokens": known_C.sum(),
        "clip_low": below_C.sum(),
        "clip_high": above_C.sum(),
        "approx_kl": k3(-bounded(inputs.log_ratio_C.detach()[known_C])).sum(),
    }
