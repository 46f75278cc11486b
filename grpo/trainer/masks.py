"""What a token of a packed row may see, as transformers' mask functions say it, without a T x T mask."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from grpo.errors import ConfigError

BLOCK = 512
"""Queries whose view is looked at, at once."""


@dataclass(frozen=True, slots=True)
class RowMask:
    """What a token sees of its row: the last `window` tokens, itself among them; or what `seen_LL` has for it.

    A stand-in for the mask that transformers hands from model to attention.
    """

    window: int | None = None
    seen_LL: torch.Tensor | None = None

    def plain(self, length: int) -> bool:
        """Whether all before it is seen in rows of this length."""
        return self.seen_LL is None and (self.window is None or self.window >= length)

    def part(self, start: int, end: int, device: torch.device) -> tuple[int, torch.Tensor]:
        """For queries `start` to `end`: the first key that one of them sees, and what they see from there to `end`."""
        if self.seen_LL is not None:
            return 0, self.seen_LL[start:end, :end]
        first = 0 if self.window is None else max(0, start + 1 - self.window)
        queries, keys = torch.arange(start, end, device=device)[:, None], torch.arange(first, end, device=device)
        return first, (keys <= queries) & (keys > queries - (self.window or end))


MaskFunction = Callable[[Any, Any, Any, Any], Any]


def row_mask(seen: MaskFunction, length: int, device: torch.device) -> RowMask:
    """What `seen`, a mask function of transformers by places in the row, says for rows of this length.

    Raises ConfigError if a token would see what comes after it.
    """
    if seen is causal_mask_function:
        return RowMask()
    places, none = torch.arange(length, device=device), torch.zeros((), dtype=torch.long, device=device)
    last = int(seen(none, none, places[-1:, None], places[None]).expand(1, length).sum())
    guess, parts = RowMask(last if last < length else None), []
    alike = True
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        seen_bL: torch.Tensor = seen(none, none, places[start:end, None], places[None]).expand(end - start, length)
        first, guessed = guess.part(start, end, device)
        alike = alike and bool((seen_bL[:, first:end] == guessed).all()) and not bool(seen_bL[:, :first].any())
        parts.append(seen_bL)
        if bool((seen_bL & (places > places[start:end, None])).any()):
            raise ConfigError(
                "attention must be causal, but the model lets tokens see what follows; choose another model"
            )
    return guess if alike else RowMask(seen_LL=torch.cat(parts))
