"""One start at a time fills a folder of a volume that many share; what the disk says against it is a DiskError."""

import contextlib
import fcntl
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo.errors import DiskError, StoreLost
from grpo.store.base import no_space

STALLED, POLL_SECONDS = 600.0, 1.0
Say = Callable[[str], None]


@contextlib.contextmanager
def room(folder: Path) -> Iterator[None]:
    """Around the writing of a folder: what a disk says against it, as a DiskError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        what = "has no room" if no_space(error) else f"cannot be written ({error})"
        raise DiskError(f"{folder}: {what}; free space, or choose another folder") from error


@contextlib.contextmanager
def alone(folder: Path, say: Say) -> Iterator[str]:
    """Lets one start at a time fetch a folder; the system takes the lock from one that is killed.

    Where the volume has no locks it yields what tells two starts apart. Raises StoreLost if the other one stands still.
    """
    with open(folder.parent / f".{folder.name}.lock", "ab") as file:
        came, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = sum(map(bytes_in, folder.parent.glob(f".{folder.name}.*.part")))
                if now != came:
                    if came < 0:
                        say(f"fetch: another start fetches {folder}, {now:,} bytes so far")
                    came, since = now, time.monotonic()
                elif (waited := time.monotonic() - since) > STALLED:
                    raise StoreLost(
                        f"{folder}: another start fetches it, but nothing has come for {waited:.0f} s; start again"
                    ) from None
                threading.Event().wait(POLL_SECONDS)
            except OSError:  # a network volume without locks
                yield f"-{uuid.uuid4().hex[:8]}"
                return
        yield ""


def check_room(folder: Path, needed: int) -> None:
    """Raises DiskError if so many bytes do not fit the volume of a folder that is to be made."""
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise DiskError(
            f"{folder}: needs {needed:,} bytes more, but {free:,} are free on its volume; enlarge it or choose another"
        )


def bytes_in(folder: Path) -> int:
    """Of all files below a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
