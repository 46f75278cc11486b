"""Attention inside each row of a packed batch, registered with transformers under the name ATTENTION.

It lays the rows out, so no T x T mask is built: linear layers see each token once, attention sees whole rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from grpo.errors import ConfigError
from grpo.trainer.packing import PackedBatch

ATTENTION = "grpo_packed"
DENSE_LENGTH = 512
"""Longest row whose attention scores are held as a whole (bf16 on the CPU)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How attention lays packed tokens out as whole rows and takes its results back.

    `gather_E` are the tokens of the rows behind each other (`flash`) or in a [rows, max_length] grid, right-padded with
    any token; `select_T` is where each packed token stands there.
    """

    flash: bool
    cu_seqlens_R1: torch.Tensor
    max_length: int
    gather_E: torch.Tensor
    select_T: torch.Tensor


def make_layout(batch: PackedBatch, flash: bool) -> Layout:
    """The varlen kernel takes rows behind each other, SDPA a grid."""
    bounds, length = batch.cu_seqlens_R1, batch.max_length
    if flash:
        return Layout(True, bounds, length, batch.expand_E, batch.select_T)
    starts_R1, ends_R1 = bounds[:-1, None].long(), bounds[1:, None].long()
    places_RL = starts_R1 + torch.arange(length, device=bounds.device)
    inside_RL = places_RL < ends_R1
    gather_E = torch.where(inside_RL, batch.expand_E[places_RL.clamp(max=len(batch.expand_E) - 1)], 0).flatten()
    select_T = inside_RL.flatten().nonzero()[:, 0][batch.select_T]
    return Layout(False, bounds, length, gather_E, select_T)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out.

    A shared prompt's keys and values are seen by all its rows; its own output is computed in each and taken from one.
    In the grid, causal attention never looks at the padding behind a row, and what the padding computes is dropped, so
    this is exact.
    """
    length = layout.max_length
    if sliding_window is not None and length > sliding_window:
        raise ConfigError(
            f"rows must fit the model's sliding window: {length} tokens > {sliding_window}; lower model.max_length"
        )
    heads = query.shape[1]
    query, key, value = (t[0].transpose(0, 1).index_select(0, layout.gather_E) for t in (query, key, value))
    if layout.flash:
        bounds = {"cu_seq_q": layout.cu_seqlens_R1, "cu_seq_k": layout.cu_seqlens_R1, "max_q": length, "max_k": length}
        # repeated here: how the kernel is told of grouped heads differs between torch releases
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
        attend: Any = varlen_attn
        output = attend(query, key, value, **bounds, scale=scaling, window_size=(-1, 0))
    else:
        grouped = heads != key.shape[1]
        query, key, value = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (query, key, value))
        if query.dtype == torch.bfloat16 and query.device.type == "cpu" and length <= DENSE_LENGTH:
            output = dense_attention(query, key, value, scaling)
        else:
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
            )
        output = output.transpose(1, 2).flatten(0, 1)
    return output.index_select(0, layout.select_T)[None], None


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of R rows by matrix products: [R, heads, L, head_dim] in and out.

    With its backward pass 3 times as fast as torch's fused bf16 kernel for the CPU, but it holds the L x L scores.
    """
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    future_LL = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    scores = torch.baddbmm(
        future_LL.repeat(groups, 1),
        query.reshape(-1, groups * length, size),
        key.reshape(-1, length, size).transpose(1, 2),
        alpha=scaling or size**-0.5,
    )
    return (scores.softmax(-1) @ value.reshape(-1, length, size)).view(rows, heads, length, size)


AttentionInterface.register(ATTENTION, packed_attention)
