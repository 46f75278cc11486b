"""Landlock: which files a process and its children may touch, and that they trace nobody else.

https://docs.kernel.org/userspace-api/landlock.html. Only what every version since the first holds is asked of it;
`seccomp` denies what later ones took up, and so has no need of them.
"""

import ctypes
import importlib.machinery
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import chain, islice

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
    *(f"/dev/{name}" for name in ("null", "full", "random", "urandom")),  # zero, mapped, is memory that nobody counts
    *(f"/etc/{name}" for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")),
    *(f"/etc/{name}" for name in ("passwd", "group", "nsswitch.conf", "hosts", "host.conf", "resolv.conf", "services")),
    *(f"/etc/{name}" for name in ("protocols", "mime.types", "os-release", "ssl/certs", "ssl/openssl.cnf", "pki/tls")),
)

OF_PYTHON = ("bin", "lib", "lib32", "lib64", "libexec", "include", "share", "ssl", "pyvenv.cfg")
"""What is opened of a Python's own folder, in which the user's may lie as well."""
MODULES = tuple(importlib.machinery.all_suffixes())
SCRATCH = "grpo-reward-"
"""How names of scratch folders begin: no worker sees into another's."""
MOST_ENTRIES, MOST_IN_FOLDER, MOST_MODULES = 50_000, 2_000, 5_000
"""Where modules are looked for, as each start of a worker waits for it; a folder with more files holds data."""


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


def restrict(readable: Iterable[str], listable: Iterable[str], writable: str) -> None:
    """Confines this process for ever. Raises OSError.

    `readable` files and folders may be read and run, `listable` folders only be listed, `writable` is a folder in which
    all is allowed. Paths that do not exist are left out.
    """
    version = abi()
    rights = RIGHTS_BY_ABI.get(version, ALL_RIGHTS)
    scoped = version >= 6
    attribute = _Ruleset(rights, 0, 0b11 if scoped else 0)
    ruleset = _check(_libc().syscall(CREATE_RULESET, ctypes.byref(attribute), ctypes.c_size_t(24 if scoped else 8), 0))
    for path in {*SYSTEM, *readable}:
        _allow(ruleset, path, READ & rights)
    for path in set(listable):
        _allow(ruleset, path, READ_DIR)
    _allow(ruleset, "/dev/null", (READ | WRITE_FILE | TRUNCATE) & rights)
    _allow(ruleset, writable, rights)
    _check(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc().syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def opened(folders: Iterable[str], whole: Iterable[str]) -> list[str]:
    """What may be read: `whole`, and of the folders in which Python looks for modules what pip installed; else modules.

    Whatever else lies there may be a secret, however it is called: `reward_code.readable` opens what is needed.
    """
    found = [os.path.realpath(path) for path in whole]
    places: list[str] = []
    for folder in dict.fromkeys(map(os.path.realpath, folders)):
        pip = os.path.basename(folder) in ("site-packages", "dist-packages")
        (found if pip or os.path.isfile(folder) else places).append(folder)
    inside = tuple(f"{path}/" for path in found)
    roots = [place for place in places if not f"{place}/".startswith(inside)]
    modules = chain.from_iterable(modules_in(root, found) for root in roots)
    return [*found, *islice(modules, MOST_MODULES)]


def modules_in(folder: str, spared: Iterable[str]) -> Iterator[str]:
    """Modules at every depth, the nearest first; none below hidden and spared folders, of / only the first level."""
    folders, left = [folder], MOST_ENTRIES
    seen = {folder, *spared}
    for place in folders:
        most = min(left, left if place == folder else MOST_IN_FOLDER)
        with suppress(OSError), os.scandir(place) as entries:
            for entry in islice(entries, most):
                left -= 1
                if entry.name.startswith((".", SCRATCH)):
                    continue
                path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if entry.is_file():
                    if path.endswith(MODULES):
                        yield path
                elif folder != "/" and entry.is_dir() and path not in seen:
                    seen.add(path)
                    folders.append(path)


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


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    return result
