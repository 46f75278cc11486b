"""The supervised loss: known numbers, and parts that add up to the whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.algorithm.inputs import LossInputs, Normaliser
from grpo.algorithm.objective import SUPERVISED, policy_objective
from grpo.algorithm.supervised import STATISTICS, supervised_loss
from grpo.config import Config


def inputs(logprobs: list[float], tokens: int) -> LossInputs:
    logprobs_C = torch.tensor(logprobs, requires_grad=True)
    zeros = torch.zeros(len(logprobs))
    lengths_R = torch.tensor([len(logprobs)])
    rows_C = torch.zeros(len(logprobs), dtype=torch.int64)
    unknown = torch.full_like(zeros, math.nan)
    return LossInputs(logprobs_C, unknown, zeros + 1, rows_C, lengths_R, Normaliser(tokens, 1, 8), entropy_C=zeros + 2)


def test_known_numbers() -> None:
    given_ = inputs([-1.0, -2.0, -6.0], tokens=4)
    output = supervised_loss(given_)
    assert output.loss.item() == pytest.approx(2.25)
    assert set(output.sums) == set(STATISTICS)
    assert (output.sums["tokens"].item(), output.sums["entropy"].item()) == (3.0, 6.0)
    assert output.mismatch.sums.sum() == 0
    output.loss.backward()
    assert given_.logprobs_C.grad is not None and given_.logprobs_C.grad.tolist() == [-0.25] * 3


@given(logprobs=st.lists(st.floats(-30, 0, width=32), min_size=2, max_size=20), cut=st.integers(1, 19))
def test_parts_add_up(logprobs: list[float], cut: int) -> None:
    cut = min(cut, len(logprobs) - 1)
    whole = supervised_loss(inputs(logprobs, len(logprobs))).loss.item()
    parts = [supervised_loss(inputs(part, len(logprobs))).loss.item() for part in (logprobs[:cut], logprobs[cut:])]
    assert whole == pytest.approx(sum(parts), rel=1e-5, abs=1e-5)


def test_the_objectives_say_what_they_need() -> None:
    config = Config.model_validate({"model": {"path": "x"}, "algorithm": {"kl_coef": 0.1, "correction": "tis"}})
    policy = policy_objective(config)
    assert (policy.sampled, policy.corrected, policy.needs.reference) == (True, True, True)
    assert policy.statistics[0] == SUPERVISED.statistics[0] == "tokens"
    assert (SUPERVISED.sampled, SUPERVISED.corrected, SUPERVISED.needs.reference) == (False, False, False)
