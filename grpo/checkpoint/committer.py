"""One commit at a time, in a thread beside the steps.

The thread writes, hashes and renames; whoever trains asks now and then what has come of it, and waits where a step must
be safe before it goes on. What a commit failed with is raised there, as if it had been made in that moment.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol

from grpo.checkpoint.commit import Commit
from grpo.errors import DeadlineExceeded, Interrupted
from grpo.run.stopping import StopRequest
from grpo.run.threads import give_way
from grpo.types import FileRecord

SLICE_SECONDS = 0.1
CLOSING_SECONDS = 5.0
CLOSING_SHARE = 0.2
"""Of the grace period, at most CLOSING_SECONDS, are left to end the workers; a commit that takes longer is given up."""


class Folders(Protocol):
    """Where commits are made; `Checkpoints` is one."""

    renamed_at: float
    """When, by time.monotonic(), the last commit got its name."""

    def begin(self, step: int) -> str:
        """Path or URL of a fresh folder for the files of a step."""
        ...

    def commit(
        self,
        step: int,
        records: Sequence[FileRecord],
        state: Mapping[str, object],
        score: float | None,
        attachments: Mapping[str, bytes],
    ) -> Commit:
        """Makes the files of `begin`'s folder, with state and attachments, the newest checkpoint."""
        ...


@dataclass(frozen=True)
class Content:
    """What a commit holds beside the files of the ranks."""

    state: Mapping[str, object]
    score: float | None
    attachments: Mapping[str, bytes]


@dataclass(frozen=True)
class Durable:
    """A commit that has ended well."""

    commit: Commit
    stall_seconds: float
    """What the training waited for it."""
    seconds: float
    """From the beginning of its copy to the rename."""


class Committer:
    """Commits steps. All verbs are called by one thread; `seconds` is what the disk may take at most."""

    def __init__(self, folders: Folders, stop: StopRequest, seconds: float) -> None:
        self.folders, self.stop, self.seconds = folders, stop, seconds
        self.step = -1
        """Of the commit that was begun last."""
        self._future: Future[Commit] | None = None
        self._given_up = threading.Event()
        self._began = self._stalled = 0.0
        self._disk_since: float | None = None

    @property
    def ended(self) -> bool:
        """Whether `take` has something to tell."""
        return self._future is not None and self._future.done()

    @property
    def busy(self) -> bool:
        """Whether a commit is under way."""
        return self._future is not None and not self._future.done()

    def begin(
        self, step: int, began: float, write: Callable[[str, int], Sequence[FileRecord]], content: Callable[[], Content]
    ) -> None:
        """Starts a commit: `write` fills its folder, then `content` says what else it holds; both in the thread.

        `began` is when the training began to wait, by time.monotonic().
        """
        assert self._future is None, "the commit before is taken first"
        self.step, self._began, self._stalled = step, began, time.monotonic() - began
        self.stop.reserve_seconds *= 2  # a stop may have to wait for this one and then make another
        self._future = future = Future[Commit]()

        def run() -> None:
            give_way()
            try:
                future.set_result(self._commit(step, write, content))
            except BaseException as error:  # raised again by whoever takes it
                future.set_exception(error)

        threading.Thread(target=run, name="commit", daemon=True).start()

    def take(self) -> Durable | None:
        """The commit that has ended since; None if none has. Raises what it failed with."""
        if self._future is None or not self._future.done():
            return None
        future, self._future = self._future, None
        self.stop.reserve_seconds /= 2
        commit = future.result()
        seconds = self.folders.renamed_at - self._began
        self.stop.reserve_seconds = max(seconds, self._stalled)
        return Durable(commit, self._stalled, seconds)

    def finish(self, alive: Callable[[], None]) -> Durable | None:
        """As `take`, once no commit is under way; `alive` is called meanwhile.

        Raises Interrupted, and gives the commit up, when a request to stop leaves no more time; DeadlineExceeded when
        the disk has been silent for too long.
        """
        began = time.monotonic()
        while self._future is not None and not wait([self._future], SLICE_SECONDS).done:
            alive()
            if self.stop.requested and self.stop.seconds_left < min(
                CLOSING_SECONDS, CLOSING_SHARE * self.stop.grace_seconds
            ):
                self.give_up()
                raise Interrupted(f"the commit of step {self.step} was given up")
            since = self._disk_since
            if since is not None and time.monotonic() - since > self.seconds:
                self.give_up()
                raise DeadlineExceeded(
                    f"checkpoint.dir: what ranks wrote must be committed within {self.seconds:g} s (deadlines.save for "
                    f"each rank), but step {self.step} is not; look at the disk, or raise the deadline"
                )
        self._stalled += time.monotonic() - began
        return self.take()

    def give_up(self) -> None:
        """Nobody waits for the commit under way any more, and it must not become one."""
        self._given_up.set()

    def _commit(
        self, step: int, write: Callable[[str, int], Sequence[FileRecord]], content: Callable[[], Content]
    ) -> Commit:
        with self._disk():
            folder = self.folders.begin(step)
        records = write(folder, step)
        made = content()
        with self._disk():
            return self.folders.commit(step, records, made.state, made.score, made.attachments)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Inside, only the disk is waited for."""
        if self._given_up.is_set():
            raise Interrupted("given up")
        self._disk_since = time.monotonic()
        try:
            yield
        finally:
            self._disk_since = None
