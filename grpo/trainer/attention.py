"""Attention inside each row of a packed batch, registered with transformers under the name ATTENTION.

Rows are laid out for it, so no T x T mask is built: linear layers see each token once, attention sees whole rows. What
a model asks for beside plain causal attention (windows, chunks, soft caps, sinks) is computed by blocks of queries;
what is not known here is an error and never left out. The layout is that of the forward pass under way (`attending`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from grpo.errors import ConfigError
from grpo.trainer.expansion import Expansion
from grpo.trainer.kernels import DENSE_LENGTH, FLASH_SIZES, blockwise_attention, dense_attention, varlen_attention
from grpo.trainer.masks import MaskFunction, RowMask, row_mask
from grpo.trainer.packing import PackedBatch

ATTENTION = "grpo_packed"
HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "layer_idx",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "use_cache",
    }
)
"""Arguments that models hand through to attention and that change nothing about its result."""


class Layout:
    """How attention lays packed tokens out as whole rows and takes its results back.

    `expansion` has the rows behind each other, for the varlen kernel (`flash`: it may be used); `grid` is
    [rows, max_length], right-padded with any token: the tokens to gather, and where each packed token stands among
    them.
    """

    def __init__(self, batch: PackedBatch, flash: bool) -> None:
        self.flash, self.expand_E, self.select_T = flash, batch.expand_E, batch.select_T
        self.cu_seqlens_R1, self.max_length = batch.cu_seqlens_R1, batch.max_length
        self.expansion = Expansion(batch)
        self.calls = 0
        """How often a layer has attended by it."""

    @cached_property
    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Made when a layer first wants it."""
        starts_R1, ends_R1 = self.cu_seqlens_R1[:-1, None].long(), self.cu_seqlens_R1[1:, None].long()
        places_RL = starts_R1 + torch.arange(self.max_length, device=starts_R1.device)
        inside_RL = places_RL < ends_R1
        gather_E = torch.where(inside_RL, self.expand_E[places_RL.clamp(max=len(self.expand_E) - 1)], 0).flatten()
        return gather_E, inside_RL.flatten().nonzero()[:, 0][self.select_T]


_LAYOUT: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def attending(layout: Layout) -> Iterator[None]:
    """Forward passes inside attend by this layout."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def current_layout() -> Layout:
    """That of the forward pass under way."""
    return _LAYOUT.get()


def packed_mask(*, mask_function: MaskFunction, device: torch.device, **_: object) -> RowMask:
    """Stands where transformers makes a model's mask: keeps what the model asks for, by places in a row."""
    return row_mask(mask_function, current_layout().max_length, device)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RowMask | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row: [1, heads, T, head_dim] in, [1, T, heads, value_dim] out.

    A shared prompt's keys and values are seen by all its rows; its own output is computed in each and taken from one.
    In the grid, causal attention never looks at the padding behind a row, and what the padding computes is dropped, so
    this is exact. Raises ConfigError for what it does not know.
    """
    layout = current_layout()
    layout.calls += 1
    mask = _asked(
        module, attention_mask, layout.max_length, sliding_window, is_causal, {"dropout": dropout or None} | others
    )
    simple = softcap is None and s_aux is None
    sizes = query.shape[-1], value.shape[-1]
    flash = layout.flash and simple and mask.seen_LL is None and sizes[0] == sizes[1] and sizes[0] in FLASH_SIZES
    packed = [t[0].transpose(0, 1) for t in (query, key, value)]
    if flash:
        query, key, value = map(layout.expansion.expand, packed)
        output = varlen_attention(query, key, value, layout.cu_seqlens_R1, layout.max_length, scaling, mask.window)
        return layout.expansion.select(output)[None], None
    gather_E, select_T = layout.grid
    query, key, value = (
        t.index_select(0, gather_E).unflatten(0, (-1, layout.max_length)).transpose(1, 2) for t in packed
    )
    if not (simple and mask.plain(layout.max_length)):
        output = blockwise_attention(query, key, value, scaling, mask, softcap, s_aux)
    elif query.dtype == torch.bfloat16 and query.device.type == "cpu" and layout.max_length <= DENSE_LENGTH:
        output = dense_attention(query, key, value, scaling)
    else:
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, select_T)[None], None


def _asked(
    module: nn.Module,
    mask: RowMask | None,
    length: int,
    window: int | None,
    is_causal: bool | None,
    others: dict[str, object],
) -> RowMask:
    """What a layer asks of attention. Raises ConfigError if that is not known, or not causal."""
    name = type(module).__name__
    unknown = sorted(key for key, given in others.items() if given is not None and key not in HARMLESS)
    if unknown:
        raise ConfigError(
            f"every argument of attention must be known to the packed forward, but {name} hands over "
            f"{', '.join(unknown)}; choose a model of a type in docs/models.md"
        )
    if mask is not None and not isinstance(mask, RowMask):
        raise ConfigError(
            f"the packed forward makes the mask itself, but {name} brings one of its own; choose a model of a type in "
            "docs/models.md"
        )
    if mask is None:
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise ConfigError(f"attention must be causal, but that of {name} is not; choose another model")
        return RowMask(window)
    if window is not None and window < length and mask.window != window:
        raise ConfigError(
            f"a layer's window and its mask must agree, but {name} has a window of {window} tokens and a mask of "
            f"{'another kind' if mask.window is None else mask.window}; lower model.max_length to {window}"
        )
    return mask


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, packed_mask)
