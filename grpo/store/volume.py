"""`Store` on a local disk or a network volume: flush to disk, then rename."""

import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

from grpo.errors import CheckpointError
from grpo.store.base import MOST_READ, Named, clean_name, files_below, record_of, scratch_folder
from grpo.store.files import open_regular, read_regular, remove_tree, replace
from grpo.types import FileRecord

MOST_HANDS = 4
"""Files that are looked at side by side."""


class Volume(Named):
    """A folder."""

    renames: ClassVar[bool] = True

    def __init__(self, url: str) -> None:
        self.url = os.path.abspath(url)

    def local(self, name: str) -> Path:
        """Where a name is on this machine."""
        return Path(self.path(name))

    def read(self, name: str) -> bytes:
        with self.typed(f"read {name}"):
            return read_regular(self.local(name), MOST_READ)

    def write(self, name: str, data: bytes) -> None:
        path = self.local(name)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with self.typed(f"write {name}", len(data)):
            _make_folders(path.parent)
            try:
                _write_flushed(scratch, data, "wb")
                replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
            _flush_folder(path.parent)

    def write_new(self, name: str, data: bytes) -> bool:
        path = self.local(name)
        with self.typed(f"write {name}", len(data)):
            _make_folders(path.parent)
            try:
                _write_flushed(path, data, "xb")
            except FileExistsError:
                return False
            _flush_folder(path.parent)
        return True

    def exists(self, name: str) -> bool:
        return self.local(name).exists()

    def names(self, prefix: str = "") -> list[str]:
        top = Path(self.url)
        with self.typed(f"list {prefix}"):
            return [path.relative_to(top).as_posix() for path in files_below(self.local(prefix))]

    def folders(self) -> list[str]:
        with self.typed("list"):
            top = Path(self.url)
            return sorted(path.name for path in top.iterdir() if path.is_dir()) if top.exists() else []

    def rename(self, old: str, new: str) -> None:
        with self.typed(f"rename {old} to {new}"):
            os.rename(self.local(old), self.local(new))
            _flush_folder(self.local(new).parent)

    def make_folder(self, name: str) -> None:
        with self.typed(f"create {name}"):
            _make_folders(self.local(name))

    def delete(self, name: str) -> None:
        path = self.local(name)
        with self.typed(f"delete {name}"):
            parts = Path(name).parts[:-1]
            above = [Path(self.url, *parts[: number + 1]) for number in range(len(parts))]
            if not any(folder.is_symlink() for folder in above):
                remove_tree(path)

    @contextmanager
    def workspace(self, folder: str) -> Iterator[Path]:
        with self.typed(f"write to {folder}"):
            _make_folders(self.local(folder))
        with self.typed(f"write to {folder}"), scratch_folder(self.local(folder)) as work, self.filling(work, folder):
            yield work

    def publish(self, local: Path, folder: str) -> tuple[FileRecord, ...]:
        goal = self.local(folder)

        def commit(path: Path) -> FileRecord:
            name = path.relative_to(local).as_posix()
            with open_regular(path) as file:
                os.fsync(file.fileno())
            record = record_of(path, name)
            _make_folders((goal / name).parent)
            replace(path, goal / name)
            return record

        with self.typed(f"write to {folder}"):
            with ThreadPoolExecutor(hands()) as pool:  # a digest takes longer than a fast disk
                records = list(pool.map(commit, files_below(local)))
            for inside in {(goal / record.name).parent for record in records}:
                _flush_folder(inside)
        return tuple(records)

    @contextmanager
    def fetch(self, folder: str, names: Iterable[str]) -> Iterator[Path]:
        for name in names:
            if not (self.local(folder) / clean_name(name)).is_file():
                raise CheckpointError(f"{self.path(folder)}: must hold {name}, but does not; use another checkpoint")
        yield self.local(folder)

    def record(self, name: str) -> FileRecord | None:
        with self.typed(f"read {name}"):
            return record_of(self.local(name), name) if self.local(name).is_file() else None

    def size(self, name: str) -> int | None:
        path = self.local(name)
        return path.stat().st_size if path.is_file() else None


def hands() -> int:
    """How many files are looked at side by side: other work needs the cores too."""
    return max(1, min(MOST_HANDS, len(os.sched_getaffinity(0)) // 4))


def _write_flushed(path: Path, data: bytes, mode: Literal["wb", "xb"]) -> None:
    """A file that this call made is removed again if it cannot be written whole."""
    with open(path, mode) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _flush_folder(folder: Path) -> None:
    """Makes names that appeared or went in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folders(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush_folder(folder.parent)
