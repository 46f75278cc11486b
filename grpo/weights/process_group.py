"""Tensors from trainer rank 0 to the engine workers: NCCL between GPUs, else gloo.

The stream describes itself (names before bytes), so that a wrong tensor is found by comparison and not by a deadlock of
two sides that count differently.

    stream  := bucket* end              end := a header without tensors; none behind a bucket that says it is the last
    bucket  := header payload           header := [bytes of the JSON] JSON {"tensors": [[name, shape, dtype], ...], ...}
    payload := all bytes in one piece; or between GPUs ("direct") each tensor from where it lies to where it belongs;
               or none where the receivers read from the sender's memory ("shared"): see `shared_gpu.py`
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from grpo.run.faults import fault_point
from grpo.types import Stats, TensorRecord
from grpo.weights.digest import records, sums
from grpo.weights.group import Group, as_bytes

BUCKET_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""On the wire: small enough for packing, travel and loading to overlap. Between GPUs each costs more than it takes."""
PART_BYTES = 512 << 20
"""Of tensors that travel from where they lie: digests of one part are made while the next arrives."""
HEAD_BYTES = 1 << 15
"""Of a header that travels at once; what is longer follows."""
ALIGNMENT = 16  # every tensor of a bucket starts at a multiple of it: a view as another dtype needs that
Outline = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape, dtype."""
Place = Callable[[str, tuple[int, ...], torch.dtype], Tensor | None]
"""Where a tensor belongs; None: anywhere."""


Header = dict[str, Any]
NOTHING: Header = {"tensors": [], "way": "piece", "last": True}


def nowhere(_name: str, _shape: tuple[int, ...], _dtype: torch.dtype) -> None:
    """The `Place` of tensors that lie where they have arrived."""


class GroupTransport(Group):
    """A `Transport` over one process group.

    The sender of several groups, where engines share GPUs that NCCL takes once in each, has one with `others`: what it
    sends goes to all of them.
    """

    others: Sequence["GroupTransport"]
    seconds: Stats
    """Of the last transfer, by part: "wire" and "digest"."""
    in_place: bool | None = None
    """Whether a sequence of tensors is sent from where they lie; None: between GPUs."""

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        try:
            self.seconds = {}
            for group in [self, *self.others]:
                group._begin()
            in_place = self.wire.type == "cuda" if self.in_place is None else self.in_place
            if in_place and isinstance(tensors, Sequence):
                return self._send_in_place(version, tensors)
            return self._send(version, tensors)
        except BaseException:
            self.close()
            raise

    def _send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        groups = [self, *self.others]
        sent: list[TensorRecord] = []
        for bucket in self._buckets(tensors):
            payload = torch.cat([data for _, data in bucket])
            with self._timed("wire"):
                for group in groups:
                    group._send_header([each for each, _ in bucket], "piece", last=False)
                    group._broadcast(payload)
            if not sent:
                fault_point("sync.tensor", step=version)
            sent += [each for each, _ in bucket]
        for group in groups:
            group._send_header([], "piece", last=True)
        return tuple(sent)

    def _send_in_place(self, version: int, tensors: Sequence[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        """From where they lie, and their digests beside it."""
        whole = [(name, tensor.detach().contiguous()) for name, tensor in tensors]
        outline = [TensorRecord(name, tuple(tensor.shape), type_name(tensor.dtype)) for name, tensor in whole]
        left = iter([_flat(tensor) for _, tensor in whole])
        parts = [
            [next(left) for _ in part]
            for part in _parts([(name, tuple(each.shape), each.dtype) for name, each in whole])
        ]
        found: list[Tensor] = []
        for group in [self, *self.others]:
            with self._timed("wire"):
                group._send_header(outline, "direct", last=True)
                works = [work for part in parts for work in group._start(part)]
                found = found or [sums([tensor for _, tensor in whole])]
                group._finish(works)
            if group is self:
                fault_point("sync.tensor", step=version)
        with self._timed("digest"):
            return tuple(records(whole, found[0]))

    def _send_header(self, outline: Sequence[TensorRecord], way: str, last: bool, **more: object) -> None:
        names = [[each.name, each.shape, each.dtype] for each in outline]
        text = json.dumps({"tensors": names, "way": way, "last": last, **more}).encode()
        head = len(text).to_bytes(8, "little") + text
        self._broadcast(as_bytes(head[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0"), self.wire))
        if len(head) > HEAD_BYTES:
            self._broadcast(as_bytes(head[HEAD_BYTES:], self.wire))

    def receive(self, place: Place = nowhere) -> Iterator[tuple[TensorRecord, Tensor]]:
        self._begin()
        self.seconds = {}
        last = False
        while not last:
            with self._timed("wire"):
                header = self._receive_header()
            last = header["last"]
            outline = [(name, tuple(shape), getattr(torch, kind)) for name, shape, kind in header["tensors"]]
            if outline:
                yield from self._take(header, outline, place)

    def _take(self, header: Header, outline: Sequence[Outline], place: Place) -> Iterator[tuple[TensorRecord, Tensor]]:
        """What a header announces, by its way."""
        take = self._receive_in_place if header["way"] == "direct" else self._receive_piece
        return take(outline, place)

    def _receive_header(self) -> Header:
        """Of nothing but zeros, as where nothing has moved: no tensor."""
        head = self._broadcast(torch.zeros(HEAD_BYTES, dtype=torch.uint8, device=self.wire)).cpu().numpy().tobytes()
        length = int.from_bytes(head[:8], "little")
        rest = length + 8 - HEAD_BYTES
        if rest > 0:
            head += self._broadcast(torch.zeros(rest, dtype=torch.uint8, device=self.wire)).cpu().numpy().tobytes()
        header: Header = json.loads(head[8 : 8 + length]) if length else NOTHING
        return header

    def _receive_piece(self, outline: Sequence[Outline], place: Place) -> Iterator[tuple[TensorRecord, Tensor]]:
        sizes = [kind.itemsize * torch.Size(shape).numel() for _, shape, kind in outline]
        length = sum(map(_aligned, sizes))
        with self._timed("wire"):
            payload = self._broadcast(torch.zeros(length, dtype=torch.uint8, device=self.wire)).to(self.device)
        arrived, start = [], 0
        for (name, shape, kind), size in zip(outline, sizes, strict=True):
            tensor = payload[start : start + size].view(kind).view(shape)
            target = place(name, shape, kind)
            arrived.append((name, tensor if target is None else target.copy_(tensor)))
            start += _aligned(size)
        yield from zip(self._digested(arrived), [tensor for _, tensor in arrived], strict=True)

    def _receive_in_place(self, outline: Sequence[Outline], place: Place) -> Iterator[tuple[TensorRecord, Tensor]]:
        """Part after part: the next one is on its way while digests are made of one."""

        def begin(part: Sequence[Outline]) -> tuple[list[tuple[str, Tensor]], list[distributed.Work]]:
            tensors = []
            for name, shape, kind in part:
                target = place(name, shape, kind)
                tensors.append((name, torch.empty(shape, dtype=kind, device=self.wire) if target is None else target))
            return tensors, self._start([_flat(tensor) for _, tensor in tensors])

        parts = _parts(outline)
        coming = begin(parts[0]) if parts else None
        for following in [*parts[1:], None] if parts else ():
            assert coming is not None
            tensors, works = coming
            with self._timed("wire"):
                coming = begin(following) if following else None
                self._finish(works)
            yield from zip(self._digested(tensors), [tensor for _, tensor in tensors], strict=True)

    def _digested(self, tensors: Sequence[tuple[str, Tensor]]) -> list[TensorRecord]:
        with self._timed("digest"):
            return records(tensors, sums([tensor for _, tensor in tensors]))

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    @property
    def packing(self) -> torch.device:
        """Where tensors are put together that do not travel from where they lie."""
        return self.wire

    def _buckets(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[TensorRecord, Tensor]]]:
        """Records and padded byte copies: the first tensor alone, which sets the workers going, then BUCKET_BYTES."""
        summed: list[tuple[str, Tensor]] = []
        found: list[Tensor] = []
        copies: list[Tensor] = []
        filled, limit = 0, 0
        for name, tensor in tensors:
            data = tensor.detach().reshape(-1).view(torch.uint8)
            padded = torch.zeros(_aligned(data.numel()), dtype=torch.uint8, device=self.packing)
            padded[: data.numel()].copy_(data)
            if copies and filled + padded.numel() > limit:
                yield list(zip(records(summed, torch.cat(found)), copies, strict=True))
                summed, found, copies, filled, limit = [], [], [], 0, BUCKET_BYTES[self.packing.type]
            summed.append((name, torch.empty_like(tensor, device="meta")))
            found.append(sums([tensor]))
            copies.append(padded)
            filled += padded.numel()
        if copies:
            yield list(zip(records(summed, torch.cat(found)), copies, strict=True))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _parts(outline: Sequence[Outline]) -> list[list[Outline]]:
    """Tensors in their order, PART_BYTES together; the same on both ends, since NCCL makes one operation of a part."""
    parts: list[list[Outline]] = []
    filled = PART_BYTES
    for each in outline:
        if filled >= PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(each)
        filled += torch.Size(each[1]).numel() * each[2].itemsize
    return parts
