"""The output head: logprobs of given tokens without the T x V logits.

It runs in chunks, in a function that recomputes the logits in the backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 1024
"""Completion positions whose logits exist at once."""


class LogprobHead(nn.Linear):
    """lm_head that returns logprobs of given tokens, not logits. It shares the weight of the layer it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight

    def forward(  # type: ignore[override]
        self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, temperature: float, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 `(logprobs_C, entropy_C)` of `targets_C` under softmax(hidden @ weight.T / temperature)."""
        apply: Any = _Logprobs.apply
        logprobs_C, entropy_C = apply(hidden_CD, self.weight, targets_C, temperature, entropy_gradient)
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
        targets_C: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        logprobs, entropies = [], []
        for hidden, targets in _chunks(hidden_CD, targets_C):
            log_probs_cV = _log_softmax(hidden, weight_VD, temperature)
            logprobs.append(log_probs_cV.gather(1, targets[:, None])[:, 0])
            entropies.append(-(log_probs_cV.exp() * log_probs_cV).sum(1))
        entropy_C = torch.cat(entropies)
        ctx.save_for_backward(hidden_CD, weight_VD, targets_C, entropy_C)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_C)
        return torch.cat(logprobs), entropy_C

    @staticmethod
    def backward(ctx: Any, grad_C: torch.Tensor, grad_entropy_C: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_CD, weight_VD, targets_C, entropy_C = ctx.saved_tensors
        grad_hidden_CD = torch.empty_like(hidden_CD)
        # fp32 whatever the weight's precision: many chunks add up here
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        entropies_CC = (entropy_C, grad_entropy_C) if ctx.entropy_gradient else (grad_C, grad_C)
        tensors = _chunks(hidden_CD, grad_hidden_CD, targets_C, grad_C, *entropies_CC)
        for hidden, grad_hidden, targets, grad, entropy, grad_entropy in tensors:
            log_probs_cV = _log_softmax(hidden, weight_VD, ctx.temperature)
            bonus_cV = None
            if ctx.entropy_gradient:
                bonus_cV = (log_probs_cV + entropy[:, None]).mul_(log_probs_cV.exp()).mul_(-grad_entropy[:, None])
            grad_logits_cV = log_probs_cV.exp_().mul_(-grad[:, None])
            grad_logits_cV.scatter_add_(1, targets[:, None], grad[:, None])
            if bonus_cV is not None:
                grad_logits_cV += bonus_cV
            grad_logits = grad_logits_cV.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_hidden)
            grad_weight_VD += grad_logits.T @ hidden
        return grad_hidden_CD, grad_weight_VD.to(weight_VD.dtype), None, None, None


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of CHUNK positions of every tensor."""
    return zip(*(torch.split(tensor, CHUNK) for tensor in tensors), strict=True)


def _log_softmax(hidden_cD: torch.Tensor, weight_VD: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_cV = F.linear(hidden_cD, weight_VD).float()
    return F.log_softmax(logits_cV if temperature == 1.0 else logits_cV / temperature, dim=1)
