"""Causal attention of whole rows, in three ways: PyTorch's varlen kernel, one matrix product, blocks of queries."""

from inspect import signature
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from grpo.trainer.masks import RowMask

DENSE_LENGTH = 512
"""Longest row whose attention scores are held as a whole (bf16 on the CPU)."""
BLOCK_SCORES = 1 << 26
"""Attention scores that exist at once where they are computed by blocks of queries."""
GROUPED = "enable_gqa" in signature(varlen_attn).parameters
"""Whether the varlen kernel takes fewer heads of keys than of queries; it does not say so in every torch release."""
FLASH_SIZES = range(8, 257, 8)
"""Sizes of a head that the varlen kernel takes."""


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    length: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The varlen kernel on rows behind each other, whose `bounds` are given: [E, heads, head_dim] in and out."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not GROUPED:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    known = {"enable_gqa": grouped} if GROUPED else {}
    left = -1 if window is None or window >= length else window - 1  # tokens before the own one
    attend: Any = varlen_attn
    sizes = {"cu_seq_q": bounds, "cu_seq_k": bounds, "max_q": length, "max_k": length}
    output: torch.Tensor = attend(query, key, value, **sizes, scale=scaling, window_size=(left, 0), **known)
    return output


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of R rows by matrix products: [R, heads, L, head_dim] in, [R, heads, L, value_dim] out.

    With its backward pass 3 times as fast as torch's fused bf16 kernel for the CPU, but it holds the L x L scores.
    """
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    future_LL = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    scores = torch.baddbmm(
        future_LL.repeat(groups, 1),
        query.reshape(-1, groups * length, size),
        key.reshape(-1, length, size).transpose(1, 2),
        alpha=size**-0.5 if scaling is None else scaling,
    )
    wide = value.shape[-1]
    return (scores.softmax(-1) @ value.reshape(-1, length, wide)).view(rows, heads, length, wide)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    mask: RowMask,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of R rows with all that a model may ask for: [R, heads, L, head_dim] in, [R, heads, L, value_dim] out.

    Scores of a block of queries exist at a time; where there are several blocks, the backward pass makes them again.
    """
    rows, heads, length, size = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    scaling = size**-0.5 if scaling is None else scaling
    step = max(1, BLOCK_SCORES // (rows * heads * length))
    outputs = []
    for start in range(0, length, step):
        end = min(start + step, length)
        first, seen_bK = mask.part(start, end, query.device)
        inputs = (
            query[:, :, start:end],
            key[:, :, first:end],
            value[:, :, first:end],
            seen_bK,
            scaling,
            softcap,
            sinks_H,
        )
        if step < length:
            outputs.append(checkpoint(_attend_block, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend_block(*inputs))
    return torch.cat(outputs, dim=2)


def _attend_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen_bK: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen_bK, float("-inf"))
    if sinks_H is None:
        return scores.softmax(-1).to(value.dtype) @ value
    sinks = sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1].to(value.dtype) @ value
