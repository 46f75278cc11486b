"""What TRL's asynchronous trainer calls FlashAttention 3, by the kernel that comes with torch.

Its packed rows need queries that are the last ones of longer paths of keys, causally, with a backward pass and fewer
heads of keys than of queries. The kernel it asks for comes from the hub, which a machine of GPUs often cannot reach.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch


class Attention:
    """Stands for the package: `flash_attn_varlen_func` is all that is used of it."""

    checked = False

    def flash_attn_varlen_func(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As FlashAttention's own; the first call proves the alignment of queries and keys."""
        if not Attention.checked:
            Attention.checked = True
            with torch.autocast(args[0].device.type, enabled=False):
                check(varlen, args[0].device)
        return varlen(*args, **kwargs)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """[tokens, heads, size] in and out; `cu_q` and `cu_k` are where sequences begin, with the end."""
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    grouped = query.shape[1] != key.shape[1]
    known = {"enable_gqa": grouped} if "enable_gqa" in signature(varlen_attn).parameters else {}
    if grouped and not known:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    window = (window_size[0], 0) if causal else window_size
    output: torch.Tensor = attend(
        query, key, value, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window_size=window, **known
    )
    return output


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence, whose queries are its last tokens: the definition."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1).float() for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    places = torch.arange(len(key), device=key.device)
    future = places[None] > places[len(key) - len(query) :, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), value)


def check(attend: Callable[..., torch.Tensor], device: torch.device) -> None:
    """Raises AssertionError if queries that are fewer than keys are not their last ones."""
    made = torch.Generator(device="cpu").manual_seed(0)
    query, key, value = (
        torch.randn(tokens, heads, 64, generator=made).to(device, torch.bfloat16)
        for tokens, heads in ((5, 4), (12, 2), (12, 2))
    )
    cu_q, cu_k = (torch.tensor(edges, dtype=torch.int32, device=device) for edges in ((0, 3, 5), (0, 7, 12)))
    found = attend(query, key, value, cu_q, cu_k, 3, 7, softmax_scale=0.125, causal=True).float()
    wanted = torch.cat([dense(query[:3], key[:7], value[:7], 0.125), dense(query[3:], key[7:], value[7:], 0.125)])
    assert torch.allclose(found, wanted, atol=0.02, rtol=0.02), f"off by {(found - wanted).abs().max():.3f}"
