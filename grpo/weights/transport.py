"""How weights travel: what a sender and its receivers ask of a transport, and which one an address names."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

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


def choose_backend(config: Config, device: str, near: bool) -> str:
    """ "nccl", "gloo" or "ipc" by `sync.transport`; `near`: all ends are on one node of Ray.

    NCCL refuses a rank and an engine on one GPU. Beside sampling, what receives by NCCL waits for its turn on the GPU
    and what sends waits for it on the trainer's: training took 6.3 s in place of 2.4. A copy out of the sender's memory
    holds up nobody.
    """
    if config.sync.transport != "auto":
        return config.sync.transport
    if device != "cuda":
        return "gloo"
    return "ipc" if near or config.roles_share_gpus else "nccl"


def process_group(
    backend: str, config: Config, device: str, address: str, rank: int, world_size: int, secret: str
) -> Transport:
    """A process group that meets at host:port. Raises: ClusterError if not all ranks join in time."""
    from grpo.weights.process_group import GroupTransport

    return GroupTransport(backend, *_where(config, device, address, rank, world_size, secret))


def shared_gpu(config: Config, device: str, address: str, rank: int, world_size: int, secret: str) -> Transport:
    """Through the sender's GPU memory; through the host's where that cannot be read and there is no NCCL in its place.

    Raises: what `process_group` raises; WeightSyncError if it cannot be read otherwise.
    """
    from grpo.weights.shared_gpu import SharedGpuTransport

    strict = config.sync.transport == "ipc" or not config.roles_share_gpus
    return SharedGpuTransport(*_where(config, device, address, rank, world_size, secret), strict=strict)


def _where(config: Config, device: str, address: str, rank: int, world_size: int, secret: str) -> tuple[Any, ...]:
    """The arguments of a `Group`."""
    host, _, port = address.rpartition(":")
    return device, host, int(port), rank, world_size, secret, config.deadlines.sync


TRANSPORTS: dict[str, Callable[[Config, str, str, int, int, str], Transport]] = {
    "nccl": partial(process_group, "nccl"),
    "gloo": partial(process_group, "gloo"),
    "ipc": shared_gpu,
}
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
