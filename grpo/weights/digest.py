"""Digests of tensors: fast, on the tensor's own device, the same number on every device."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from grpo.types import TensorRecord

CHUNK = 1 << 20
TOGETHER = {"cuda": 32}
"""Chunks that are summed at a time: fewer kernels to start, 256 MiB more memory."""
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def record(name: str, tensor: torch.Tensor) -> TensorRecord:
    """Name, shape, dtype and digest of a tensor."""
    return records([(name, tensor, sums(tensor))])[0]


def records(tensors: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> list[TensorRecord]:
    """Of (name, tensor, its `sums`) each. One wait for the device: each may cost a thread its turn."""
    lists = torch.cat([each.to(tensors[0][2].device) for *_, each in tensors]).tolist() if tensors else []
    found, place = [], 0
    for name, tensor, each in tensors:
        text = _digest(lists[place : place + len(each)])
        found.append(TensorRecord(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), text))
        place += len(each)
    return found


def digest(tensor: torch.Tensor) -> str:
    """32 hex digits: two sums over the raw bits modulo 2^64, one of them weighted by position; "" without elements.

    Integer sums do not depend on the order of reduction, so CPU and GPU agree. The weights are odd and irregular:
    values that are zeroed, swapped or permuted give another sum. It guards against mistakes, not against forgery.
    """
    return _digest(sums(tensor).tolist())


@torch.no_grad()
def sums(tensor: torch.Tensor) -> torch.Tensor:
    """What a digest is made of, [chunks, 2], on the tensor's device and in its stream: nothing waits for it here."""
    bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
    weights = position_weights(bits.device)
    whole = bits.numel() // CHUNK
    blocks = [*bits[: whole * CHUNK].view(whole, CHUNK).split(TOGETHER.get(bits.device.type, 1))] if whole else []
    if rest := bits.numel() % CHUNK:
        blocks.append(bits[-rest:].view(1, rest))
    found = [torch.empty(0, 2, dtype=torch.int64, device=bits.device)]
    for block in blocks:
        wide = block.to(torch.int64)
        found.append(torch.stack((wide.sum(1), (wide * weights[: wide.shape[1]]).sum(1)), dim=1))
    return torch.cat(found)


def _digest(chunks: Sequence[Sequence[int]]) -> str:
    plain = weighted = 0
    for number, (chunk_plain, chunk_weighted) in enumerate(chunks):
        plain += chunk_plain
        weighted += (2 * number + 1) * GOLDEN * chunk_weighted
    return f"{plain & MASK:016x}{weighted & MASK:016x}" if chunks else ""


@lru_cache(maxsize=4)
def position_weights(device: torch.device) -> torch.Tensor:
    """One odd int64 for each position of a chunk: the position, multiplied and xor-shifted as SplitMix64 does it."""
    multiplier = GOLDEN - (1 << 64)  # the same bits as a signed number
    mixed = torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device) * multiplier
    mixed = (mixed ^ (mixed >> 31)) * multiplier
    return (mixed ^ (mixed >> 29)) | 1
