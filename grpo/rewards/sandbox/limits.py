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
TASKS = 64 + 4 * (os.cpu_count() or 1)
"""Processes and threads of one worker; libraries like to start threads for each CPU."""


def set_limits(own_user: bool) -> None:
    """Size and number of files, no core; with a user of its own also processes and threads."""
    lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    lower(resource.RLIMIT_CORE, 0)
    if own_user:
        lower(resource.RLIMIT_NPROC, 2 * TASKS)  # the supervisor is asked first


def limit_memory(more_bytes: int) -> None:
    """Address space from now on. Not before the imports: libraries such as torch map gigabytes that they never use."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    lower(resource.RLIMIT_AS, mapped + more_bytes)


def lower(limit: int, value: int) -> None:
    """Sets a limit of this process for good, unless it is lower already."""
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def allow_cpu(seconds: float) -> None:
    """From now on this process may use so many more seconds of all CPUs; then SIGXCPU ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds * (os.cpu_count() or 1)) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def can_become(uid: int, paths: Iterable[str], scratch: str) -> bool:
    """Whether root may turn into that user and still kill it, and it could read the paths and write into scratch."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become(uid)
            fine = os.access(scratch, os.R_OK | os.W_OK | os.X_OK) and all(map(can_read, paths))
            os.write(ready[1], b"y" if fine else b"n")
            os.close(done[1])
            os.read(done[0], 1)
        finally:
            os._exit(0)
    os.close(ready[1])
    try:
        answer = os.read(ready[0], 1)
        os.kill(child, 0)
    except PermissionError:
        answer = b"n"
    finally:
        for fd in (ready[0], *done):
            os.close(fd)
        os.waitpid(child, 0)
    return answer == b"y"


def can_read(path: str) -> bool:
    """Whether this process may read a file, or enter and list a folder."""
    return os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0))


def become(uid: int) -> None:
    """Turns into that user with no way back. Raises PermissionError for who is not root."""
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
