"""The output head: logprobs of given tokens without the T x V logits.

On a CPU it runs in chunks, in a function that recomputes the logits in the backward pass; on a GPU by `fused_head.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from grpo.trainer.fused_head import PLAIN, Kernels, fused_logprobs, room_for_logits
from grpo.trainer.shaping import Shaping

CHUNK = 1024
"""Completion positions whose logits exist at once."""


class LogprobHead(nn.Linear):
    """lm_head that returns logprobs of given tokens, not logits. It shares the weights of the layer it replaces."""

    def __init__(self, linear: nn.Linear, shaping: Shaping, fp32: bool = False) -> None:
        """`fp32`: the logits are made in float32, whatever the precision of hidden states and weights."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.shaping = linear.weight, linear.bias, shaping
        self.kernels: Kernels = PLAIN
        self.fp32 = fp32
        self.fused = False
        """Whether the fused head is used off GPUs too."""

    def forward(  # type: ignore[override]
        self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, temperature: float, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 `(logprobs_C, entropy_C)` of `targets_C` under softmax(logits / temperature)."""
        weight_VD: torch.Tensor = self.weight
        bias_V: torch.Tensor | None = self.bias
        if self.fp32:
            hidden_CD, weight_VD = hidden_CD.float(), weight_VD.float()
            bias_V = None if bias_V is None else bias_V.float()
        product = hidden_CD, weight_VD, bias_V
        if hidden_CD.is_cuda or self.fused:
            scored = targets_C, temperature, entropy_gradient
            room = room_for_logits(hidden_CD.device) if torch.is_grad_enabled() else 0
            return fused_logprobs(*product, *scored, self.shaping, self.kernels, room)
        apply: Any = _Logprobs.apply
        logprobs_C, entropy_C = apply(*product, targets_C, temperature, entropy_gradient, self.shaping)
        return logprobs_C, entropy_C


class _Logprobs(torch.autograd.Function):
    """Log-softmax at the targets, chunk by chunk: one chunk's fp32 logits exist at a time, in both directions.

    With p = softmax(logits / t) and H its entropy: d logprob[c] / d logits[c] = (onehot(target) - p) / t and
    d H[c] / d logits[c] = -p (log p + H) / t.
    """

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature, ctx.entropy_gradient, ctx.shaping = temperature, entropy_gradient, shaping
        logprobs, entropies = [], []
        for hidden, targets in _chunks(hidden_CD, targets_C):
            log_probs_cV = _log_softmax(shaping(_logits(hidden, weight_VD, bias_V)), temperature)
            logprobs.append(log_probs_cV.gather(1, targets[:, None])[:, 0])
            entropies.append(-(log_probs_cV.exp() * log_probs_cV).sum(1))
        entropy_C = torch.cat(entropies)
        ctx.save_for_backward(hidden_CD, weight_VD, bias_V, targets_C, entropy_C)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_C)
        return torch.cat(logprobs), entropy_C

    @staticmethod
    def backward(ctx: Any, grad_C: torch.Tensor, grad_entropy_C: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_CD, weight_VD, bias_V, targets_C, entropy_C = ctx.saved_tensors
        grad_hidden_CD = torch.empty_like(hidden_CD)
        # fp32 whatever the weight's precision: many chunks add up here
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        trained_bias = bias_V is not None and ctx.needs_input_grad[2]
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if trained_bias else None
        entropies_CC = (entropy_C, grad_entropy_C) if ctx.entropy_gradient else (grad_C, grad_C)
        tensors = _chunks(hidden_CD, grad_hidden_CD, targets_C, grad_C, *entropies_CC)
        for hidden, grad_hidden, targets, grad, entropy, grad_entropy in tensors:
            shaped_cV = ctx.shaping(_logits(hidden, weight_VD, bias_V))
            log_probs_cV = _log_softmax(shaped_cV, ctx.temperature)
            bonus_cV = None
            if ctx.entropy_gradient:
                bonus_cV = (log_probs_cV + entropy[:, None]).mul_(log_probs_cV.exp()).mul_(-grad_entropy[:, None])
            grad_logits_cV = log_probs_cV.exp_().mul_(-grad[:, None])
            grad_logits_cV.scatter_add_(1, targets[:, None], grad[:, None])
            if bonus_cV is not None:
                grad_logits_cV += bonus_cV
            grad_logits = ctx.shaping.backward(grad_logits_cV.div_(ctx.temperature), shaped_cV).to(hidden.dtype)
            del shaped_cV
            torch.mm(grad_logits, weight_VD, out=grad_hidden)
            if grad_weight_VD is not None:
                grad_weight_VD += grad_logits.T @ hidden
            if grad_bias_V is not None:
                grad_bias_V += grad_logits.sum(0, dtype=torch.float32)
        grad_bias = None if bias_V is None or grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_CD, grad_weight, grad_bias, None, None, None, None


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of CHUNK positions of every tensor."""
    return zip(*(torch.split(tensor, CHUNK) for tensor in tensors), strict=True)


def _logits(hidden_cD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    return F.linear(hidden_cD, weight_VD, bias_V).float()


def _log_softmax(logits_cV: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(logits_cV if temperature == 1.0 else logits_cV / temperature, dim=1)
