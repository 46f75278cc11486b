"""Packed tokens to whole rows and back: what a gather of autograd's gives, in values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.trainer.expansion import Expansion
from grpo.trainer.packing import pack
from tests.models import random_samples


@settings(max_examples=30)
@given(count=st.integers(1, 12), seed=st.integers(0, 1000))
def test_both_ways_with_gradients(count, seed):
    batch = pack(random_samples(count, seed))
    expansion = Expansion(batch)
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(len(batch.input_ids_T), 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rows, expected = expansion.expand(packed), packed[batch.expand_E]
    assert torch.equal(rows, expected)
    weights = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    slopes = [torch.autograd.grad((each * weights).sum(), packed)[0] for each in (rows, expected)]
    torch.testing.assert_close(*slopes)
    states = weights.requires_grad_()
    chosen, expected = expansion.select(states), states[batch.select_T]
    assert torch.equal(chosen, expected)
    slopes = [torch.autograd.grad((each * packed.detach()).sum(), states)[0] for each in (chosen, expected)]
    assert torch.equal(*slopes)


def test_rows_without_a_prompt_in_common_are_not_copied():
    batch = pack(random_samples(2))
    states = torch.randn(len(batch.input_ids_T), 2)
    expansion = Expansion(batch)
    assert expansion.expand(states) is states and expansion.select(states) is states
    assert torch.equal(batch.expand_E, torch.arange(len(states))) and torch.equal(batch.select_T, batch.expand_E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prompts_gradient_is_summed_in_float32(dtype):
    """Of three rows: 256 + 1 + 1 is lost where each sum is rounded to bfloat16."""
    shared, *_ = random_samples(3)
    batch = pack([shared] * 3)
    packed = torch.zeros(len(batch.input_ids_T), 1, dtype=dtype, requires_grad=True)
    rows = Expansion(batch).expand(packed)
    length = len(rows) // 3
    weights = torch.tensor([256.0, 1.0, 1.0], dtype=dtype).repeat_interleave(length)[:, None]
    (rows * weights).sum().backward()
    assert packed.grad[0] == 258
