"""Sizes of a minibatch, and losses of its micro-batches that add up by them: values worked out by hand."""

from dataclasses import replace

import pytest
import torch

from grpo.algorithm.loss import policy_loss
from grpo.config import Algorithm
from grpo.trainer.packing import pack, plan_minibatches, row_tokens
from grpo.trainer.window import LossWindow
from grpo.types import Sample


def row(prompt: str, index: int, tokens: int, advantage: float, **more: object) -> Sample:
    output = tuple(range(1, tokens + 1))
    logprobs = (-1.0,) * tokens
    return Sample(prompt, index, (1, 2), output, logprobs, ((0, 0),), "stop", "", 0.0, advantage, **more)


ROWS = [
    row("a", 0, 3, 1.0),
    row("a", 1, 1, -1.0),
    row("a", 2, 5, 4.0, masked=True),
    row("b", 0, 4, 2.0, trained=(True, False, False, True)),
    row("c", 0, 6, 3.0, masked=True),
    row("c", 1, 2, 3.0, trained=(False, False)),
    row("b", 1, 2, 0.0),
]
SKIPPED = [2, 4, 5]
# Tokens 3, 1, 2, 2 with advantages 1, -1, 2, 0: on-policy the loss is minus their mean.
LOSSES = {
    "token_mean": -(3 - 1 + 4) / 8,
    "sequence_mean": -(1 - 1 + 2) / 4,
    "prompt_mean": -((3 - 1) / 4 + 4 / 4) / 2,
    "sequence_sum": -(3 - 1 + 4) / 4,
    "constant": -(3 - 1 + 4) / (4 * 16),
}


def test_sizes_are_of_what_is_trained():
    window = LossWindow(ROWS, max_tokens=16, kl_coef=0.1, far=2.0)
    normaliser = window.normaliser
    assert (normaliser.tokens, normaliser.sequences, normaliser.prompts, normaliser.max_tokens) == (8, 4, 2, 16)
    assert dict(window.prompt_tokens) == {"a": 4, "b": 4}


def test_rows_without_advantage_count_and_an_empty_minibatch_has_no_size():
    none = LossWindow([ROWS[place] for place in SKIPPED], 16, 0.0, 1.0).normaliser
    assert (none.tokens, none.sequences, none.prompts) == (0, 0, 0)
    assert LossWindow(ROWS[-1:], 16, 0.0, 1.0).normaliser.tokens == 2


def loss_of(window: LossWindow, rows: list[Sample], algorithm: Algorithm) -> float:
    packed = pack(rows)
    logprobs_C = packed.rollout_logprobs_C.clone().requires_grad_()
    inputs = window.inputs(rows, packed, logprobs_C, torch.zeros_like(logprobs_C), reference_C=logprobs_C.detach() - 1)
    assert (inputs.kl_coef, inputs.far) == (window.kl_coef, window.far)
    return policy_loss(inputs, algorithm).loss.item()


@pytest.mark.parametrize("aggregation", LOSSES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_of_all_ranks_add_up_to_the_whole(aggregation, ranks):
    """The mean of ranks, times their number, as the optimizer's reduction has it."""
    algorithm = Algorithm(aggregation=aggregation)
    (minibatch,) = plan_minibatches(
        [row_tokens(sample) for sample in ROWS], ranks=ranks, minibatches=1, token_budget=7, seed="0", skip=SKIPPED
    )
    window = LossWindow([ROWS[place] for place in minibatch.rows], 16, 0.0, 1.0)
    parts = [rows for mine in minibatch.micro_batches for rows in mine if rows]
    assert sorted(place for rows in parts for place in rows) == [0, 1, 3, 6]
    losses = [loss_of(window, [ROWS[place] for place in rows], algorithm) for rows in parts]
    assert len(losses) > 1 and sum(losses) == pytest.approx(LOSSES[aggregation])


def test_the_controllers_coefficient_weighs_the_kl():
    """x = 1 in all tokens: k2 is 1/2, times 0.3 and not the configured 0.1."""
    algorithm = Algorithm(kl="k2", kl_coef=0.1, kl_target=0.5)
    rows = [replace(ROWS[0], advantage=0.0)]
    assert loss_of(LossWindow(rows, 16, 0.3, 1.0), rows, algorithm) == pytest.approx(0.15)
    assert loss_of(LossWindow(rows, 16, 0.1, 1.0), rows, algorithm) == pytest.approx(0.05)
