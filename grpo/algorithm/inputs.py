"""What losses, corrections and statistics see of a micro-batch."""

from dataclasses import dataclass

import torch

LOG_RATIO_LIMIT = 20.0
"""exp() of more than this is no ratio but an accident."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Size of the global minibatch: trained tokens and sequences of all ranks, the skipped ones included.

    A sequence without a trained token is none: masking it must not make the others count for less.

    `max_tokens` is the longest completion that could have been sampled; `prompts` are those of the sequences.
    """

    tokens: int
    sequences: int
    max_tokens: int
    prompts: int = 0


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What a loss sees of R rows with C trained tokens. Logprobs and entropy in nats.

    `logprobs_C` carry the gradient, and `entropy_C` too where that was asked for. A rollout logprob that is NaN
    (engines can return it) is not known: its ratio is 1. `rows_C` is the row of each token, `lengths_R` its number of
    trained tokens. `start_logprobs_C` are the trainer's own before the step's first update; None: `logprobs_C` are.
    `prompt_tokens_R` are the trained tokens of all rows of the row's prompt in the global minibatch.
    """

    logprobs_C: torch.Tensor
    rollout_logprobs_C: torch.Tensor
    advantages_C: torch.Tensor
    rows_C: torch.Tensor
    lengths_R: torch.Tensor
    normaliser: Normaliser
    entropy_C: torch.Tensor | None = None
    reference_logprobs_C: torch.Tensor | None = None
    start_logprobs_C: torch.Tensor | None = None
    prompt_tokens_R: torch.Tensor | None = None
    kl_coef: float | None = None
    """That of a controller; None: the configuration's."""
    corrected: bool = False
    """Whether a correction weighs what lies between sampler and trainer, so that the ratio is by the trainer's own."""
    far: float = float("inf")
    """Difference of trainer and sampler, in nats, above which a token counts as far off."""

    @property
    def lengths_C(self) -> torch.Tensor:
        """Trained tokens of each token's row, in the logprobs' dtype."""
        return self.lengths_R[self.rows_C].to(self.logprobs_C.dtype)

    @property
    def behaviour_C(self) -> torch.Tensor:
        """The sampler's logprobs; where they are unknown the policy's own, without a gradient."""
        return torch.where(self.known_C, self.rollout_logprobs_C, self.logprobs_C.detach())

    @property
    def log_ratio_C(self) -> torch.Tensor:
        """log of the ratio that losses bound: policy / trainer's own before the step if corrected, else / sampler."""
        return self.logprobs_C - (self.trainer_C if self.corrected else self.behaviour_C)

    @property
    def known_C(self) -> torch.Tensor:
        """Where the sampler's logprob is a number."""
        return ~self.rollout_logprobs_C.isnan()

    @property
    def trainer_C(self) -> torch.Tensor:
        """The trainer's logprobs before the step's first update, without a gradient."""
        return self.logprobs_C.detach() if self.start_logprobs_C is None else self.start_logprobs_C

    @property
    def log_weights_C(self) -> torch.Tensor:
        """log of w = trainer (before the step's first update) / sampler; 0 where the sampler's logprob is unknown."""
        log_weights_C = self.trainer_C - self.rollout_logprobs_C
        return torch.where(self.known_C, log_weights_C, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def sum_R(self, values_C: torch.Tensor) -> torch.Tensor:
        """Sums over the trained tokens of each row. A row is never split, so they are whole."""
        sums_R = torch.zeros(len(self.lengths_R), dtype=values_C.dtype, device=values_C.device)
        return sums_R.index_add(0, self.rows_C, values_C)

    def mean_R(self, values_C: torch.Tensor) -> torch.Tensor:
        """Means over the trained tokens of each row."""
        return self.sum_R(values_C) / self.lengths_R.clamp(min=1).to(values_C.dtype)


def bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    """A log-ratio whose exp() is a ratio."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def k3(log_ratio_C: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per token of p's samples, from x = log p - log q: e^-x - 1 + x, never negative and unbiased.

    Source: http://joschu.net/blog/kl-approx.html
    """
    limited_C = bounded(log_ratio_C)
    return torch.expm1(-limited_C) + limited_C  # e^-x - 1 would lose the digits of a small divergence
