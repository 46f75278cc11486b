"""Weights that a worker takes beside its work: they lie next to those that it computes with until it switches."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from grpo.types import Stats, TensorRecord
from grpo.weights import Transport, seconds_of
from grpo.weights.digest import records, sums

SPARE = 2.0
"""A GPU takes the copy if it has so many times its size free beside those of engines that share it; else pinned host
memory does."""

TOGETHER, TOGETHER_BYTES = 32, 256 << 20
"""Tensors that are looked at once more with one wait for the GPU; so many bytes at most that must be brought there."""

PlainRecord = tuple[str, tuple[int, ...], str, str]
"""Name, shape, dtype, digest: what crosses the border between vLLM's processes."""
Answer = tuple[list[PlainRecord], list[str], Stats]
"""What has arrived, what is wrong with it, and what it took, by part."""
Expected = Sequence[tuple[str, Sequence[int], str]]


@lru_cache(maxsize=1)
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies: memory that one stream has freed is not given to another."""
    return torch.cuda.Stream(device)


class Announced:
    """Compares what arrives with what the trainer has announced."""

    def __init__(self, expected: Expected) -> None:
        self.missing = {name: (tuple(shape), dtype) for name, shape, dtype in expected}
        self.received: list[PlainRecord] = []

    def problem(self, record: TensorRecord) -> list[str]:
        """What is wrong with a tensor that has arrived."""
        self.received.append((record.name, record.shape, record.dtype, record.digest))
        if self.missing.pop(record.name, None) == (record.shape, record.dtype):
            return []
        return [f"{record.name} {list(record.shape)} {record.dtype} was not announced"]

    def left(self) -> list[str]:
        """What has not arrived."""
        return [f"{name} was announced and not sent" for name in self.missing]


class Shadow:
    """One version, read from a transfer by a thread of its own; `take` hands its tensors over, once.

    `sharing` engines at most are on its GPU, which all take a copy at the same time.
    """

    def __init__(
        self, version: int, transport: Transport, expected: Expected, device: torch.device, sharing: int = 1
    ) -> None:
        self.version, self.transport, self.device = version, transport, device
        self.expected, self.announced = expected, Announced(expected)
        self.problems: list[str] = []
        self.error: BaseException | None = None
        self._tensors: list[tuple[TensorRecord, torch.Tensor]] = []
        size = sum(TensorRecord(name, tuple(shape), dtype).nbytes for name, shape, dtype in expected)
        needed = (SPARE + sharing - 1) * size
        self.on_device = device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > needed
        self._thread = threading.Thread(target=self._read, name="receive-ahead", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether all has arrived, or nothing more will."""
        return not self._thread.is_alive()

    def answer(self) -> Answer:
        """What has arrived, in order, and what is wrong with it. Raises what broke the transfer off."""
        if self.error is not None:
            raise self.error
        return self.announced.received, self.problems, seconds_of(self.transport)

    def take(self, version: int) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        """The tensors on the device, each as it was received. Raises ValueError for another version or other bytes."""
        self._check(version)
        while self._tensors:
            count = self._together()
            batch = [(record, tensor.to(self.device)) for record, tensor in self._tensors[:count]]
            del self._tensors[:count]
            tensors = [tensor for _, tensor in batch]
            found = records([(record.name, tensor) for record, tensor in batch], sums(tensors))
            for (record, tensor), now in zip(batch, found, strict=True):
                if now != record:
                    raise ValueError(f"{record.name} has changed since it was received")
                yield record, tensor

    def all(self, version: int) -> list[tuple[TensorRecord, torch.Tensor]]:
        """The tensors as they lie here. Raises ValueError for another version."""
        self._check(version)
        return self._tensors

    def _check(self, version: int) -> None:
        if version != self.version or not self.ended or self.error or self.problems:
            raise ValueError(f"the copy is of version {self.version} and not a whole version {version}")

    def _together(self) -> int:
        if self.on_device:
            return TOGETHER
        sizes = accumulate(record.nbytes for record, _ in self._tensors[:TOGETHER])
        return max(1, sum(size <= TOGETHER_BYTES for size in sizes))

    def _read(self) -> None:
        try:
            with torch.no_grad():
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                    with torch.cuda.stream(side_stream(self.device)):
                        self._receive(lambda tensor: tensor if self.on_device else tensor.cpu().pin_memory())
                        torch.cuda.current_stream().synchronize()
                else:
                    self._receive(lambda tensor: tensor)
        except BaseException as error:  # raised again by who asks; the transfer is of no use to anybody then
            self.error = error
            self._tensors.clear()
            self.transport.close()

    def _receive(self, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for record, tensor in self.transport.receive():
            self.problems += self.announced.problem(record)
            self._tensors.append((record, keep(tensor)))
        self.problems += self.announced.left()
