"""Work that runs ahead of the loop, in threads of its own, and ends when it is told to."""

import threading
import time
from collections.abc import Callable

from grpo.run.stopping import StopRequest


class Cancelled(Exception):
    """Raised in a thread of `Background` that was told to end; nobody else sees it."""


class Background:
    """The threads of one run that work ahead. They pass `check` wherever they wait."""

    def __init__(self) -> None:
        self._threads: set[threading.Thread] = set()
        self._cancelled = threading.Event()
        self._starting = threading.Lock()
        """Nobody joins a thread that is known and does not run yet."""

    def start(self, name: str, work: Callable[[], object]) -> None:
        """Does `work` beside the caller. What it raises must be of use to somebody: it is on its own there."""

        def run() -> None:
            try:
                work()
            except Cancelled:
                pass
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._starting:
            self._threads.add(thread)
            thread.start()

    @property
    def mine(self) -> bool:
        """Whether the current thread is one of them."""
        return threading.current_thread() in self._threads

    def check(self) -> None:
        """Raises Cancelled in a thread that must end."""
        if self._cancelled.is_set() and self.mine:
            raise Cancelled

    def look(self, stop: StopRequest, finish_first: bool = False) -> None:
        """What a wait asks now and then: Cancelled as in `check`, in other threads Interrupted as `stop` says."""
        if self.mine:
            self.check()
        else:
            stop.check(finish_first)

    def cancel(self) -> None:
        """Tells all threads to end."""
        self._cancelled.set()

    def join(self, seconds: float) -> bool:
        """Whether all threads have ended after `cancel`, within that time; then new ones may start."""
        deadline = time.monotonic() + seconds
        while left := self._left():  # one that ends may have started another
            if time.monotonic() > deadline:
                return False
            for thread in left:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._cancelled.clear()
        return True

    def _left(self) -> list[threading.Thread]:
        with self._starting:
            return list(self._threads)
