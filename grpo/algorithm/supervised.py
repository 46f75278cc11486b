"""The loss of a supervised warm-up: the negative log-likelihood of the completions.

The mean is over the completion's tokens of the whole step, so micro-batches and ranks add up to it (`Normaliser`).
"""

import torch

from grpo.algorithm.inputs import LossInputs
from grpo.algorithm.loss import LossOutput
from grpo.algorithm.mismatch import Mismatch

STATISTICS = ("tokens", "entropy")


def supervised_loss(inputs: LossInputs) -> LossOutput:
    """-1 / N times the sum of the tokens' logprobs, N being those of the whole step."""
    logprobs_C = inputs.logprobs_C
    assert inputs.entropy_C is not None, "the head gives it with every logprob"
    sums = {"tokens": torch.ones_like(logprobs_C).sum(), "entropy": inputs.entropy_C.detach().sum()}
    ratio_max = logprobs_C.new_zeros(())  # there is no sampler to compare with
    loss = -logprobs_C.sum() / max(inputs.normaliser.tokens, 1)
    return LossOutput(loss, sums, ratio_max, Mismatch.none(logprobs_C.device))
