"""Signs of life of workers that somebody waits for: Ray reports a dead process, and never a frozen one."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from grpo.errors import EngineLost
from grpo.interfaces import Call, Worker

SLICE_SECONDS = 0.25  # between two looks at signals, the head and the workers
Ask = Callable[[Any, float], Call[object]]
"""(worker, seconds) -> a call that is a sign of life."""


def process_lives(worker: Worker, seconds: float) -> Call[object]:
    """Asks the worker's process alone, whatever it is busy with."""
    return worker.ping(seconds)


class Heartbeat:
    """How long the workers of one wait have given no sign of life. Without `ask` they are asked nothing.

    Only time that this process has watched counts: if it was frozen itself, or busy with another worker, the workers
    are asked before they are blamed.
    """

    def __init__(self, workers: Sequence[Worker], ask: Ask | None, seconds: float) -> None:
        self.ask, self.seconds = ask, seconds
        self.seconds_since_heartbeat = {worker: 0.0 for worker in workers if ask}
        self.looked = time.monotonic()
        self.asked: dict[Future[object], Worker] = {}

    def frozen(self, waiting: set[Worker]) -> list[Worker]:
        """Workers in `waiting` that have been silent for too long; asks again those that have answered."""
        now = time.monotonic()
        watched, self.looked = min(now - self.looked, 2 * SLICE_SECONDS), now
        self.seconds_since_heartbeat = {
            worker: seconds + watched for worker, seconds in self.seconds_since_heartbeat.items()
        }
        for future in [future for future in self.asked if future.done()]:
            worker, error = self.asked.pop(future), future.exception()
            if error is None:
                self.seconds_since_heartbeat[worker] = 0.0
            elif isinstance(error, EngineLost):  # its process lives, but the engine core does not answer
                self.seconds_since_heartbeat[worker] = self.seconds
        for worker in set(self.seconds_since_heartbeat) - set(self.asked.values()):
            if self.ask and self.seconds_since_heartbeat[worker] > self.seconds / 4:
                self.asked[self.ask(worker, self.seconds / 2).future] = worker
        return [
            worker
            for worker, seconds in self.seconds_since_heartbeat.items()
            if worker in waiting and seconds >= self.seconds
        ]
