"""Whether Ray's head (the GCS) is alive, and which nodes are about to go away."""

import contextlib
import threading
import time
from typing import Protocol

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError

from grpo.cluster import ray_private
from grpo.errors import ClusterError
from grpo.run.threads import start_lasting


class Head(Protocol):
    """What waits ask of it."""

    draining: frozenset[str]
    """Ids of all nodes that were ever about to go away."""

    @property
    def lost(self) -> bool:
        """Whether it is dead or frozen."""
        ...

    def check(self) -> None:
        """Raises ClusterError if it is lost."""
        ...


class HeadHeartbeat:
    """Asks Ray's head for a sign of life in the background; a frozen one is reported by nobody else.

    Like Heartbeat it counts only time that it has watched. The death of `process`, if it runs here, is noticed at once.
    `draining` are the ids of all nodes that were ever about to go away.
    """

    def __init__(self, seconds: float, process: psutil.Process | None = None) -> None:
        self.seconds, self.process = seconds, process
        self.pause, self.patience = min(1.0, seconds / 4), seconds / 4
        self.seconds_since_heartbeat = 0.0
        self.error = ""
        self.draining: frozenset[str] = frozenset()
        self._ended = threading.Event()
        self._thread = start_lasting("head-heartbeat", self._ask, self._ended)

    @property
    def lost(self) -> bool:
        """Whether it is dead or frozen."""
        return self.seconds_since_heartbeat >= self.seconds

    def check(self) -> None:
        """Raises ClusterError if the head has been silent for `seconds`."""
        if self.lost:
            raise ClusterError(
                f"Ray's head must answer within deadlines.health = {self.seconds:g} s, but it is dead or frozen "
                f"({self.error}); start the run again, it resumes from its last checkpoint"
            )

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        client = ray_private.driver_head_client()
        node = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())
        asked = time.monotonic()
        while not self._ended.wait(self.pause):
            if self.process and has_ended(self.process):
                self.seconds_since_heartbeat, self.error = self.seconds, "its process has ended"
                return
            try:
                client.check_alive([node], timeout=self.patience)
                self.seconds_since_heartbeat = 0.0
            except (RayError, GetTimeoutError, RuntimeError, OSError, MemoryError) as error:
                self.error = str(error) or type(error).__name__
                self.seconds_since_heartbeat += min(time.monotonic() - asked, self.pause + self.patience)
            # A head that is silent tells nothing.
            with contextlib.suppress(RayError, GetTimeoutError, RuntimeError, OSError):
                self.draining |= client.get_draining_nodes(timeout=self.patience).keys()
            asked = time.monotonic()


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone or a zombie."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
