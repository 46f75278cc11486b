"""A process group between trainer rank 0 and engine workers: how it forms, moves bytes from rank 0, and breaks.

The group is torch.distributed's on both ends. vLLM's own communicator switches itself off without an error when its
NCCL binding does not fit, and its broadcasts then do nothing; it would also bring vLLM into the trainer. torch raises
instead, and has timeouts.

A group that broke once is left by every rank that notices, so that the others see a closed connection at once and do
not wait for their deadline. Whoever is left forms a new group.
"""

import contextlib
import hmac
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d as c10d

from grpo.errors import ClusterError, GrpoError, WeightSyncError
from grpo.run.failures import Kind, look
from grpo.weights.rendezvous import PROOF, Gate, join, left, prove
from grpo.weights.shared_store import SharedStore

OWN_FAULTS = {Kind.MEMORY, Kind.DISK, Kind.LIMIT, Kind.LAYOUT}  # not the other end's


class Group:
    """One process group. `device` is where tensors come from or go to: "cpu" or "cuda".

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
        self.others: Sequence[Group] = ()
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

    def _begin(self) -> None:
        """All that comes until the next call has one deadline."""
        self.deadline = time.monotonic() + self.timeout.total_seconds()

    def accompany(self, others: Sequence[Any]) -> None:
        """See `Transport`."""
        self.others = others

    def close(self) -> None:
        """Leaves the group at once, in whatever state the other ranks are; they see a closed connection."""
        group, self.group = self.group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):  # of a group that has broken already
                group.abort()
        for other in self.others:
            other.close()

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """From rank 0, in place; returns when the data has arrived."""
        self._finish(self._start([tensor]))
        return tensor

    def _start(self, tensors: Sequence[Tensor]) -> list[distributed.Work]:
        """Broadcasts from rank 0, in place; between GPUs all of them are one."""
        with self._unbroken():
            if self.wire.type != "cuda" or len(tensors) < 2:
                return [self.group.broadcast([tensor], c10d.BroadcastOptions()) for tensor in tensors]
            self.group._start_coalescing()
            for tensor in tensors:
                self.group.broadcast([tensor], c10d.BroadcastOptions())
            return [self.group._end_coalescing()]

    def _finish(self, works: Sequence[distributed.Work]) -> None:
        """Returns when what was started has arrived."""
        with self._unbroken():
            for work in works:
                work.wait(timedelta(seconds=max(left(self.deadline), 0.001)))  # 0 would mean no deadline

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        if self.group is None:
            raise ClusterError(f"the {self.where} was left; join a new one before the next sync")
        try:
            yield
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
        seen = bytes(self._broadcast(as_bytes(nonce, self.wire)).tolist())
        wanted = [prove(secret, "group", seen, str(place).encode()) for place in range(world_size)]
        blank = bytes(PROOF)
        said = as_bytes(b"".join(proof if place == rank else blank for place, proof in enumerate(wanted)), self.wire)
        with self._unbroken():
            works = [self.group.allreduce([said], c10d.AllreduceOptions())]
        self._finish(works)
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


def as_bytes(data: bytes, device: torch.device) -> Tensor:
    """A flat tensor of these bytes."""
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
