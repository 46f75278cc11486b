"""Who may use the engines: many that sample, or one that changes who they are."""

import contextlib
import threading
from collections.abc import Callable, Iterator

SLICE_SECONDS = 0.25


class Gate:
    """`sampling` for many threads at a time, `alone` for one and no other; who waits to be alone goes first.

    `look` is called while a thread waits, and may raise.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._changed = threading.Condition()
        self._sampling = 0
        self._waiting = 0
        self._owner: threading.Thread | None = None

    @property
    def waiting(self) -> bool:
        """Whether somebody wants to be alone."""
        return self._waiting > 0

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Around requests to engines that take turns with nothing else."""
        with self._changed:
            self._until(lambda: self._owner is None and not self._waiting)
            self._sampling += 1
        try:
            yield
        finally:
            with self._changed:
                self._sampling -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Around what no request may run beside. A thread that is alone may say so again."""
        me = threading.current_thread()
        if self._owner is me:
            yield
            return
        with self._changed:
            self._waiting += 1
            try:
                self._until(lambda: self._owner is None and not self._sampling)
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._owner = me
        try:
            yield
        finally:
            with self._changed:
                self._owner = None
                self._changed.notify_all()

    def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._look()
            self._changed.wait(SLICE_SECONDS)
