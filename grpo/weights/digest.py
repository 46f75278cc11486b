"""Digests of tensors: fast, on the tensor's own device, the same number on every device."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch

from grpo.types import TensorRecord

CHUNK = 1 << 20
GOLDEN = 0x9E3779B97F4A7C15
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TRIED = 3 * CHUNK // 2
"""Numbers of the sample by which a GPU's kernel is compared with torch's operations before it is used."""


def record(name: str, tensor: torch.Tensor) -> TensorRecord:
    """Name, shape, dtype and digest of a tensor."""
    return records([(name, tensor)], sums([tensor]))[0]


def records(tensors: Sequence[tuple[str, torch.Tensor]], found: torch.Tensor) -> list[TensorRecord]:
    """Of (name, tensor) each, by their `sums`. One wait for the device: each may cost a thread its turn."""
    texts = _digests([tensor.numel() for _, tensor in tensors], found)
    return [
        TensorRecord(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), text)
        for (name, tensor), text in zip(tensors, texts, strict=True)
    ]


def digest(tensor: torch.Tensor) -> str:
    """32 hex digits: two sums over the raw bits modulo 2^64, one of them weighted by position; "" without elements.

    Integer sums do not depend on the order of reduction, so CPU and GPU agree. The weights are odd and irregular:
    values that are zeroed, swapped or permuted give another sum. It guards against mistakes, not against forgery.
    """
    return _digests([tensor.numel()], sums([tensor]))[0]


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


def _digests(sizes: Sequence[int], found: torch.Tensor) -> list[str]:
    """Of tensors with so many elements: chunk n's weighted sum counts 2n + 1 times, so that none may change places."""
    counts = [-(-size // CHUNK) for size in sizes]
    parts = found.cpu().numpy().view(np.uint64)
    numbers = np.concatenate([np.arange(count, dtype=np.uint64) for count in counts] or [np.zeros(0, np.uint64)])
    parts = np.stack((parts[:, 0], parts[:, 1] * ((2 * numbers + 1) * np.uint64(GOLDEN))))
    starts = np.cumsum([0, *counts])[:-1]
    filled = [place for place, count in enumerate(counts) if count]
    texts = [""] * len(sizes)
    if filled:
        whole = np.add.reduceat(parts, starts[filled], axis=1)  # modulo 2^64
        for place, plain, weighted in zip(filled, *whole.tolist(), strict=True):
            texts[place] = f"{plain:016x}{weighted:016x}"
    return texts


@lru_cache(maxsize=4)
def position_weights(device: torch.device) -> torch.Tensor:
    """One odd int64 for each position of a chunk: the position, multiplied and xor-shifted as SplitMix64 does it."""
    multiplier = GOLDEN - (1 << 64)  # the same bits as a signed number
    mixed = torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device) * multiplier
    mixed = (mixed ^ (mixed >> 31)) * multiplier
    return (mixed ^ (mixed >> 29)) | 1
