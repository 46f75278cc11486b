"""Landlock: which files a process and its children may touch, whom they may signal. https://docs.kernel.org/userspace-api/landlock.html"""

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
VERSION_FLAG = 1
RULE_PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
ALL_RIGHTS = (1 << 16) - 1  # from ABI 5 on

# A Linux system's programs and libraries, and what the C library and Python look up
SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/sys/devices/system/cpu", "/proc/self"),
    *(f"/proc/{name}" for name in ("cpuinfo", "meminfo", "stat", "filesystems", "sys/kernel", "sys/vm")),
    *(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")),
    *(f"/etc/{name}" for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")),
    *(f"/etc/{name}" for name in ("passwd", "group", "nsswitch.conf", "hosts", "host.conf", "resolv.conf", "services")),
    *(f"/etc/{name}" for name in ("protocols", "mime.types", "os-release", "ssl/certs", "ssl/openssl.cnf", "pki/tls")),
)


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def abi() -> int:
    """Version of the kernel's Landlock; 0 if it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION_FLAG)))


def restrict(readable: Iterable[str], listable: Iterable[str], writable: str, network: bool) -> tuple[str, ...]:
    """Confines this process for ever. Returns the names of the parts that the kernel lacks.

    `readable` files and folders may be read and run, `listable` folders only be listed, `writable` is a folder in which
    all is allowed. Paths that do not exist are left out. Needs ABI 4 to deny TCP, ABI 6 to deny signals to others.
    """
    version = abi()
    if not version:
        return ("landlock", "landlock_network", "landlock_signals")
    rights = RIGHTS_BY_ABI.get(version, ALL_RIGHTS)
    attribute = _Ruleset(rights, 0 if network or version < 4 else 0b11, 0b11 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _check(_libc().syscall(CREATE_RULESET, ctypes.byref(attribute), ctypes.c_size_t(size), 0))
    for path in {*SYSTEM, *readable}:
        _allow(ruleset, path, READ & rights)
    for path in set(listable):
        _allow(ruleset, path, READ_DIR)
    _allow(ruleset, "/dev/null", (READ | WRITE_FILE | TRUNCATE) & rights)
    _allow(ruleset, writable, rights)
    _check(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc().syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    missing = () if version >= 4 or network else ("landlock_network",)
    return missing if version >= 6 else (*missing, "landlock_signals")


def visible(folders: Iterable[str]) -> list[str]:
    """What may be read of folders with Python modules: all but hidden files, which hold secrets, and never all of /."""
    found: list[str] = []
    for folder in folders:
        path = Path(folder)
        if path.is_file():
            found.append(folder)
        elif path.is_dir() and path.resolve() != Path("/"):
            found += [entry.path for entry in os.scandir(path) if not entry.name.startswith(".")]
    return found


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= FILE_RIGHTS
        rule = _PathBeneath(rights, fd)
        _check(_libc().syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0))
    finally:
        os.close(fd)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    return result
