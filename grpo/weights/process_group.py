"""Tensors from trainer rank 0 to the engine workers, through their own process group: NCCL between GPUs, else gloo.

The group is torch.distributed's on both ends. vLLM's own communicator switches itself off without an error when its
NCCL binding does not fit, and its broadcasts then do nothing; it would also bring vLLM into the trainer. torch raises
instead, and has timeouts. The stream describes itself (names before bytes), so that a wrong tensor is found by
comparison and not by a deadlock of two sides that count differently.

    bucket := [bytes of header, bytes of payload] header payload    header := JSON [[name, shape, dtype], ...]
    stream := bucket* [0, 0]

A group that broke once is left by every rank that notices, so that the others see a closed connection at once and do
not wait for their deadline. Whoever is left forms a new group.
"""

import contextlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d as c10d

from grpo.errors import ClusterError, GrpoError, WeightSyncError
from grpo.run.failures import Kind, look
from grpo.run.faults import fault_point
from grpo.types import TensorRecord
from grpo.weights.digest import records, sums
from grpo.weights.rendezvous import PROOF, Gate, join, left, prove
from grpo.weights.shared_store import SharedStore

BUCKET_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""On the wire: small enough for packing, travel and loading to overlap. Between GPUs each costs more than it takes."""
OWN_FAULTS = {Kind.MEMORY, Kind.DISK, Kind.LIMIT, Kind.LAYOUT}  # not the other end's
ALIGNMENT = 16  # every tensor of a bucket starts at a multiple of it: a view as another dtype needs that


class GroupTransport:
    """A `Transport` over one process group. `device` is where tensors come from or go to: "cpu" or "cuda".

    The sender of several groups, where engines share GPUs that NCCL takes once in each, has one with `others`: what it
    sends goes to all of them, a bucket at a time.

    Raises: ClusterError if a rank does not join, dies, or if joining or one whole transfer takes longer than `seconds`;
    WeightSyncError if the group moves no data.
    """

    def __init__(
        self, backend: str, device: str, host: str, port: int, rank: int, world_size: int, secret: str, seconds: float
    ) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.wire = self.device if backend == "nccl" else torch.device("cpu")
        self.timeout = timedelta(seconds=seconds)
        self._begin()
        self.where = f"weight transfer group at {host}:{port} (rank {rank} of {world_size}, {backend})"
        self.group: Any = None
        self.others: Sequence[GroupTransport] = ()
        try:
            with _met(host, port, rank, world_size, secret, seconds) as store:
                self.group = _form(backend, store, host, port, rank, world_size, self.timeout)
                self._prove_members(rank, world_size, secret)
        except (RuntimeError, OSError) as error:
            self.close()
            if look(error).kind in OWN_FAULTS:
                raise
            raise ClusterError(
                f"all ranks must join the {self.where} within deadlines.sync = {seconds:g} s, but: {error}; "
                "check that trainer and engine nodes reach each other"
            ) from error
        except GrpoError:
            self.close()
            raise

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        try:
            return self._send(version, tensors)
        except BaseException:
            self.close()
            raise

    def _send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorRecord, ...]:
        groups = [self, *self.others]
        for group in groups:
            group._begin()
        sent: list[TensorRecord] = []
        for bucket in self._buckets(tensors):
            names = json.dumps([[each.name, each.shape, each.dtype] for each, _ in bucket]).encode()
            header = _bytes(names, self.wire)
            payload = torch.cat([data for _, data in bucket])
            for group in groups:
                group._broadcast(torch.tensor([header.numel(), payload.numel()], device=self.wire))
                group._broadcast(header)
                group._broadcast(payload)
            if not sent:
                fault_point("sync.tensor", step=version)
            sent += [each for each, _ in bucket]
        for group in groups:
            group._broadcast(torch.zeros(2, dtype=torch.int64, device=self.wire))
        return tuple(sent)

    def receive(self) -> Iterator[tuple[TensorRecord, Tensor]]:
        self._begin()
        while True:
            sizes = self._broadcast(torch.zeros(2, dtype=torch.int64, device=self.wire)).tolist()
            if sizes == [0, 0]:
                return
            header = self._broadcast(torch.zeros(sizes[0], dtype=torch.uint8, device=self.wire))
            payload = self._broadcast(torch.zeros(sizes[1], dtype=torch.uint8, device=self.wire)).to(self.device)
            received, start = [], 0
            for name, shape, dtype_name in json.loads(header.cpu().numpy().tobytes()):
                dtype = getattr(torch, dtype_name)
                size = dtype.itemsize * torch.Size(shape).numel()
                tensor = payload[start : start + size].view(dtype).view(shape)
                received.append((name, tensor, sums(tensor)))
                start += _aligned(size)
            for found, (_, tensor, _) in zip(records(received), received, strict=True):
                yield found, tensor

    def _begin(self) -> None:
        """All that comes until the next call has one deadline."""
        self.deadline = time.monotonic() + self.timeout.total_seconds()

    def accompany(self, others: Sequence[Any]) -> None:
        self.others = others

    def close(self) -> None:
        """Leaves the group at once, in whatever state the other ranks are; they see a closed connection."""
        group, self.group = self.group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):  # of a group that has broken already
                group.abort()
        for other in self.others:
            other.close()

    def _buckets(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[TensorRecord, Tensor]]]:
        """Records and padded byte copies: the first tensor alone, which sets the workers going, then BUCKET_BYTES."""
        summed: list[tuple[str, Tensor, Tensor]] = []
        copies: list[Tensor] = []
        filled, limit = 0, 0
        for name, tensor in tensors:
            data = tensor.detach().reshape(-1).view(torch.uint8)
            padded = torch.zeros(_aligned(data.numel()), dtype=torch.uint8, device=self.wire)
            padded[: data.numel()].copy_(data)
            if copies and filled + padded.numel() > limit:
                yield list(zip(records(summed), copies, strict=True))
                summed, copies, filled, limit = [], [], 0, BUCKET_BYTES[self.wire.type]
            summed.append((name, torch.empty_like(tensor, device="meta"), sums(tensor)))
            copies.append(padded)
            filled += padded.numel()
        if copies:
            yield list(zip(records(summed), copies, strict=True))

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """From rank 0, in place; returns when the data has arrived."""
        self._wait(lambda: self.group.broadcast([tensor], c10d.BroadcastOptions()))
        return tensor

    def _wait(self, start: Callable[[], distributed.Work]) -> None:
        if self.group is None:
            raise ClusterError(f"the {self.where} was left; join a new one before the next sync")
        try:
            start().wait(timedelta(seconds=max(left(self.deadline), 0.001)))  # 0 would mean no deadline
        except (RuntimeError, TimeoutError) as error:
            self.close()
            if look(error).kind in OWN_FAULTS:
                raise
            seconds = self.timeout.total_seconds()
            raise ClusterError(
                f"the {self.where} broke off: {error}; the other end died, or all together took longer than "
                f"deadlines.sync = {seconds:g} s"
            ) from error

    def _prove_members(self, rank: int, world_size: int, secret: str) -> None:
        """Before any weight is sent: rank 0's number reaches every rank, and each one's proof of it comes back.

        It goes the way of the weights, so that nobody sits on that way who does not know the secret: gloo itself takes
        whoever is the first to connect.
        """
        nonce = secrets.token_bytes(PROOF) if rank == 0 else bytes(PROOF)
        seen = bytes(self._broadcast(_bytes(nonce, self.wire)).tolist())
        wanted = [prove(secret, "group", seen, str(place).encode()) for place in range(world_size)]
        blank = bytes(PROOF)
        said = _bytes(b"".join(proof if place == rank else blank for place, proof in enumerate(wanted)), self.wire)
        self._wait(lambda: self.group.allreduce([said], c10d.AllreduceOptions()))
        found = bytes(said.tolist())
        rows = [found[PROOF * place : PROOF * (place + 1)] for place in range(world_size)]
        if seen == blank or all(row == blank for place, row in enumerate(rows) if place != rank):
            raise WeightSyncError(
                f"a number that rank 0 sends must reach all ranks of the {self.where} and their answers come back, but "
                "nothing has moved; check NCCL or set sync.transport to gloo"
            )
        wrong = [place for place in range(world_size) if not hmac.compare_digest(rows[place], wanted[place])]
        if wrong:
            raise ClusterError(
                f"every rank of the {self.where} must prove that it is of this run, but {wrong} did not; somebody else "
                "has joined: close the port range of the nodes to others (a NetworkPolicy)"
            )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


@contextlib.contextmanager
def _met(host: str, port: int, rank: int, world_size: int, secret: str, seconds: float) -> Iterator[distributed.Store]:
    """A store that all ranks share, for as long as their group needs to form. Raises OSError."""
    deadline = time.monotonic() + seconds
    if rank == 0:
        with Gate(host, port, world_size, secret) as gate:
            members = gate.wait(deadline)
    else:
        members = [join(host, port, rank, secret, deadline)]
    store: Any = distributed.HashStore()  # its stubs know no bytes
    store.set_timeout(timedelta(seconds=left(deadline)))
    shared = SharedStore(store, members, deadline)
    try:
        yield store
    finally:
        shared.close()


def _form(
    backend: str, store: distributed.Store, host: str, port: int, rank: int, world_size: int, timeout: timedelta
) -> Any:
    """A process group beside the global one: trainer ranks and workers have their own already."""
    groups: Any = c10d  # the stubs leave out the constructors used here
    if backend == "nccl":
        options = groups.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return groups.ProcessGroupNCCL(store, rank, world_size, options)
    options = groups.ProcessGroupGloo._Options()
    options._timeout = timeout
    address = host if rank == 0 else address_towards(host, port)
    options._devices = [groups.ProcessGroupGloo.create_device(hostname=address)]
    return groups.ProcessGroupGloo(store, rank, world_size, options)


def address_towards(host: str, port: int) -> str:
    """This machine's address on the network that leads to `host`; the machine's own name may resolve to another one."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
