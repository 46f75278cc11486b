"""The files of a run's starts, and whether the process behind one is still there; `lease` says what they are for."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from grpo.store import open_store
from grpo.store.files import json_object, read_regular

FOLDER = "attempts"
RECORD = 2048
"""Bytes of an attempt's file. It is always written whole, in one call, over what was there."""


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
    folder = run_dir / FOLDER
    attempt = newest_attempt(folder)
    holder = json_object(read_attempt(folder, attempt)) if attempt else {}
    pid = holder.get("pid")
    if holder.get("ended") or holder.get("machine") != machine() or is_gone(holder) or not isinstance(pid, int):
        return None
    with contextlib.suppress(psutil.NoSuchProcess, OverflowError, ValueError):
        return Holder(attempt, psutil.Process(pid))
    return None


def newest_attempt(folder: Path) -> int:
    """The number of the newest attempt, whatever has its name; 0 before the first. Raises CheckpointError."""
    with open_store(str(folder)).typed("be listed"):
        try:
            stems = [name.removesuffix(".json") for name in os.listdir(folder)]
        except FileNotFoundError:
            return 0
    return max((int(stem) for stem in stems if stem.isascii() and stem.isdecimal()), default=0)


def read_attempt(folder: Path, attempt: int) -> bytes:
    """An attempt's file; nothing where there is none. Raises CheckpointError for what is no file."""
    with open_store(str(folder)).typed(f"read {attempt_name(attempt)}"):
        try:
            return read_regular(folder / attempt_name(attempt), RECORD)
        except FileNotFoundError:
            return b""


def attempt_name(attempt: int) -> str:
    """Of an attempt's file."""
    return f"{attempt:06d}.json"


def machine() -> str:
    """Within one of these a pid means one process: a boot and a pid namespace (containers may share a host name)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def start_ticks(pid: int) -> int | None:
    """When a process was started, in the kernel's ticks since the boot, which no clock moves; None for one that ended.

    A zombie has ended. Raises OSError if the kernel does not say (a /proc that hides the processes of other users).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        with contextlib.suppress(ProcessLookupError, OverflowError):
            os.kill(pid, 0)
            raise  # it is there
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_gone(holder: dict[str, object]) -> bool:
    """True only if the holder ran here and its process is no more: gone, a zombie, or its pid is another process's."""
    pid, ticks = holder.get("pid"), holder.get("ticks")
    if holder.get("machine") != machine() or not isinstance(pid, int) or not isinstance(ticks, int):
        return False
    try:
        return start_ticks(pid) != ticks
    except OSError:  # then it is watched
        return False


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
