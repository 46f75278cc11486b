"""`Store` on an S3-compatible bucket.

A request that gets 5xx, cannot connect or times out is sent ATTEMPTS times in all by botocore, with growing pauses. If
an answer breaks off or never comes, s3fs does all of that ROUNDS times. A server that accepts and then says nothing is
thus given up after 5 x 3 x 30 s. Uploads carry a checksum that the server compares.
A large file goes up in parts and is not there before the last one; the parts of a killed upload stay invisible (let a
lifecycle rule of the bucket remove them).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import aiohttp
from botocore.exceptions import BotoCoreError, NoCredentialsError
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS
from safetensors import SafetensorError

from grpo.errors import CheckpointError, ConfigError, GrpoError, StoreLost
from grpo.store.base import MOST_READ, Named, clean_name, files_below, hash_file, no_space, record_of, scratch_folder
from grpo.types import FileRecord

ATTEMPTS = 5
ROUNDS = 3
BLOCK = 32 << 20


class Bucket(Named):
    """A prefix of a bucket."""

    renames: ClassVar[bool] = False
    errors: ClassVar[tuple[type[Exception], ...]] = (
        OSError,
        BotoCoreError,
        aiohttp.ClientError,
        SafetensorError,
        *S3_RETRYABLE_ERRORS,
    )

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise ConfigError(  # the URL may hold a secret (s3://key:secret@bucket), so it is not repeated
                "checkpoint.dir: must be s3://bucket/prefix with a bucket's plain name and no credentials; "
                "those come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
            )
        if any(part in ("", ".", "..") for part in prefix.split("/") if prefix) or re.search(r"[?#*\\]", prefix):
            raise ConfigError(f"checkpoint.dir: the prefix must be plain names with slashes, but is {prefix!r}")
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._fs: S3FileSystem | None = None

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str]]:
        return Bucket, (self.url,)  # a connection does not travel to another process

    @property
    def fs(self) -> S3FileSystem:
        """Connects at the first use; neither the connection nor a listing is shared or kept."""
        if self._fs is None:
            config = {
                "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
                "connect_timeout": 10,
                "read_timeout": 30,
            }
            self._fs = S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
            self._fs.retries = ROUNDS
        return self._fs

    def failure(self, what: str, error: Exception, needed: int) -> GrpoError:
        """A bucket that refuses or lacks something is CheckpointError; one that does not answer is worth a retry."""
        if isinstance(error, NoCredentialsError):
            error = PermissionError("no credentials in the environment (AWS_ACCESS_KEY_ID or a role)")
        if isinstance(error, FileNotFoundError | PermissionError | SafetensorError) or no_space(error):
            return super().failure(what, error, needed)
        return StoreLost(f"{self.url}: must {what}, but: {error}; start again once the bucket answers")

    def read(self, name: str) -> bytes:
        if (size := self.size(name) or 0) > MOST_READ:
            raise CheckpointError(f"{self.path(name)}: must have at most {MOST_READ} bytes, but has {size}; remove it")
        with self.typed(f"read {name}"):
            return bytes(self.fs.cat_file(self.path(name)))

    def write(self, name: str, data: bytes) -> None:
        with self.typed(f"write {name}"):
            self.fs.pipe_file(self.path(name), data)

    def write_new(self, name: str, data: bytes) -> bool:
        with self.typed(f"write {name}"):
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def exists(self, name: str) -> bool:
        with self.typed(f"look for {name}"):
            return bool(self.fs.exists(self.path(name)))

    def names(self, prefix: str = "") -> list[str]:
        top = self.url.removeprefix("s3://") + "/"
        with self.typed(f"list {prefix}"):
            return sorted(str(path).removeprefix(top) for path in self.fs.find(self.path(prefix) + "/"))

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.names() if "/" in name})

    def rename(self, old: str, new: str) -> None:
        raise AssertionError("a bucket has no rename; files go to their final name at once")

    def make_folder(self, name: str) -> None:
        """A bucket has objects only."""
        clean_name(name)

    def delete(self, name: str) -> None:
        with self.typed(f"delete {name}"):
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)

    @contextmanager
    def workspace(self, folder: str) -> Iterator[Path]:
        with scratch_folder() as work, self.filling(work, folder):
            yield work

    def publish(self, local: Path, folder: str) -> tuple[FileRecord, ...]:
        records = []
        with self.typed(f"write to {folder}"):
            for path in files_below(local):
                records.append(record_of(path, path.relative_to(local).as_posix()))
                self.fs.put_file(str(path), f"{self.path(folder)}/{records[-1].name}")
        return tuple(records)

    @contextmanager
    def fetch(self, folder: str, names: Iterable[str]) -> Iterator[Path]:
        with scratch_folder() as work:
            with self.typed(f"read {folder}"):
                for name in names:
                    goal = work / clean_name(name)
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    self.fs.get_file(f"{self.path(folder)}/{name}", str(goal))
            yield work

    def record(self, name: str) -> FileRecord | None:
        with self.typed(f"read {name}"):
            try:
                with self.fs.open(self.path(name), "rb", block_size=BLOCK, cache_type="readahead") as file:
                    return hash_file(file, name)
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        with self.typed(f"look for {name}"):
            try:
                return int(self.fs.info(self.path(name))["size"])
            except FileNotFoundError:
                return None
