"""The request to stop, and the time that is left then: SIGTERM, as Kubernetes and a spot node send it, Ctrl-C, or
SIGHUP, as a terminal that is closed sends it (unless `nohup` has turned that off).

A signal sets a flag; waits look at it. Only inside of `abortable`, where nothing can be left half done, does the
handler raise at once.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from grpo.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Use it as a context manager around everything that may have to be stopped; only in the main thread."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.reserve_seconds = 0.0
        """What committing takes; kept up to date by who commits."""
        self._requested: float | None = None
        self._name = ""
        self._abortable = False

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Takes the signals; again after ray.init, which installs handlers of its own."""
        for number in SIGNALS:
            if number != signal.SIGHUP or self._handlers[number] is not signal.SIG_IGN:
                signal.signal(number, self._request)

    @property
    def requested(self) -> bool:
        """Whether one of SIGNALS has come."""
        return self._requested is not None

    @property
    def seconds_left(self) -> float:
        """Until the process is killed; the whole grace period before a request."""
        spent = 0.0 if self._requested is None else time.monotonic() - self._requested
        return self.grace_seconds - spent

    @property
    def time_to_commit(self) -> bool:
        """Whether enough of the grace period is left to commit, with half as much again to spare."""
        return self.seconds_left > 1.5 * self.reserve_seconds

    def check(self, finish_first: bool = False) -> None:
        """Raises Interrupted after a request; with `finish_first` only once no time but that to commit is left."""
        if self.requested and not (finish_first and self.time_to_commit):
            raise Interrupted(f"stopped by {self._name}")

    @contextlib.contextmanager
    def abortable(self) -> Iterator[None]:
        """Inside, a request raises Interrupted at once, wherever the main thread is."""
        self.check()
        self._abortable = True
        try:
            yield
        finally:
            self._abortable = False

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if self._requested is None:
            self._requested, self._name = time.monotonic(), signal.Signals(number).name
        if self._abortable:
            self._abortable = False
            self.check()
