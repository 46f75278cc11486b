"""Clipped policy-gradient losses as pure functions of tensors, with their statistics as sums that add up.

A token's loss is PPO's clipped surrogate (arXiv:1707.06347, with separate bounds as in DAPO, arXiv:2503.14476) and what
TERMS add to it; a variant in LOSSES says with which weight a token counts. The weights hold the *global* normaliser, so
losses and gradients of micro-batches and ranks add up to those of the whole minibatch. Dividing by local token counts
would not: it can even turn the sign.

What a loss or a term needs to be right it declares (`Needs`), and the trainer asks `needs_of` before it skips a row or
leaves out a gradient. A term that shall teach and comes without a gradient is an error, not a constant.

Without a correction (`correction.py`) the old logprobs are the sampler's own. That saves a forward pass, and the ratio
corrects the difference between sampler and trainer too; there is no further importance weight. With one they are the
trainer's before the step's first update, and the correction's weight multiplies the policy's term alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from grpo.algorithm.correction import CORRECTIONS, NONE, Bounds
from grpo.algorithm.inputs import LOG_RATIO_LIMIT, LossInputs, k3
from grpo.algorithm.mismatch import Mismatch, measure
from grpo.config import Algorithm


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be there for a loss or a term to be right."""

    reference: bool = False
    """Logprobs of the frozen reference model."""
    entropy_gradient: bool = False
    """The entropy with its gradient; without it is a statistic."""
    zero_advantage_rows: bool = False
    """Rows whose advantage is 0 have a gradient, so they must be forwarded."""

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.reference or other.reference,
            self.entropy_gradient or other.entropy_gradient,
            self.zero_advantage_rows or other.zero_advantage_rows,
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """A variant: the weight of each trained token in the sum, and what it needs."""

    weights: Callable[[LossInputs], torch.Tensor]
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True, slots=True)
class Term:
    """Something that is added to every token's loss, times a coefficient of the configuration; 0 leaves it out."""

    coefficient: Callable[[Algorithm], float]
    value: Callable[[LossInputs], torch.Tensor]
    needs: Needs
    statistic: str | None = None
    """Name under which its mean is reported; None: something else reports it."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """`loss` is a scalar with a gradient; the rest is detached. Add up the `sums`, then divide by `sums["tokens"]`."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    ratio_max: torch.Tensor
    """Largest ratio of a token, policy by sampler."""
    mismatch: Mismatch


def token_mean(inputs: LossInputs) -> torch.Tensor:
    """1 / N: each token of the minibatch counts the same (DAPO)."""
    return torch.full_like(inputs.logprobs_C, 1.0 / max(inputs.normaliser.tokens, 1))


def sequence_mean(inputs: LossInputs) -> torch.Tensor:
    """1 / (B * length): each sequence counts the same, its tokens share that (GRPO, arXiv:2402.03300)."""
    return 1.0 / (inputs.lengths_C * max(inputs.normaliser.sequences, 1))


def constant(inputs: LossInputs) -> torch.Tensor:
    """1 / (B * max_tokens): neither long nor short sequences are favoured (Dr. GRPO, arXiv:2503.20783)."""
    normaliser = inputs.normaliser
    return torch.full_like(inputs.logprobs_C, 1.0 / (max(normaliser.sequences, 1) * normaliser.max_tokens))


LOSSES: dict[str, Loss] = {"dapo": Loss(token_mean), "grpo": Loss(sequence_mean), "dr_grpo": Loss(constant)}
"""By the name in `algorithm.loss`."""


def reference_kl(inputs: LossInputs) -> torch.Tensor:
    """k3 estimate of KL(policy || reference) of each token."""
    assert inputs.reference_logprobs_C is not None, "the KL term needs the reference's logprobs"
    return k3(inputs.logprobs_C - inputs.reference_logprobs_C)


def entropy(inputs: LossInputs) -> torch.Tensor:
    """Entropy of the policy at each token."""
    assert inputs.entropy_C is not None, "the entropy bonus needs the entropy"
    return inputs.entropy_C


TERMS: tuple[Term, ...] = (
    Term(
        lambda algorithm: algorithm.kl_coef,
        reference_kl,
        Needs(reference=True, zero_advantage_rows=True),
        "kl_reference",
    ),
    Term(lambda algorithm: -algorithm.entropy_coef, entropy, Needs(entropy_gradient=True, zero_advantage_rows=True)),
)
"""In the order in which they are added."""


def active_terms(algorithm: Algorithm) -> Iterator[Term]:
    """Those with a coefficient that is not 0."""
    return (term for term in TERMS if term.coefficient(algorithm) != 0.0)


def needs_of(algorithm: Algorithm) -> Needs:
    """What the configured loss and its terms need."""
    needs = LOSSES[algorithm.loss].needs
    for term in active_terms(algorithm):
        needs |= term.needs
    return needs


def statistics_of(algorithm: Algorithm) -> list[str]:
    """Names of the `sums` that every output of the configured loss has."""
    names = ["tokens", "clip_low", "clip_high", "approx_kl", "entropy"]
    return names + [term.statistic for term in active_terms(algorithm) if term.statistic]


def policy_loss(inputs: LossInputs, algorithm: Algorithm, bounds: Bounds = NONE) -> LossOutput:
    """sum_C weight * (-w * min(r A, clip(r, 1 - low, 1 + high) A) + terms), with r = exp(logprob - old logprob).

    `bounds` are those of the correction, whose weight is w; without one, w is 1 and the old logprobs are the sampler's.
    Unknown rollout logprobs stay out of the statistics. All in nats.
    """
    known_C, logprobs_C, advantages_C = inputs.known_C, inputs.logprobs_C, inputs.advantages_C
    behaviour_C = torch.where(known_C, inputs.rollout_logprobs_C, logprobs_C.detach())
    correction = CORRECTIONS.get(bounds.name)
    old_C = inputs.trainer_C if correction else behaviour_C
    log_ratio_C = (logprobs_C - old_C).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_C = log_ratio_C.exp()
    clipped_C = ratio_C.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    token_loss_C = -torch.minimum(ratio_C * advantages_C, clipped_C * advantages_C)
    weights_C = correction.weights(inputs, bounds) if correction else None
    if weights_C is not None:
        token_loss_C = weights_C * token_loss_C
    sums = _statistics(log_ratio_C.detach(), inputs, algorithm)
    if inputs.entropy_C is not None:
        sums["entropy"] = inputs.entropy_C.detach()[known_C].sum()
    for term in active_terms(algorithm):
        value_C = attached(term, inputs)
        token_loss_C = token_loss_C + term.coefficient(algorithm) * value_C
        if term.statistic:
            sums[term.statistic] = value_C.detach()[known_C].sum()
    loss = (LOSSES[algorithm.loss].weights(inputs) * token_loss_C).sum()
    moved_C = (logprobs_C.detach() - behaviour_C).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    ratio_max = torch.where(known_C, moved_C, 0.0).max()
    return LossOutput(loss, sums, ratio_max, measure(inputs, bounds, weights_C))


def attached(term: Term, inputs: LossInputs) -> torch.Tensor:
    """A term's value. Raises AssertionError if it would be a constant while the logprobs have a gradient."""
    value_C = term.value(inputs)
    if inputs.logprobs_C.requires_grad and not value_C.requires_grad:
        raise AssertionError(
            f"a term of the loss must have a gradient, but that of {term.value.__name__} is detached and would teach "
            "nothing; declare in its Needs what it needs and compute it from inputs that carry a gradient"
        )
    return value_C


def _statistics(log_ratio_C: torch.Tensor, inputs: LossInputs, algorithm: Algorithm) -> dict[str, torch.Tensor]:
    """Sums over tokens with a known sampler: how many, how many lost their gradient to a bound, how far they moved."""
    known_C = inputs.known_C
    log_ratio_C, advantages_C = log_ratio_C[known_C], inputs.advantages_C[known_C]
    ratio_C = log_ratio_C.exp()
    return {
        "tokens": known_C.sum(),
        "clip_low": ((ratio_C < 1.0 - algorithm.clip_low) & (advantages_C < 0)).sum(),
        "clip_high": ((ratio_C > 1.0 + algorithm.clip_high) & (advantages_C > 0)).sum(),
        "approx_kl": k3(-log_ratio_C).sum(),
    }
