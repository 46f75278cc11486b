"""The head of GPUs, on the CPU: against autograd through all logits, and against the head of the CPU."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.trainer import fused_head
from grpo.trainer.fused_head import PLAIN, compiled_kernels, fused_logprobs
from grpo.trainer.head import LogprobHead
from grpo.trainer.shaping import Shaping

SHAPINGS = [Shaping(), Shaping(0.25), Shaping(3.0, 2.0)]
ALL = 1 << 40


def inputs(dtype, count=8, biased=True, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, 5), (vocabulary, 5), *[(vocabulary,)] * biased]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return [*made, *[None] * (not biased)], torch.randint(vocabulary, (count,), generator=generator)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_gradients_are_those_of_finite_differences(shaping, temperature, entropy_gradient, monkeypatch):
    """In float64, in chunks of 3 positions."""
    monkeypatch.setattr(fused_head, "CHUNK", 3)
    tensors, targets_C = inputs(torch.float64)

    def outputs(*given):
        made = fused_logprobs(*given, targets_C, temperature, entropy_gradient, shaping, PLAIN, ALL)
        return made if entropy_gradient else made[0]

    assert torch.autograd.gradcheck(outputs, tensors)


@pytest.mark.parametrize("room", [0, ALL], ids=["made again", "kept"])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_it_is_the_head_of_the_cpu(dtype, off, shaping, biased, count, room, monkeypatch):
    """Values and both gradients, also where a last chunk would have one position; a second backward pass too."""
    monkeypatch.setattr(fused_head, "CHUNK", 3)
    tensors, targets_C = inputs(dtype, count, biased)
    linear = torch.nn.Linear(5, 11, bias=biased)
    linear.weight = torch.nn.Parameter(tensors[1].detach())
    linear.bias = torch.nn.Parameter(tensors[2].detach()) if biased else None
    plain = LogprobHead(linear, shaping)
    expected = plain(tensors[0], targets_C, 0.7, True)
    found = fused_logprobs(*tensors, targets_C, 0.7, True, shaping, PLAIN, room)
    assert all(each.dtype == torch.float32 for each in found)
    torch.testing.assert_close(found, expected, atol=off, rtol=off)
    weights = torch.randn(2, count, generator=torch.Generator().manual_seed(1))
    leaves = [plain.weight, *[plain.bias] * biased]
    slopes = torch.autograd.grad((torch.stack(expected) * weights).sum(), [tensors[0], *leaves])
    total = (torch.stack(found) * weights).sum()
    for last in (False, True):
        ours = torch.autograd.grad(total, tensors[: 2 + biased], retain_graph=not last)
        for left, right in zip(ours, slopes, strict=True):
            assert left.dtype == dtype
            torch.testing.assert_close(left, right, atol=off * float(right.abs().max()), rtol=0)


class Widest(TorchDispatchMode):
    """The most numbers of one float32 tensor that was made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        wide = [t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.dtype == torch.float32]
        self.most = max([self.most, *wide])
        return made


@pytest.mark.parametrize("room", [0, ALL], ids=["made again", "kept"])
def test_no_logits_in_float32_are_ever_whole(room, monkeypatch):
    monkeypatch.setattr(fused_head, "CHUNK", 4)
    tensors, targets_C = inputs(torch.bfloat16, count=64, vocabulary=50)
    with Widest() as widest:
        logprobs_C, entropy_C = fused_logprobs(*tensors, targets_C, 0.7, True, Shaping(), PLAIN, room)
        (logprobs_C + entropy_C).sum().backward()
    assert widest.most == max(4 * 50, 50 * 5 if room == 0 else 0)  # one chunk's; the gradient of the weight


def test_the_head_of_a_policy_takes_it_where_it_is_told():
    linear = torch.nn.Linear(5, 11)
    head = LogprobHead(linear, Shaping())
    tensors, targets_C = inputs(torch.float32)
    plain = head(tensors[0], targets_C, 0.7)
    head.fused = True
    fused = head(tensors[0], targets_C, 0.7)
    assert "_Fused" in type(fused[0].grad_fn).__name__ and "_Fused" not in type(plain[0].grad_fn).__name__
    assert not fused[1].requires_grad
    torch.testing.assert_close(fused, plain)


@pytest.mark.slow
def test_compiled_kernels_compute_the_same_and_are_compiled_once(monkeypatch):
    """For all numbers of positions and temperatures."""
    monkeypatch.setattr(fused_head, "CHUNK", 16)
    torch._dynamo.reset()
    counters.clear()
    kernels = compiled_kernels("aot_eager")
    graphs = []
    for count, temperature in [(40, 0.7), (9, 0.7), (1, 0.7), (2, 1.3), (17, 1.0), (33, 0.7), (64, 1.0), (5, 0.9)]:
        for room in (0, ALL):
            tensors, targets_C = inputs(torch.bfloat16, count)
            slopes = []
            for each in (PLAIN, kernels):
                made = fused_logprobs(*tensors, targets_C, temperature, True, Shaping(0.5), each, room)
                slopes.append((*made, *torch.autograd.grad(torch.stack(made).sum(), tensors)))
            torch.testing.assert_close(*slopes, atol=0.02, rtol=0.02)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 8
