"""From packed tokens to whole rows and back, where a prompt of several rows is forwarded once.

What autograd has for the gradient of a gather adds with atomics, in no fixed order. Here the places of a token are
known, so they are added up one after the other, in fp32.
"""

from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from grpo.trainer.packing import PackedBatch


class Expansion:
    """Of one packed batch: [T, ...] tokens to the [E, ...] tokens of its rows behind each other, and back."""

    def __init__(self, batch: PackedBatch) -> None:
        self.expand_E, self.select_T = batch.expand_E, batch.select_T
        self.shared = len(self.expand_E) != len(self.select_T)
        """Else every token has one place, and they are in order."""

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The places in E of token 0, those of token 1 and so on; and where those of each token begin among them."""
        tokens_E, order_E = torch.sort(self.expand_E, stable=True)
        return order_E, torch.searchsorted(tokens_E, torch.arange(len(self.select_T), device=tokens_E.device))

    def expand(self, packed: torch.Tensor) -> torch.Tensor:
        """The rows' tokens; a shared token's gradient is the sum of those of its places."""
        if not self.shared:
            return packed
        apply: Any = _Expand.apply
        rows: torch.Tensor = apply(packed, self.expand_E, *self.places)
        return rows

    def select(self, rows: torch.Tensor) -> torch.Tensor:
        """The packed tokens, each from its first place."""
        if not self.shared:
            return rows
        apply: Any = _Select.apply
        packed: torch.Tensor = apply(rows, self.select_T)
        return packed


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: torch.Tensor, expand_E: torch.Tensor, order_E: torch.Tensor, starts_T: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order_E, starts_T)
        return packed.index_select(0, expand_E)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order_E, starts_T = ctx.saved_tensors
        summed = F.embedding_bag(order_E, grad.flatten(1), starts_T, mode="sum")
        return summed.unflatten(1, grad.shape[1:]), None, None, None


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, select_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(select_T)
        ctx.places = len(rows)
        return rows.index_select(0, select_T)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (select_T,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, select_T, grad), None
