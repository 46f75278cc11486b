"""Files on a local or network volume, or in a bucket: the few verbs that checkpoints need.

A volume (a path): what is written is flushed to disk, files and folders, and appears by rename. A bucket
(s3://bucket/prefix): an object appears whole or not at all; there is no rename. Credentials, region and endpoint come
from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, a role of the pod …), never from the configuration.
Listings are never cached. Requests that fail with 5xx or break off are sent again by botocore (see bucket.py).

Names are relative, with slashes, without ".."; "" is the store's own folder. Every failure is a CheckpointError.
"""

import contextlib
import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, ClassVar, Protocol

from safetensors import SafetensorError

from grpo.errors import CheckpointError, GrpoError
from grpo.store.files import NotAFile, open_regular, remove_tree
from grpo.types import FileRecord

BLOCK = 4 << 20
MOST_READ = 1 << 30
"""Bytes of a file that is read whole: a manifest, a state, the rows of a run. Weights are larger, and never are."""
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def clean_name(name: str) -> str:
    """The name itself, or "" for the store's folder. Raises CheckpointError for one that could lead out of it."""
    parts = name.split("/")
    if name and (any(part in ("", ".", "..") for part in parts) or not name.isprintable() or "\\" in name):
        raise CheckpointError(
            f"a name in a store must be relative and have no empty, '.' or '..' part, but is {name!r}; "
            "the manifest that says so was not written by this program"
        )
    return name


class Store(Protocol):
    """A folder, or a prefix of a bucket. `url` is absolute, so that it means the same on every node."""

    url: str
    renames: ClassVar[bool]
    """Whether folders can be renamed."""

    def path(self, name: str) -> str:
        """Absolute path or URL of a name."""
        ...

    def typed(self, what: str, needed: int = 0) -> AbstractContextManager[None]:
        """Turns what disks and buckets raise into a GrpoError, with free and needed bytes if there is no room."""
        ...

    def filling(self, work: Path, folder: str) -> AbstractContextManager[None]:
        """Around the caller's writing into a workspace: what was written so far is the least that is needed."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file, which must have at most MOST_READ bytes."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replaces the file; a reader sees the old or the new content, never a part."""
        ...

    def write_new(self, name: str, data: bytes) -> bool:
        """Creates the file. False, and nothing is changed, if it exists."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        ...

    def names(self, prefix: str = "") -> list[str]:
        """Names of all files below the folder `prefix`, sorted."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders right below the store, sorted."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Moves a folder to a free name, durably. Only where `renames`."""
        ...

    def make_folder(self, name: str) -> None:
        """Creates a folder if there is none."""
        ...

    def delete(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it; nothing happens if there is neither.

        A link goes itself; what it leads to, or lies behind it, is nobody's here and stays.
        """
        ...

    def workspace(self, folder: str) -> AbstractContextManager[Path]:
        """A local folder, of this caller alone, for files that `publish` then moves to `folder`; gone at the end."""
        ...

    def publish(self, local: Path, folder: str) -> tuple[FileRecord, ...]:
        """Puts all files of a workspace below `folder`, durably; names are relative to `folder`, sorted."""
        ...

    def fetch(self, folder: str, names: Iterable[str]) -> AbstractContextManager[Path]:
        """A local folder that holds these files of `folder`: itself on a volume, else a download that goes at the end.

        Read only: what is written to it may change the store.
        """
        ...

    def record(self, name: str) -> FileRecord | None:
        """Reads the file for its size and sha256; None if there is no such file."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, without reading it; None if there is no such file."""
        ...


class Named:
    """What volumes and buckets share: names, and failures as errors of ours."""

    url: str
    errors: ClassVar[tuple[type[Exception], ...]] = (OSError, SafetensorError)

    def path(self, name: str) -> str:
        """Absolute path or URL of a name."""
        return f"{self.url}/{clean_name(name)}" if name else self.url

    @contextmanager
    def typed(self, what: str, needed: int = 0) -> Iterator[None]:
        """Turns what disks and buckets raise into a GrpoError, with free and needed bytes if there is no room."""
        try:
            yield
        except self.errors as error:
            raise self.failure(what, error, needed) from error

    @contextmanager
    def filling(self, work: Path, folder: str) -> Iterator[None]:
        """Around the caller's writing into a workspace: what was written so far is the least that is needed."""
        try:
            yield
        except self.errors as error:
            written = sum(path.stat().st_size for path in files_below(work))
            raise self.failure(f"write the files of {folder or 'a checkpoint'}", error, written) from error

    def failure(self, what: str, error: Exception, needed: int) -> GrpoError:
        """The error for a person; `needed` are the bytes that must be free at least."""
        way_out = "check that it exists and may be written, or choose another folder (run.dir, checkpoint.dir)"
        if isinstance(error, NotAFile):
            way_out = "take it away: this program has not put it there"
        if no_space(error):
            local = Path(tempfile.gettempdir() if "://" in self.url else self.url)
            free = shutil.disk_usage(next(path for path in (local, *local.parents) if path.exists())).free
            way_out = f"{free} bytes are free, at least {needed} are needed; free space or choose another folder"
        return CheckpointError(f"{self.url}: must {what}, but: {error}; {way_out}")


def no_space(error: Exception) -> bool:
    """Rust's safetensors says it in words."""
    return getattr(error, "errno", None) in NO_SPACE or "No space left" in str(error)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A hidden folder that goes at the end."""
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=parent))
    try:
        yield work
    finally:
        with contextlib.suppress(OSError):
            remove_tree(work)


def hash_file(file: IO[bytes], name: str) -> FileRecord:
    """Reads to the end."""
    digest, size = hashlib.sha256(), 0
    while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    return FileRecord(name, size, digest.hexdigest())


def record_of(path: Path, name: str) -> FileRecord:
    """Size and sha256 of a local file under the name that it has in a store."""
    with open_regular(path) as file:
        return hash_file(file, name)


def files_below(folder: Path) -> list[Path]:
    """All files, sorted; hidden ones are unfinished writes and do not count."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))
