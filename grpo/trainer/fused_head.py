"""The head on GPUs: logprobs, entropies and their gradients without fp32 logits in memory.

What happens to logits between the matrix products is one function in each direction, which torch.compile makes one
kernel. Logits in bfloat16 that fit are kept, and their gradient takes their place: no product is made twice, and each
gradient comes out of one product. Else one chunk's exist at a time, and the backward pass makes them again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from grpo.trainer.shaping import Shaping

CHUNK = 1024
"""Positions that one call of a kernel takes."""
KEPT_SHARE = 16
"""Logits of up to one part in so many of a GPU's memory are kept for the backward pass."""


def score(
    logits_cV: torch.Tensor, targets_c: torch.Tensor, temperature: float, shaping: Shaping
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each position: the target's logprob, the entropy, and the logarithm of the softmax's sum."""
    scaled_cV = shaping(_wide(logits_cV)) / temperature
    total_c = scaled_cV.logsumexp(1)
    entropy_c = total_c - ((scaled_cV - total_c[:, None]).exp() * scaled_cV).sum(1)
    return scaled_cV.gather(1, targets_c[:, None])[:, 0] - total_c, entropy_c, total_c


def to_gradient(
    logits_cV: torch.Tensor,
    targets_c: torch.Tensor,
    total_c: torch.Tensor,
    entropy_c: torch.Tensor,
    grad_c: torch.Tensor,
    grad_entropy_c: torch.Tensor | None,
    temperature: float,
    shaping: Shaping,
) -> None:
    """Puts the logits' gradient in their place; `total_c` and `entropy_c` are what `score` found.

    With p = softmax(logits / t) and H its entropy: d logprob / d logits = (onehot(target) - p) / t and
    d H / d logits = -p (log p + H) / t.
    """
    shaped_cV = shaping(_wide(logits_cV))
    log_probs_cV = shaped_cV / temperature - total_c[:, None]
    slope_cV = grad_c[:, None]
    if grad_entropy_c is not None:
        slope_cV = slope_cV + (log_probs_cV + entropy_c[:, None]) * grad_entropy_c[:, None]
    hit_cV = torch.arange(logits_cV.shape[1], device=logits_cV.device) == targets_c[:, None]
    grad_cV = torch.where(hit_cV, grad_c[:, None], 0.0) - log_probs_cV.exp() * slope_cV
    logits_cV.copy_(shaping.backward(grad_cV / temperature, shaped_cV))


@dataclass(frozen=True, slots=True)
class Kernels:
    """What is done to logits, in each direction."""

    score: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = score
    to_gradient: Callable[..., None] = to_gradient


PLAIN = Kernels()


def compiled_kernels(backend: str) -> Kernels:
    """Each as one kernel, for any number of positions."""
    return Kernels(
        torch.compile(score, backend=backend, dynamic=True), torch.compile(to_gradient, backend=backend, dynamic=True)
    )


def room_for_logits(device: torch.device) -> int:
    """Bytes of logits that may stay until the backward pass."""
    return torch.cuda.get_device_properties(device).total_memory // KEPT_SHARE if device.type == "cuda" else 2**30


def fused_logprobs(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_C: torch.Tensor,
    temperature: float,
    entropy_gradient: bool,
    shaping: Shaping,
    kernels: Kernels,
    room: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 `(logprobs_C, entropy_C)` of `targets_C` under softmax(logits / temperature).

    `room`: bytes of logits that may be kept.
    """
    size = len(targets_C) * len(weight_VD) * weight_VD.element_size()
    keep = weight_VD.element_size() == 2 and size <= room
    few = len(targets_C) < 2  # a shape that would be compiled by itself
    apply: Any = _Fused.apply
    settings = temperature, entropy_gradient, shaping, PLAIN if few else kernels, keep
    logprobs_C, entropy_C = apply(hidden_CD, weight_VD, bias_V, targets_C, *settings)
    return logprobs_C, entropy_C


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_CD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_C: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
        shaping: Shaping,
        kernels: Kernels,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature, ctx.entropy_gradient, ctx.shaping, ctx.kernels = (
            temperature,
            entropy_gradient,
            shaping,
            kernels,
        )
        ctx.logits_CV = F.linear(hidden_CD, weight_VD, bias_V) if keep else None
        found = []
        for hidden_cD, logits_cV, targets_c in _parts(len(targets_C), hidden_CD, ctx.logits_CV, targets_C):
            logits = F.linear(hidden_cD, weight_VD, bias_V) if logits_cV is None else logits_cV
            found.append(kernels.score(logits, targets_c, temperature, shaping))
        logprobs_C, entropy_C, total_C = map(torch.cat, zip(*found, strict=True))
        ctx.save_for_backward(hidden_CD, weight_VD, bias_V, targets_C, total_C, entropy_C)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_C)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(ctx: Any, grad_C: torch.Tensor, grad_entropy_C: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_CD, weight_VD, bias_V, targets_C, total_C, entropy_C = ctx.saved_tensors
        logits_CV, ctx.logits_CV = ctx.logits_CV, None
        settings = ctx.temperature, ctx.shaping
        grad_hidden_CD = torch.empty_like(hidden_CD)
        wide = torch.promote_types(weight_VD.dtype, torch.float32)  # many chunks add up
        trained = ctx.needs_input_grad[1]
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if trained and logits_CV is None else None
        trained_bias = bias_V is not None and ctx.needs_input_grad[2]
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if trained_bias else None
        # Contiguous: that of a sum has strides of 0, for which a kernel would be compiled again.
        grads = grad_C.contiguous(), grad_entropy_C.contiguous() if ctx.entropy_gradient else None
        tensors = targets_C, total_C, entropy_C, *grads
        parts = _parts(len(targets_C), hidden_CD, grad_hidden_CD, logits_CV, *tensors)
        for hidden_cD, grad_hidden_cD, logits_cV, *others in parts:
            grad_logits = F.linear(hidden_cD, weight_VD, bias_V) if logits_cV is None else logits_cV
            ctx.kernels.to_gradient(grad_logits, *others, *settings)
            if grad_bias_V is not None:
                grad_bias_V += grad_logits.sum(0, dtype=wide)
            if logits_CV is None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden_cD)
            if grad_weight_VD is not None:
                grad_weight_VD += grad_logits.T @ hidden_cD
        grad_bias = None if bias_V is None or grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        if logits_CV is not None:  # what was kept holds the gradient now
            torch.mm(logits_CV, weight_VD, out=grad_hidden_CD)
            grad_weight_VD = logits_CV.T @ hidden_CD if trained else None
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_CD, grad_weight, grad_bias, None, None, None, None, None, None


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _parts(count: int, *tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Even views of at most CHUNK positions of every tensor: no last one of a single position."""
    parts = max(1, -(-count // CHUNK))
    return zip(*([None] * parts if t is None else t.tensor_split(parts) for t in tensors), strict=True)
