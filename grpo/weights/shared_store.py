"""A store that a group of torch forms by, in the memory of each rank, kept alike over proven connections."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from grpo.weights.rendezvous import PAUSE_SECONDS, Member, hang_up


class KeyStore(Protocol):
    """What is asked of torch's HashStore."""

    def list_keys(self) -> list[str]:
        """All keys."""
        ...

    def get(self, key: str) -> bytes:
        """The value of a key."""
        ...

    def set(self, key: str, value: bytes) -> None:
        """Wakes up who waits for the key."""
        ...


class SharedStore:
    """Keeps the stores of all ranks alike until `close`: what one writes, the others find.

    A connection that breaks meanwhile is in `broken`; the group that waits for a key then runs into its own deadline.
    """

    def __init__(self, store: KeyStore, members: list[Member], deadline: float) -> None:
        self.store, self.members, self.deadline = store, members, deadline
        self.broken = ""
        self._known: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads = [self._start(self._send_news)]
        self._threads += [self._start(partial(self._take_news, member)) for member in members]

    def close(self) -> None:
        """Hangs up on the other ranks."""
        self._ended.set()
        for member in self.members:
            hang_up(member.connection)
        for thread in self._threads:
            thread.join()
        for member in self.members:
            member.connection.close()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except (OSError, ValueError) as error:
                if not self._ended.is_set():
                    self.broken = str(error)

        thread = threading.Thread(target=run, name="transfer-store", daemon=True)
        thread.start()
        return thread

    def _send_news(self) -> None:
        while not self._ended.wait(PAUSE_SECONDS):
            with self._lock:
                news = [key for key in self.store.list_keys() if key not in self._known]
                self._tell({key: self.store.get(key).hex() for key in news}, self.members)

    def _take_news(self, member: Member) -> None:
        while True:
            news = member.receive(self.deadline)
            with self._lock:
                for key, value in news.items():
                    self._known.add(key)
                    self.store.set(key, bytes.fromhex(value))
                self._tell(news, [other for other in self.members if other is not member])

    def _tell(self, news: dict[str, str], members: list[Member]) -> None:
        self._known.update(news)
        if news:
            for member in members:
                member.send(news, self.deadline)
