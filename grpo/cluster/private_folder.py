"""A folder for one local Ray that nobody but its user can enter, short enough for the names of sockets.

Ray's own `/tmp/ray` is open to every user of the machine, with the sockets by which a run's processes speak. This one
is 0700, has a name that nobody knows beforehand, and is removed at the end. What a start leaves that was killed is
removed by the user's next start: its owner holds a lock on it, which ends with the process.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo.errors import ConfigError
from grpo.run.shell import module_folders
from grpo.store.files import remove_tree

PREFIX = "grpo."
LONGEST = 39
"""Bytes of its path: a socket's name has 107, of which Ray's session and the name of the socket take 68."""
LEAST_FREE = 64 * 2**20
LOCK = "lock"
PLACES = ("/tmp", "/var/tmp", "/dev/shm")

FIRST = """import os, sys
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or '.') != {folder!r}]
sys.path += {named!r}
"""
"""What Python runs first in Ray's processes: the working folder is not searched for modules, whoever names it, and
what PYTHONPATH names is searched last."""


class PrivateFolder:
    """`with PrivateFolder(run_dir) as folder:`; `path` is absolute. Raises ConfigError if there is no place for it."""

    def __init__(self, run_dir: str, places: Sequence[str] = PLACES) -> None:
        self.places = candidates(run_dir, places)

    def __enter__(self) -> "PrivateFolder":
        for place in self.places:
            remove_stale(place)
        self.path, self._lock = _make(self.places)
        named = [os.path.abspath(entry) for entry in module_folders()]
        for name in ("modules", "h"):
            Path(self.path, name).mkdir()
        first = FIRST.format(folder=os.path.realpath("."), named=named)
        Path(self.path, "modules", "sitecustomize.py").write_text(first)
        _temporary(Path(self.path, "tmp"))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            remove_tree(self.path)
        os.close(self._lock)

    @property
    def ray(self) -> str:
        """For Ray, which opens the folder that it is given to everybody."""
        return str(Path(self.path, "r"))

    @property
    def home(self) -> str:
        """For a user who has none."""
        return str(Path(self.path, "h"))

    @property
    def modules(self) -> str:
        """The only folder, beside those of the installation, where Ray's processes look for modules."""
        return str(Path(self.path, "modules"))

    @property
    def temporary(self) -> str:
        """The shell's folder of temporary files by a short name."""
        return str(Path(self.path, "tmp"))

    def offer(self, module: str) -> None:
        """Lets Ray's processes find the package of a module of this process, and nothing else that lies beside it."""
        package = sys.modules[module.partition(".")[0]]
        source = Path(package.__path__[0] if hasattr(package, "__path__") else str(package.__file__))
        with contextlib.suppress(FileExistsError):
            Path(self.modules, source.name).symlink_to(source.absolute())


def candidates(run_dir: str, places: Sequence[str] = PLACES) -> list[str]:
    """Where it may be, the best first: as the shell says, else where temporary files are, else in the run's folder."""
    wanted = [os.environ.get("TMPDIR", ""), *places, run_dir]
    return list(dict.fromkeys(os.path.abspath(place) for place in wanted if place))


def unusable(place: str) -> str:
    """Why it cannot be there, or "": it is tried."""
    try:
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=place)
    except OSError as error:
        return f"{place}: {error.strerror}"
    try:
        if len(os.fsencode(folder)) > LONGEST:
            return f"{place}: longer than {LONGEST - len(PREFIX) - 9} bytes, and the names of sockets have 107"
        free = shutil.disk_usage(folder).free
        if free < LEAST_FREE:
            return f"{place}: {free >> 20} MiB free, {LEAST_FREE >> 20} are needed"
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{folder}/s")
        return ""
    except OSError as error:
        return f"{place}: no sockets ({error.strerror})"
    finally:
        with contextlib.suppress(OSError):
            remove_tree(folder)


def check(run_dir: str, places: Sequence[str] = PLACES) -> str:
    """Where it will be. Raises ConfigError if nowhere."""
    return _first(candidates(run_dir, places))


def _first(places: Sequence[str]) -> str:
    reasons = []
    for place in places:
        reason = unusable(place)
        if not reason:
            return place
        reasons.append(reason)
    raise ConfigError(
        f"a local Ray needs a folder of its own for sockets and logs, but: {'; '.join(reasons)}; set TMPDIR to a short "
        "path (such as /tmp) on a disk with room where you may write"
    )


def _make(places: Sequence[str]) -> tuple[str, int]:
    """The folder, and the descriptor whose lock says that its owner lives."""
    path = tempfile.mkdtemp(prefix=PREFIX, dir=_first(places))
    os.chmod(path, 0o700)  # whatever the umask says
    new = os.path.join(path, f"{LOCK}.new")
    lock = os.open(new, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(new, os.path.join(path, LOCK))  # from now on others may look
    return path, lock


def _temporary(path: Path) -> None:
    wanted = os.environ.get("TMPDIR", "")
    if wanted and os.path.isdir(wanted) and os.access(wanted, os.W_OK | os.X_OK):
        path.symlink_to(os.path.abspath(wanted))
    else:
        path.mkdir()


def remove_stale(place: str) -> None:
    """Folders of this user there whose owner is gone; nothing is followed."""
    for path in _own(place):
        with contextlib.suppress(OSError):
            lock = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its owner lives
                remove_tree(path)
            finally:
                os.close(lock)


def _own(place: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(place):
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700:
                    yield entry.path
