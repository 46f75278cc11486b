"""One run per folder: who may write to a run's folder, and a number for each start.

`attempts/000003.json` belongs to the third start. It is made with O_EXCL, so of many starts exactly one gets it; its
holder keeps it open and writes into it, with a counter that grows, several times within `run.lease_seconds`, and marks
it when it ends. A heartbeat thus needs no descriptor, no room on the disk and no new name. A new start takes the next
number

- at once if the newest attempt has ended, or if its process is gone from this very machine: no process has its pid, or
  one that was started at another tick after the boot;
- else after it has watched the newest file for lease_seconds and the file has not changed. It never compares clocks:
  ticks and patience are counted by the kernel, and nobody sets them.

A file that changes belongs to a living start, and the new one is refused, unless the file says that its holder was told
to stop: Kubernetes may start the next pod while the one before still commits. That one is waited for.

A holder that was frozen for so long finds a newer number when it wakes up: `check` raises Fenced, before every commit.
It only ever writes its own file, so it cannot disturb the newer start.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from grpo.errors import Fenced
from grpo.run.attempts import (
    FOLDER,
    RECORD,
    attempt_name,
    is_gone,
    machine,
    newest_attempt,
    read_attempt,
    start_ticks,
)
from grpo.run.stopping import StopRequest
from grpo.run.threads import start_lasting
from grpo.store import open_store
from grpo.store.files import json_object, read_regular

BEATS = 3
"""Heartbeats within lease_seconds."""


class Lease:
    """`with Lease(run_dir, seconds) as lease:` holds the folder; `lease.attempt` counts the starts of the run from 1.

    Entering raises Fenced while another start holds the folder (after at most about lease_seconds, or what is left of
    the other's grace period and lease_seconds if that one is stopping), CheckpointError if the folder cannot be
    written, Interrupted after a request to `stop`, which also makes the holder say that it is stopping.
    """

    def __init__(self, run_dir: Path, seconds: float, stop: StopRequest | None = None) -> None:
        self.run_dir = run_dir
        self.seconds = seconds
        self.attempt = 0
        self._request = stop
        self._folder = run_dir / FOLDER
        self._token = uuid.uuid4().hex
        self._who = {"host": socket.gethostname(), "machine": machine(), "pid": os.getpid()}
        self._who["ticks"] = start_ticks(os.getpid())
        self._file = -1
        self._count = 0
        self._beaten = 0.0
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        store = open_store(str(self._folder))
        while True:
            newest = newest_attempt(self._folder)
            if newest:
                self._wait_for(newest)
            self.attempt = newest + 1
            if store.write_new(attempt_name(self.attempt), self._content()):
                break
        with store.typed(f"open {attempt_name(self.attempt)}"):
            self._file = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW)
        self._beaten = time.monotonic()
        self._thread = start_lasting("lease", self._keep_beating, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        assert self._thread, "left before it was entered"
        self._thread.join(timeout=self.seconds)
        if not self._lock.acquire(timeout=self.seconds):  # the disk hangs; then the next start waits for lease_seconds
            return
        try:
            self._look()
            if self._lost is None:
                with contextlib.suppress(OSError):
                    self._write(ended=True)
        finally:
            file, self._file = self._file, -1
            if file >= 0:
                os.close(file)
            self._lost = self._lost or "it has ended"  # for whoever still writes
            self._lock.release()

    def check(self) -> None:
        """Raises Fenced if this start may no longer write, because a newer one has taken the folder or may have."""
        if not self._lock.acquire(timeout=self.seconds):
            self._lost = self._lost or f"its heartbeat has been waiting for the disk for {self.seconds:g} s"
            self._refuse()
        try:
            if self._lost is None:
                self._look()
            if self._lost is None and time.monotonic() - self._beaten > self.seconds:
                self._beat()
            if self._lost is None and time.monotonic() - self._beaten > self.seconds:
                self._lost = f"its heartbeat could not be written for {self.seconds:g} s"
        finally:
            self._lock.release()
        if self._lost is not None:
            self._refuse()

    def _refuse(self) -> None:
        raise Fenced(
            f"run.dir: a run writes to {self.run_dir} only while it holds it, but attempt {self.attempt} does "
            f"not: {self._lost}; nothing of this attempt is written any more, let the newer one run"
        )

    @property
    def _path(self) -> Path:
        return self._folder / attempt_name(self.attempt)

    def _keep_beating(self) -> None:
        while self._lost is None and not self._stop.wait(self.seconds / BEATS):
            with self._lock:
                self._beat()

    def _beat(self) -> None:
        """One heartbeat. A disk that fails is tried again at the next; `check` counts the time."""
        self._look()
        if self._lost is None:
            self._count += 1
            with contextlib.suppress(OSError):
                self._write()
                self._beaten = time.monotonic()

    def _write(self, ended: bool = False) -> None:
        """Over what is there: it needs no free descriptor, which a run that has used up its own does not have."""
        content = self._content(ended)
        if os.pwrite(self._file, content, 0) != len(content):
            raise OSError("written in part")
        os.fsync(self._file)

    def _look(self) -> None:
        """Finds out whether the folder was lost; needs no descriptor either where the file is its own."""
        try:
            if os.path.lexists(self._folder / attempt_name(self.attempt + 1)):
                self._lost = f"attempt {self.attempt + 1} has taken over"
            elif not self._owned():
                self._lost = f"its file {FOLDER}/{attempt_name(self.attempt)} is gone or another start's"
        except OSError:
            return  # the folder cannot be read now; `check` counts the time since the last heartbeat

    def _owned(self) -> bool:
        try:
            if os.path.samestat(os.stat(self._path, follow_symlinks=False), os.fstat(self._file)):
                return True
            # Not every network disk numbers its files for good.
            return json_object(read_regular(self._path, RECORD)).get("token") == self._token
        except FileNotFoundError:
            return False

    def _wait_for(self, attempt: int) -> None:
        """Returns once the attempt is dead. Raises Fenced when it shows that it lives on."""
        seen, since, patience = read_attempt(self._folder, attempt), time.monotonic(), 0.0
        while time.monotonic() - since <= self.seconds:
            if self._request:
                self._request.check()
            content = read_attempt(self._folder, attempt)
            holder = json_object(content)
            if holder.get("ended") or is_gone(holder):
                return
            if not patience and isinstance(grace := holder.get("stopping"), int | float):
                patience = time.monotonic() + grace + self.seconds
                print(f"waiting for attempt {attempt} on host {holder.get('host')}, which is stopping", flush=True)
            if content != seen and seen and time.monotonic() > patience:
                raise Fenced(
                    f"run.dir: one run at a time may write to {self.run_dir}, but attempt {attempt} is alive (process "
                    f"{holder.get('pid')} on host {holder.get('host')}); wait for it, stop it or choose another run.dir"
                )
            if content != seen:  # it was just made and is only now written, or it is stopping
                seen, since = content, time.monotonic()
            time.sleep(min(0.2, self.seconds / 20))

    def _content(self, ended: bool = False) -> bytes:
        state = {"attempt": self.attempt, "token": self._token, "beat": self._count, "ended": ended}
        if self._request and self._request.requested:
            state["stopping"] = max(0.0, self._request.seconds_left)
        return json.dumps(self._who | state).encode().ljust(RECORD)
