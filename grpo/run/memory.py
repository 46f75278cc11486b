"""Memory of this machine or container: its limit, what is used, who was killed for it, and what glibc keeps of it."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
KILLS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
GIB = 2**30
MAPPED_BYTES = 2**20
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of mallopt(3)


def memory_limit(cgroups: Sequence[str] = CGROUPS) -> int:
    """What the container may take, by cgroup v2 or v1; without a limit all that the machine has."""
    limits = [psutil.virtual_memory().total]
    for file in cgroups:
        text = Path(file).read_text().strip() if os.path.isfile(file) else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def oom_kills(files: Sequence[str] = KILLS) -> int:
    """How many processes the kernel has killed in this container, since it was made, for want of memory."""
    for file in files:
        try:
            rows = [line.split() for line in Path(file).read_text().splitlines()]
        except OSError:
            continue
        return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] == "oom_kill" and row[1].isdigit())
    return 0


def host_memory() -> str:
    """In words: what this process holds, what is free, and the limit."""
    held, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    return f"this process holds {held / GIB:.1f} GiB, {free / GIB:.1f} GiB are free, the limit is {limit_in_words()}"


def limit_in_words() -> str:
    """The memory of this machine or container."""
    return f"{memory_limit() / GIB:.1f} GiB"


def return_freed_memory() -> None:
    """Lets glibc give back what the controller frees; elsewhere nothing happens.

    Each commit reads the checkpoint back in new threads. Their heaps keep what was freed there: 13 to 23 MB more
    after each of them, though nothing is in use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)  # and it no longer rises with what is freed
