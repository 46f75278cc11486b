"""The trainer's end of a sync, and what it asks of a transport."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from grpo.types import Manifest, TensorRecord

if TYPE_CHECKING:
    from torch import Tensor


class Transport(Protocol):
    """Moves named tensors from rank 0 to all other ranks. Every rank takes part in every call."""

    def send(self, version: int, tensors: "Iterable[tuple[str, Tensor]]") -> tuple[TensorRecord, ...]:
        """Rank 0: sends the tensors in order and returns their records, with digests taken before sending.

        Each tensor is copied when it comes, so it may be freed before the next is asked for. If anything fails, the
        group is left, and the receivers fail too.
        """
        ...

    def receive(self) -> "Iterator[tuple[TensorRecord, Tensor]]":
        """Other ranks: yields what rank 0 sends, in its order, with the digest of the bytes received.

        Must be read to the end: a reader that stops early leaves the sender waiting.
        """
        ...

    def close(self) -> None:
        """Leaves the group without waiting for any other rank, dead or alive. May be called again."""
        ...


class Sender:
    """Trainer rank 0's end of a transport."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def send(self, version: int, tensors: "Iterable[tuple[str, Tensor]]") -> Manifest:
        """Sends all tensors to all engine workers and says what was sent.

        Raises: ClusterError if a worker breaks off or takes longer than `deadlines.sync`; the group is then left.
        """
        return Manifest(version, self.transport.send(version, tensors))

    def close(self) -> None:
        """Leaves the group; needed before another one is joined."""
        self.transport.close()
