"""How weights travel: what a sender and its receivers ask of a transport, and which one an address names."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from grpo.config import Config
from grpo.errors import WeightSyncError
from grpo.types import Stats, TensorRecord

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.weights.process_group import Place


class Transport(Protocol):
    """Moves named tensors from rank 0 to all other ranks. Every rank takes part in every call."""

    def send(self, version: int, tensors: "Iterable[tuple[str, Tensor]]") -> tuple[TensorRecord, ...]:
        """Rank 0: sends the tensors in order and returns their records, with digests taken before sending.

        Those of a sequence stay as they are until all is sent. Else each is copied when it comes, so it may be freed
        before the next is asked for. If anything fails, the group is left, and the receivers fail too.
        Raises: ClusterError if a receiver breaks off, or if it takes longer than `deadlines.sync` until all is sent.
        """
        ...

    def receive(self, place: "Place" = ...) -> "Iterator[tuple[TensorRecord, Tensor]]":
        """Other ranks: yields what rank 0 sends, in its order, with the digest of the bytes received.

        `place` says where a tensor belongs: it is that tensor then which is yielded, and whose bytes have the digest.
        Must be read to the end: a reader that stops early leaves the sender waiting.
        """
        ...

    def accompany(self, others: "Sequence[Transport]") -> None:
        """Rank 0: what it sends goes to the others of the same kind too, and it closes them."""
        ...

    def close(self) -> None:
        """Leaves the group without waiting for any other rank, dead or alive. May be called again."""
        ...


def seconds_of(transport: Transport) -> Stats:
    """What its last transfer took, by part; nothing of one that does not tell it as `seconds`."""
    return dict(getattr(transport, "seconds", {}))


def choose_backend(config: Config, device: str) -> str:
    """ "nccl", "gloo" or "ipc" by `sync.transport`. NCCL refuses a rank and an engine on one GPU.

    By it engines that share a GPU take places in several groups: see `lane`.
    """
    if config.sync.transport != "auto":
        return config.sync.transport
    if device != "cuda":
        return "gloo"
    return "ipc" if config.roles_share_gpus else "nccl"


def process_group(config: Config, device: str, address: str, rank: int, world_size: int, secret: str) -> Transport:
    """A process group that meets at host:port. Raises: ClusterError if not all ranks join in time."""
    from grpo.weights.process_group import GroupTransport
    from grpo.weights.shared_gpu import SharedGpuTransport

    host, _, port = address.rpartition(":")
    backend = choose_backend(config, device)
    where = device, host, int(port), rank, world_size, secret, config.deadlines.sync
    if backend == "ipc":
        return SharedGpuTransport(*where, strict=config.sync.transport == "ipc")
    return GroupTransport(backend, *where)


TRANSPORTS: dict[str, Callable[[Config, str, str, int, int, str], Transport]] = {"tcp": process_group}
"""By the scheme of a transfer's url."""


def make_transport(config: Config, device: str, url: str, rank: int, world_size: int, secret: str) -> Transport:
    """Joins a transfer: rank 0 is the trainer's rank 0, the other ranks are engine workers. `device`: "cpu" or "cuda".

    Blocks until all ranks have joined and each has proved to the others that it knows the `secret` of this transfer.
    Raises: ClusterError if they do not within `deadlines.sync`; WeightSyncError if the transfer moves no data, or for a
    url of an unknown kind.
    """
    scheme, _, address = url.partition("://")
    if scheme not in TRANSPORTS:
        raise WeightSyncError(
            f"weights travel by {', '.join(TRANSPORTS)}, but the trainer offers {url}; use the same grpo everywhere"
        )
    return TRANSPORTS[scheme](config, device, address, rank, world_size, secret)


def make_sender(config: Config, device: str, transfers: Sequence[tuple[str, int, str]]) -> Transport:
    """Joins every transfer, by url, world size and secret, as rank 0; what it sends goes to all of them.

    Raises: what `make_transport` raises; no group is left behind then.
    """
    with contextlib.ExitStack() as opened:
        ends = []
        for url, world_size, secret in transfers:
            ends.append(make_transport(config, device, url, 0, world_size, secret))
            opened.callback(ends[-1].close)
        first, *others = ends
        if others:
            first.accompany(others)
        opened.pop_all()
    return first
