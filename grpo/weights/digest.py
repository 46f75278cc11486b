"""Digests of tensors: fast, on the tensor's own device, the same number on every device."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch

from grpo.types import TensorRecord

CHUNK = 1 << 20
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TRIED = 3 * CHUNK // 2
"""Numbers of the sample by which a GPU's kernel is compared with torch's operations before it is used."""


def record(name: str, tensor: torch.Tensor) -> TensorRecord:
    """Name, shape, dtype and digest of a tensor."""
    return records([(name, tensor)], sums([tensor]))[0]


def records(tensors: Sequence[tuple[str, torch.Tensor]], found: torch.Tensor) -> list[TensorRecord]:
    """Of (name, tensor) each, by their `sums`. One wait for the device: each may cost a thread its turn."""
    lists, place, made = found.tolist(), 0, []
    for name, tensor in tensors:
        chunks = -(-tensor.numel() // CHUNK)
        text = _digest(lists[place : place + chunks])
        made.append(TensorRecord(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), text))
        place += chunks
    return made


def digest(tensor: torch.Tensor) -> str:
    """32 hex digits: two sums over the raw bits modulo 2^64, one of them weighted by position; "" without elements.

    Integer sums do not depend on the order of reduction, so CPU and GPU agree. The weights are odd and irregular:
    values that are zeroed, swapped or permuted give another sum. It guards against mistakes, not against forgery.
    """
    return _digest(sums([tensor]).tolist())


@torch.no_grad()
def sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What digests are made of, [chunks, 2], on the tensors' device and in its stream: nothing waits for it here."""
    if not tensors:
        return torch.empty(0, 2, dtype=torch.int64)
    if tensors[0].device.type == "cuda" and has_kernel(tensors[0].device):
        return _by_kernel(tensors)
    return torch.cat([_by_torch(tensor) for tensor in tensors])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])


def _by_torch(tensor: torch.Tensor) -> torch.Tensor:
    bits = _bits(tensor)
    weights = position_weights(bits.device)
    found = [torch.empty(0, 2, dtype=torch.int64, device=bits.device)]
    for block in bits.split(CHUNK) if bits.numel() else ():
        wide = block.to(torch.int64)
        found.append(torch.stack((wide.sum(), (wide * weights[: len(wide)]).sum()))[None])
    return torch.cat(found)


def _by_kernel(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One kernel for each run of tensors of one size of number: mostly one for all."""
    from grpo.weights.digest_kernel import sum_all

    flat = [_bits(tensor) for tensor in tensors]
    return torch.cat([sum_all(list(run)) for _, run in groupby(flat, key=torch.Tensor.element_size)])


@lru_cache(maxsize=8)
def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs on this GPU and finds what torch's operations find."""
    generator = torch.Generator(device).manual_seed(0)
    sample = torch.randn(TRIED, generator=generator, device=device)
    samples = [sample, sample[:5].to(torch.bfloat16), sample[1:].to(torch.bfloat16)]
    try:
        same = torch.equal(_by_kernel(samples), torch.cat([_by_torch(each) for each in samples]))
        said = "it finds other sums"
    except Exception as error:  # of Triton, of its compiler, or of the driver
        same, said = False, f"{type(error).__name__}: {error}"
    if not same:
        print(f"digests of weights are made by torch's own operations, as the kernel does not run here: {said}")
    return same


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
