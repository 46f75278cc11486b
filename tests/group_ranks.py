"""Ranks of a transfer group in processes of their own, which a test may kill; the fork server has imported torch."""

from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from tests.ranks import CONTEXT

GROUP_SECONDS, TENSORS = 40.0, 20


class GroupRank:
    """A process that joins one group after the other and says what came of each."""

    def __init__(self) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self, seconds: float = 180) -> Any:
        assert self.pipe.poll(seconds), f"a rank has not answered after {seconds} s"
        return self.pipe.recv()


def serve(pipe: Connection) -> None:
    """Told (port, place of three, tensors after which the sender pauses): the number of tensors moved, or the error."""
    from grpo.errors import ClusterError
    from grpo.weights import process_group

    process_group.BUCKET_BYTES = {"cpu": 1}
    while True:
        port, place, pause = pipe.recv()
        end = process_group.GroupTransport("gloo", "cpu", "127.0.0.1", port, place, 3, "secret", GROUP_SECONDS)
        try:
            pipe.send(len(end.send(0, tensors(pause, pipe)) if place == 0 else list(end.receive())))
        except ClusterError as error:
            pipe.send(str(error))
        end.close()


def tensors(pause: int | None, pipe: Connection) -> Iterator[tuple[str, Any]]:
    import torch

    for number in range(TENSORS):
        if number == pause:
            pipe.send("paused")
            assert pipe.recv() == "go on"
        yield f"t{number}", torch.full((1000,), float(number))
