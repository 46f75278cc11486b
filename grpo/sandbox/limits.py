"""Limits that the kernel counts, capabilities, and another user where the system allows one."""

import ctypes
import importlib.machinery
import os
import resource
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

CAPSET = {"x86_64": 126, "aarch64": 91}
CAPABILITIES_VERSION = 0x20080522
FILE_BYTES = 256 << 20
OPEN_FILES = 256
PROCESSES = 64
"""Processes of one worker, its threads on each CPU not counted."""


def set_limits(memory_bytes: int, own_user: bool) -> None:
    """Address space, size and number of files, no core; with a user of its own also processes and threads."""
    wanted = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if own_user:
        wanted[resource.RLIMIT_NPROC] = PROCESSES + 4 * (os.cpu_count() or 1)
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def allow_cpu(seconds: float) -> None:
    """From now on this process may use so many more seconds of CPU time; then SIGXCPU ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def can_become(uid: int, paths: Iterable[str], scratch: str) -> bool:
    """Whether this process may turn into that user, and the user could then read the paths and write into scratch."""
    if os.geteuid() != 0:
        return False
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        become(uid)
        fine = os.access(scratch, os.R_OK | os.W_OK | os.X_OK) and all(
            os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)) for path in paths
        )
        os._exit(0 if fine else 1)
    finally:
        os._exit(1)


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop_capabilities() -> None:
    """Root without capabilities is a user who owns many files; nothing happens without them."""
    machine = os.uname().machine
    if machine in CAPSET:
        header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITIES_VERSION, 0))
        empty = ctypes.create_string_buffer(24)
        ctypes.CDLL(None, use_errno=True).syscall(CAPSET[machine], header, empty)


def needed_paths(modules: Sequence[str], path: Sequence[str]) -> list[str]:
    """What a worker reads: the folders with Python modules, this Python, and the files of the named modules."""
    needed = [entry for entry in path if os.path.exists(entry)] + [sys.executable]
    for name in modules:
        spec = importlib.machinery.PathFinder.find_spec(name.partition(".")[0], list(path))
        if spec and spec.origin and Path(spec.origin).exists():
            needed.append(spec.origin)
    return needed
