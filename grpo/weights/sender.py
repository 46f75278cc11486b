"""The trainer's end of a sync, and what it asks of a transport."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from grpo.types import Manifest, TensorRecord

if TYPE_CHECKING:
    from torch import Tensor


class Transport(Protocol):
    """Moves named tensors from rank 0 to all other ranks. Every rank takes part in every call."""

    def send(self, tensors: "Iterable[tuple[str, Tensor]]") -> tuple[TensorRecord, ...]:
        """Rank 0: sends the tensors in order and returns their records, with digests taken before sending.

        Each tensor is copied when it comes, so it may be freed before the next is asked for.
        """
        ...

    def receive(self) -> "Iterator[tuple[TensorRecord, Tensor]]":
        """Other ranks: yields what rank 0 sends, in its order, with the digest of the bytes received.

        Must be read to the end: a reader that stops early leaves the sender waiting.
        """
        ...

    def close(self) -> None: ...


class Sender:
    """Trainer rank 0's end of a transport."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def send(self, version: int, tensors: "Iterable[tuple[str, Tensor]]") -> Manifest:
        """Sends all tensors to all engine workers and says what was sent.

        Raises: ClusterError if a worker breaks off or takes longer than `deadlines.sync`.
        """
        return Manifest(version, self.transport.send(tensors))

    def close(self) -> None:
        self.transport.close()
