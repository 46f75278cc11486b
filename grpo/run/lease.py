"""One run per folder: who may write to a run's folder, and a number for each start.

`attempts/000003.json` belongs to the third start. It is made with O_EXCL, so of many starts exactly one gets it; its
holder rewrites it, with a counter that grows, several times within `run.lease_seconds` and marks it when it ends. A new
start takes the next number

- at once if the newest attempt has ended, or if its process is gone from this very machine;
- else after it has watched the newest file for lease_seconds and the file has not changed. It never compares clocks.

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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from grpo.errors import CheckpointError, Fenced
from grpo.run.stopping import StopRequest
from grpo.store import Store, open_store

FOLDER = "attempts"
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
        self._store = open_store(str(run_dir / FOLDER))
        self._token = uuid.uuid4().hex
        self._count = 0
        self._beaten = 0.0
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        while True:
            newest = self._newest()
            if newest:
                self._wait_for(newest)
            self.attempt = newest + 1
            if self._store.write_new(_name(self.attempt), self._content()):
                break
        self._beaten = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=self.seconds)
        with self._lock:
            try:
                if self._lost is None and self._owned():
                    self._store.write(_name(self.attempt), self._content(ended=True))
            except CheckpointError:
                self._lost = "it could not be given back"  # then the next start waits for lease_seconds

    def check(self) -> None:
        """Raises Fenced if this start may no longer write, because a newer one has taken the folder or may have."""
        with self._lock:
            if self._lost is None:
                self._look()
            if self._lost is None and time.monotonic() - self._beaten > self.seconds:
                self._beat()
            if self._lost is None and time.monotonic() - self._beaten > self.seconds:
                self._lost = f"its heartbeat could not be written for {self.seconds:g} s"
            if self._lost is not None:
                raise Fenced(
                    f"run.dir: a run writes to {self.run_dir} only while it holds it, but attempt {self.attempt} does "
                    f"not: {self._lost}; nothing of this attempt is written any more, let the newer one run"
                )

    def _keep_beating(self) -> None:
        while self._lost is None and not self._stop.wait(self.seconds / BEATS):
            with self._lock:
                self._beat()

    def _beat(self) -> None:
        """One heartbeat. A disk that fails is tried again at the next; `check` counts the time."""
        try:
            self._look()
            if self._lost is None:
                self._count += 1
                self._store.write(_name(self.attempt), self._content())
                self._beaten = time.monotonic()
        except CheckpointError:
            return

    def _look(self) -> None:
        """Finds out whether the folder was lost."""
        try:
            newest = self._newest()
            if newest > self.attempt:
                self._lost = f"attempt {newest} has taken over"
            elif not self._owned():
                self._lost = f"its file {FOLDER}/{_name(self.attempt)} is gone or another start's"
        except CheckpointError:
            return  # the folder cannot be read now; `check` counts the time since the last heartbeat

    def _owned(self) -> bool:
        return _holder(self._read(self.attempt)).get("token") == self._token

    def _wait_for(self, attempt: int) -> None:
        """Returns once the attempt is dead. Raises Fenced when it shows that it lives on."""
        seen, since, patience = self._read(attempt), time.monotonic(), 0.0
        while time.monotonic() - since <= self.seconds:
            if self._request:
                self._request.check()
            content = self._read(attempt)
            holder = _holder(content)
            if holder.get("ended") or _is_gone(holder):
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

    def _newest(self) -> int:
        return _newest(self._store)

    def _read(self, attempt: int) -> bytes:
        return _read(self._store, attempt)

    def _content(self, ended: bool = False) -> bytes:
        process = psutil.Process()
        holder = {"attempt": self.attempt, "host": socket.gethostname(), "machine": _machine(), "pid": process.pid}
        state = {"created": process.create_time(), "token": self._token, "beat": self._count, "ended": ended}
        if self._request and self._request.requested:
            state["stopping"] = max(0.0, self._request.seconds_left)
        return json.dumps(holder | state).encode()


@dataclass(frozen=True)
class Holder:
    """A start that holds a run's folder and whose process is on this machine."""

    attempt: int
    process: psutil.Process

    @property
    def ended(self) -> bool:
        """Whether its process is gone, or a zombie."""
        return not self.process.is_running() or _is_zombie(self.process)


def holder_here(run_dir: Path) -> Holder | None:
    """The start that holds the folder, if it runs on this very machine (in this container)."""
    store = open_store(str(run_dir / FOLDER))
    attempt = _newest(store)
    holder = _holder(_read(store, attempt)) if attempt else {}
    pid = holder.get("pid")
    if holder.get("ended") or holder.get("machine") != _machine() or _is_gone(holder) or not isinstance(pid, int):
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        return Holder(attempt, psutil.Process(pid))
    return None


def _newest(store: Store) -> int:
    """The number of the newest attempt; 0 before the first."""
    numbers = [name.removesuffix(".json") for name in store.names()]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _read(store: Store, attempt: int) -> bytes:
    return store.read(_name(attempt)) if store.exists(_name(attempt)) else b""


def _name(attempt: int) -> str:
    return f"{attempt:06d}.json"


def _holder(content: bytes) -> dict[str, object]:
    """What an attempt's file says; nothing if it was cut off when its start was killed."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _machine() -> str:
    """Within one of these a pid means one process: a boot and a pid namespace (containers may share a host name)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _is_gone(holder: dict[str, object]) -> bool:
    """True only if the holder ran here and its process is no more: gone, a zombie, or its pid is another process's."""
    pid, created = holder.get("pid"), holder.get("created")
    if holder.get("machine") != _machine() or not isinstance(pid, int) or created is None:
        return False
    try:
        process = psutil.Process(pid)
        return _is_zombie(process) or process.create_time() != created
    except psutil.NoSuchProcess:
        return True


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
