"""Files that somebody else may have put there: opened without waiting, read up to a limit, deleted without following.

A pipe in the place of a file makes a plain `open` wait for ever, a sparse one fills the memory, and a link leads a
delete out of the folder.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 20
Name = str | os.PathLike[str]
_NO_WAIT = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class NotAFile(OSError):
    """It is there, but is no regular file, or one that is too large."""


def open_regular(path: Name) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError, of class NotAFile for anything else; it never waits."""
    _check_kind(path, os.stat(path))  # a device may act on being opened
    return os.fdopen(_opened(path, os.O_RDONLY), "rb")


def open_append(path: Name) -> int:
    """A descriptor that appends to a regular file, which is made where there is none. Raises as `open_regular`."""
    if os.path.exists(path):
        _check_kind(path, os.stat(path))
    return _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def read_regular(path: Name, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises as `open_regular`."""
    with open_regular(path) as file:
        content = bytearray()
        if os.fstat(file.fileno()).st_size <= most:
            while len(content) <= most and (block := file.read(BLOCK)):
                content += block
            if len(content) <= most:
                return bytes(content)
        raise NotAFile(errno.EFBIG, f"must be a file of at most {most} bytes, but is longer", os.fspath(path))
    return content


def json_object(content: bytes) -> dict[str, object]:
    """What a file says that may be cut off or damaged: nothing unless it is a JSON object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def replace(scratch: Name, path: Name) -> None:
    """Commits a file by rename. Raises OSError, also where a device is: for root /dev/full would become a file."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            _check_kind(path, status)
    os.replace(scratch, path)


def _opened(path: Name, flags: int) -> int:
    descriptor = os.open(path, flags | _NO_WAIT, 0o666)
    try:
        _check_kind(path, os.fstat(descriptor))
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def kind_of(mode: int) -> str:
    """What a file of this mode is, in words; "" for a regular one."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return "" if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "something else")


def _check_kind(path: Name, status: os.stat_result) -> None:
    if kind := kind_of(status.st_mode):
        raise NotAFile(errno.EINVAL, f"must be a regular file, but is {kind}", os.fspath(path))


def remove_tree(path: Name) -> None:
    """Removes a file, or a folder with all that is in it, and never what a link or a mount in there leads to.

    Links go themselves. With something mounted in it nothing is removed. What is not there is fine. Raises OSError.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(path)
        return
    if mounted := mounts_below(path):
        raise OSError(errno.EBUSY, f"is not removed while something is mounted at {mounted[0]}", os.fspath(path))
    assert shutil.rmtree.avoids_symlink_attacks, "Linux has openat and unlinkat"
    shutil.rmtree(path)


def mounts_below(path: Name) -> list[str]:
    """Mount points at a folder or below it; a bind mount of the same disk shows nowhere else."""
    top = os.path.realpath(path)
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:  # no Linux
        return []
    places = [re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines]
    return [place for place in places if place == top or place.startswith(f"{top.rstrip('/')}/")]
