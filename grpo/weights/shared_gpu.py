"""Tensors that engine workers read out of the sender's GPU memory (CUDA IPC): within one host, and without NCCL.

NCCL refuses two ranks on one GPU, and its kernels take processors of the GPU from who computes there; a copy of memory
does neither. The group is one of gloo: what is announced, proofs, deadlines and broken ends are as on the other ways,
and digests are made of what has been copied.

Whether the ends can read each other's memory is tried when they meet. Where one cannot (another host, a container of
its own, a platform without CUDA IPC), what is sent goes through the host's memory to all of them, as with gloo.
"""

import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.multiprocessing.reductions import StorageWeakRef

from grpo.errors import MemoryNotShared
from grpo.run.faults import fault_point
from grpo.types import TensorRecord
from grpo.weights.digest import records, sums
from grpo.weights.process_group import GroupTransport, Header, Outline, Place, type_name

PROBE_BYTES, REASON_BYTES = 32, 256
Handle = list[Any]
"""Plain data that names the memory of a tensor to other processes."""


class Memory(Protocol):
    """Memory that processes of one host can show each other."""

    def show(self, storage: torch.UntypedStorage) -> Handle:
        """What others open it with, as long as it is there. Raises RuntimeError."""
        ...

    def open(self, handle: Handle, device: torch.device) -> Tensor:
        """All bytes of a storage that another process shows. Raises RuntimeError."""
        ...


class CudaMemory:
    """CUDA IPC, as torch's own queues use it; the names are private to torch."""

    def show(self, storage: torch.UntypedStorage) -> Handle:
        _, *parts = storage._share_cuda_()
        return [part.hex() if isinstance(part, bytes) else part for part in parts]

    def open(self, handle: Handle, device: torch.device) -> Tensor:
        memory, size, offset, counter, place, event, waits = handle
        names = bytes.fromhex(counter), place, bytes.fromhex(event), waits
        opened = torch.UntypedStorage._new_shared_cuda(device.index, bytes.fromhex(memory), size, offset, *names)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(opened)


class SharedGpuTransport(GroupTransport):
    """A `Transport` whose receivers copy from the sender's memory, if all of them can.

    With `strict` it raises MemoryNotShared where one cannot. Other arguments and errors are those of `Group`.
    """

    def __init__(self, *where: Any, strict: bool = False, memory: Memory | None = None) -> None:
        super().__init__("gloo", *where)
        self.memory = memory or CudaMemory()
        self.sender = where[3] == 0
        self.shown: dict[int, tuple[StorageWeakRef, Handle]] = {}
        """By address: each storage is shown once, as long as somebody else keeps it."""
        self.staging = torch.empty(0, dtype=torch.uint8, device=self.device)
        try:
            self.in_place = self._all_can(strict)
        except BaseException:
            self.close()
            raise

    def _all_can(self, strict: bool) -> bool:
        """Whether every receiver finds in the sender's memory what the sender says over the group."""
        said = secrets.token_hex(PROBE_BYTES) if self.sender else ""
        reason, header = "", Header()
        if self.sender:
            probe = torch.tensor(list(bytes.fromhex(said)), dtype=torch.uint8, device=self.device)
            try:
                header = {"probe": self._show(probe.untyped_storage()), "said": said}
                self._wait()
            except (RuntimeError, AttributeError, OSError) as error:
                reason = f"{type(error).__name__}: {error}"
            self._send_header([], "probe", last=True, **header)
        else:
            header = self._receive_header()
            try:
                found = self.memory.open(header["probe"], self.device)[:PROBE_BYTES]
                if bytes(found.tolist()).hex() != header["said"]:
                    reason = "it holds something else"
            except (RuntimeError, AttributeError, OSError, KeyError) as error:
                reason = f"{type(error).__name__}: {error}"
        why = next(filter(None, self._told(reason.partition("\n")[0])), "")
        if not why:
            return True
        if strict:
            raise MemoryNotShared(
                f"all engines must be able to read the trainer's GPU memory, but in the {self.where} one cannot "
                f"({why}); put them into one pod or on one host, or do without sync.transport: ipc"
            )
        print(f"note: weights go through the host's memory, as GPU memory cannot be shared ({why})", file=sys.stderr)
        return False

    @property
    def packing(self) -> torch.device:
        return self.device if self.in_place else self.wire

    def _send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        """Tensors that do not stay, such as those that ranks gather, one bucket after the other."""
        if not self.in_place:
            return super()._send(version, tensors)
        sent: list[TensorRecord] = []
        for bucket in self._buckets(tensors):
            outline, starts = [each for each, _ in bucket], [0]
            for _, data in bucket:
                starts.append(starts[-1] + data.numel())
            with self._timed("wire"):
                if self.staging.numel() < starts[-1]:
                    self.staging = torch.empty(starts[-1], dtype=torch.uint8, device=self.device)
                torch.cat([data for _, data in bucket], out=self.staging[: starts[-1]])
                storage = self.staging.untyped_storage()
                self._show_tensors(outline, [(storage, start) for start in starts[:-1]], last=False)
                if not sent:
                    fault_point("sync.tensor", step=version)
                self._taken()
            sent += outline
        self._send_header([], "shared", last=True)
        return tuple(sent)

    def _send_in_place(self, version: int, tensors: Sequence[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        whole = [(name, tensor.detach().contiguous()) for name, tensor in tensors]
        outline = [TensorRecord(name, tuple(each.shape), type_name(each.dtype)) for name, each in whole]
        places = [(each.untyped_storage(), int(each.storage_offset()) * each.element_size()) for _, each in whole]
        with self._timed("wire"):
            self._show_tensors(outline, places, last=True)
            fault_point("sync.tensor", step=version)
            found = sums([tensor for _, tensor in whole])
            self._taken()
        with self._timed("digest"):
            return tuple(records(whole, found))

    def _show_tensors(
        self, outline: Sequence[TensorRecord], places: Sequence[tuple[torch.UntypedStorage, int]], last: bool
    ) -> None:
        """Announces tensors and where they lie, once all that writes them has ended."""
        self.shown = {address: shown for address, shown in self.shown.items() if not shown[0].expired()}
        shown = {storage.data_ptr(): self._show(storage) for storage, _ in places if storage.nbytes()}
        order = {address: number for number, address in enumerate(shown)}
        at = [[order.get(storage.data_ptr(), -1), start] for storage, start in places]
        self._wait()
        self._send_header(outline, "shared", last, storages=list(shown.values()), at=at)

    def _take(self, header: Header, outline: Sequence[Outline], place: Place) -> Iterator[tuple[TensorRecord, Tensor]]:
        if header["way"] != "shared":
            yield from super()._take(header, outline, place)
            return
        arrived = []
        with self._timed("wire"):
            sources = [self.memory.open(handle, self.device) for handle in header["storages"]]
            for (name, shape, kind), (storage, start) in zip(outline, header["at"], strict=True):
                size = kind.itemsize * torch.Size(shape).numel()
                target = place(name, shape, kind)
                target = torch.empty(shape, dtype=kind, device=self.device) if target is None else target
                if size:
                    target.copy_(sources[storage][start : start + size].view(kind).view(shape), non_blocking=True)
                arrived.append((name, target))
            self._wait()
            sources.clear()
            self._taken()
        yield from zip(self._digested(arrived), [tensor for _, tensor in arrived], strict=True)

    def _show(self, storage: torch.UntypedStorage) -> Handle:
        if storage.data_ptr() not in self.shown:
            self.shown[storage.data_ptr()] = StorageWeakRef(storage), self.memory.show(storage)
        return self.shown[storage.data_ptr()][1]

    def _taken(self) -> None:
        """Returns once all receivers have copied what was shown."""
        with self._unbroken():
            works = [self.group.allreduce([torch.zeros(1, dtype=torch.uint8)], c10d.AllreduceOptions())]
        self._finish(works)

    def _told(self, mine: str) -> list[str]:
        """What each end has to say."""
        texts = [torch.zeros(REASON_BYTES, dtype=torch.uint8) for _ in range(self.group.size())]
        said = torch.frombuffer(bytearray(mine.encode()[:REASON_BYTES].ljust(REASON_BYTES, b"\0")), dtype=torch.uint8)
        with self._unbroken():
            works = [self.group.allgather([texts], [said])]
        self._finish(works)
        return [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace") for text in texts]

    def _wait(self) -> None:
        """Until the GPU has done what was given to it: in a thread with a stream of its own what that has."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if stream == torch.cuda.default_stream(self.device):
            torch.cuda.synchronize(self.device)
        else:
            stream.synchronize()
