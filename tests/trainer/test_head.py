"""Logits in float32 from weights of another precision, on the CPU and by the head of GPUs."""

import pytest
import torch
from torch.nn import functional as F

from grpo.trainer.head import LogprobHead
from grpo.trainer.model import make_policy
from grpo.trainer.packing import pack
from grpo.trainer.shaping import Shaping
from tests.models import random_samples, tiny_model

TEMPERATURE = 0.7


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_the_softmax_of_widened_hidden_states_and_weights(fused):
    """Value and gradients; without it bf16 logits of some size are a hundredth off."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 101, dtype=torch.bfloat16)
    hidden_CD = (3 * torch.randn(9, 64, generator=generator)).bfloat16().requires_grad_()
    targets_C = torch.randint(101, (9,), generator=generator)
    weight, bias = (each.detach().float().requires_grad_() for each in (linear.weight, linear.bias))
    wide = hidden_CD.detach().float().requires_grad_()
    expected = F.log_softmax(F.linear(wide, weight, bias) / TEMPERATURE, 1).gather(1, targets_C[:, None])[:, 0]
    slopes = torch.autograd.grad(expected.sum(), [wide, weight, bias])
    off = {}
    for fp32 in (False, True):
        head = LogprobHead(linear, Shaping(), fp32)
        head.fused = fused
        found, _ = head(hidden_CD, targets_C, TEMPERATURE)
        assert found.dtype == torch.float32
        off[fp32] = (found - expected).abs().max().item()
        if fp32:
            gradients = torch.autograd.grad(found.sum(), [hidden_CD, head.weight, head.bias])
            assert [each.dtype for each in gradients] == [torch.bfloat16] * 3, "as the weights are"
            for gradient, slope in zip(gradients, slopes, strict=True):
                torch.testing.assert_close(gradient.float(), slope, rtol=0.01, atol=1e-3)
    assert off[True] < 1e-5 < 1e-3 < off[False]


@pytest.mark.parametrize("tied", [True, False])
def test_a_bf16_policys_logprobs_are_nearer_to_those_of_float32(tied):
    """Of the same weights, widened as a whole; the layers below round in both."""
    rows = pack(random_samples(300))
    truth = tiny_model(tied=tied).bfloat16()
    with torch.no_grad():
        exact, _ = make_policy(truth.float(), TEMPERATURE)(rows)
        off = []
        for fp32 in (True, False):
            logprobs_C, _ = make_policy(tiny_model(tied=tied).bfloat16(), TEMPERATURE, fp32_head=fp32)(rows)
            off.append((logprobs_C - exact).abs().mean().item())
    assert off[0] < off[1], off


def test_a_float32_policy_does_not_change():
    rows = pack(random_samples(6))
    with torch.no_grad():
        values = [make_policy(tiny_model(), TEMPERATURE, fp32_head=fp32)(rows)[0] for fp32 in (True, False)]
    assert torch.equal(*values)
