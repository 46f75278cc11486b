"""How the tokens' losses add up: the weight of each token in the sum.

The weights hold the size of the *global* minibatch (`Normaliser`), so losses and gradients of micro-batches and ranks
add up to those of the whole. Dividing by local token counts would not: it can even turn the sign.
"""

from collections.abc import Callable

import torch

from grpo.algorithm.inputs import LossInputs


def token_mean(inputs: LossInputs) -> torch.Tensor:
    """1 / N: each token of the minibatch counts the same (DAPO, arXiv:2503.14476)."""
    return torch.full_like(inputs.logprobs_C, 1.0 / max(inputs.normaliser.tokens, 1))


def sequence_mean(inputs: LossInputs) -> torch.Tensor:
    """1 / (B * length): each sequence counts the same, its tokens share that (GRPO, arXiv:2402.03300)."""
    return 1.0 / (inputs.lengths_C * max(inputs.normaliser.sequences, 1))


def prompt_mean(inputs: LossInputs) -> torch.Tensor:
    """1 / (P * tokens of the prompt): each prompt counts the same, all its tokens share that (ScaleRL,
    arXiv:2510.13786).
    """
    assert inputs.prompt_tokens_R is not None, "the mean over prompts needs the tokens of each prompt"
    tokens_C = inputs.prompt_tokens_R[inputs.rows_C].to(inputs.logprobs_C.dtype)
    return 1.0 / (tokens_C * max(inputs.normaliser.prompts, 1))


def sequence_sum(inputs: LossInputs) -> torch.Tensor:
    """1 / B: each sequence counts by its length (LUSPO, arXiv:2602.05261, and TRL's `luspo`)."""
    return torch.full_like(inputs.logprobs_C, 1.0 / max(inputs.normaliser.sequences, 1))


def constant(inputs: LossInputs) -> torch.Tensor:
    """1 / (B * max_tokens): neither long nor short sequences are favoured (Dr. GRPO, arXiv:2503.20783)."""
    normaliser = inputs.normaliser
    return torch.full_like(inputs.logprobs_C, 1.0 / (max(normaliser.sequences, 1) * normaliser.max_tokens))


AGGREGATIONS: dict[str, Callable[[LossInputs], torch.Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "prompt_mean": prompt_mean,
    "sequence_sum": sequence_sum,
    "constant": constant,
}
"""By the name in `algorithm.aggregation`."""
