"""Limits that the kernel counts, and capabilities."""

import ctypes
import os
import resource
import struct

CAPSET = {"x86_64": 126, "aarch64": 91}
CAPABILITIES_VERSION = 0x20080522
FILE_BYTES = 256 << 20
OPEN_FILES = 256
PENDING = 1_024
"""Signals and timers, which the user of the run has only so many of."""
TASKS = 64 + 4 * (os.cpu_count() or 1)
"""Processes and threads of one worker; libraries like to start threads for each CPU."""


def set_limits() -> None:
    """Files, timers, and no core: 0 would let one through to a program that collects them, 1 does not."""
    lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    lower(resource.RLIMIT_CORE, 1)
    lower(resource.RLIMIT_SIGPENDING, PENDING)


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


def drop_capabilities() -> None:
    """Root without capabilities is a user who owns many files; nothing happens without them."""
    machine = os.uname().machine
    if machine in CAPSET:
        header = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITIES_VERSION, 0))
        empty = ctypes.create_string_buffer(24)
        ctypes.CDLL(None, use_errno=True).syscall(CAPSET[machine], header, empty)
