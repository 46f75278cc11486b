"""`grpo fetch`: a folder from a bucket or the hub, once, whole or absent; whoever shares the volume finds it there.

Files come one by one into `.NAME.<listing>.part` beside their goal, each by rename once its size and digest are right,
so that a start after a loss goes on where the last one ended; of two at a time one waits. When all are there a
manifest with size and sha256 of each is written, and the folder gets its name. What has no manifest does not count.
"""

import contextlib
import fnmatch
import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from grpo.errors import ConfigError, GrpoError, StoreLost
from grpo.store.base import MOST_READ
from grpo.store.files import read_regular, remove_tree
from grpo.store.origins import Entry, Opener, Origin, open_origin
from grpo.store.turns import alone, bytes_in, check_room, room
from grpo.store.volume import Volume
from grpo.types import FileRecord

MANIFEST = ".grpo-fetch.json"
SIDE_BY_SIDE, ATTEMPTS = 4, 6
LONGEST_PAUSE = 60.0
Say = Callable[[str], None]
T = TypeVar("T")


class Item(BaseModel):
    """What to fetch: of `url` the files that match a pattern of `include` (none: all), into the new folder `folder`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    folder: str
    include: tuple[str, ...] = ()


def items_of(source: str, out: Path | None, include: Sequence[str]) -> list[Item]:
    """What the command line asks for: one URL, or what a file lists below `fetch`. Raises ConfigError."""
    if "://" in source:
        if out is None:
            raise ConfigError(f"fetch needs a folder to make: grpo fetch {source} OUT")
        return [Item(url=source, folder=str(out), include=tuple(include))]
    try:
        tree = yaml.safe_load(read_regular(source, MOST_READ))
        return [Item.model_validate(item) for item in tree["fetch"]]
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{source}: must be s3://bucket/prefix, hf://owner/name@commit, or a file with a list `fetch` of url, "
            f"folder and include, but: {' '.join(str(error).split())[:300]}"
        ) from None


class Manifest(BaseModel):
    """What lies in a fetched folder, and where it is from."""

    model_config = ConfigDict(frozen=True, strict=True)

    url: str
    include: tuple[str, ...]
    files: tuple[FileRecord, ...]


def fetch(item: Item, say: Say = print, opener: Opener = open_origin) -> Manifest:
    """Brings the item into its folder, unless it is there. Raises GrpoError."""
    folder = Path(os.path.abspath(item.folder))
    if found := fetched(folder, item):
        say(f"fetch: {folder} is there: {_sum(found.files)} of {item.url}")
        return found
    origin = opener(item.url)
    entries = _patiently(origin.entries)
    wanted = [entry for entry in entries if _matches(entry.name, item.include)]
    if not wanted:
        raise ConfigError(
            f"{item.url}: no file of {len(entries)} matches {', '.join(item.include)}; the first is {entries[0].name}"
            if entries
            else f"{item.url}: holds no files; correct it"
        )
    with room(folder), alone(folder, say) as suffix:
        if found := fetched(folder, item):
            return found
        staging = folder.parent / f".{folder.name}.{_listing(wanted)}{suffix}.part"
        check_room(folder, sum(entry.size for entry in wanted) - bytes_in(staging))
        say(f"fetch: {_sum(wanted)} of {item.url} into {folder}")
        try:
            manifest = Manifest(url=item.url, include=item.include, files=_bring(origin, wanted, staging, say))
            if _patiently(origin.entries) != entries:
                raise StoreLost(f"{item.url}: has changed while it was read; start again")
            return _commit(manifest, staging, folder, item, say)
        except (GrpoError, OSError):
            if found := fetched(folder, item):  # another start was faster, and has taken the files away
                return found
            raise


def fetched(folder: Path, item: Item) -> Manifest | None:
    """What its manifest says of a folder that holds the item whole; None if there is none, or a damaged one.

    Raises ConfigError for a folder that was not made by `fetch`, or of something else.
    """
    if not folder.exists() and not folder.is_symlink():
        return None
    try:
        found = Manifest.model_validate_json(read_regular(folder / MANIFEST, MOST_READ))
    except (OSError, ValidationError):
        raise ConfigError(
            f"{folder}: is there already, but not by `grpo fetch`; choose another, or remove it"
        ) from None
    if (found.url, found.include) != (item.url, item.include):
        raise ConfigError(f"{folder}: holds {found.url} {' '.join(found.include)}; choose another, or remove it")
    return found if _is_whole(folder, found) else None


def _bring(origin: Origin, wanted: Sequence[Entry], staging: Path, say: Say) -> tuple[FileRecord, ...]:
    """Files that lie there, of an earlier start, are read once more and not fetched again if they are right."""
    store = Volume(str(staging))
    store.make_folder("")

    def bring(entry: Entry) -> FileRecord:
        known = store.record(entry.name)
        if known and not _wrong(entry, known, staging):
            return known
        record = _patiently(lambda: _once(origin, entry, store, staging))
        say(f"fetch: {entry.name}, {entry.size:,} bytes")
        return record

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        waiting = [pool.submit(bring, entry) for entry in wanted]
        try:
            return tuple(one.result() for one in waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _once(origin: Origin, entry: Entry, store: Volume, staging: Path) -> FileRecord:
    with store.workspace("") as work:
        origin.get(entry, work)
        (record,) = store.publish(work, "")
    if wrong := _wrong(entry, record, staging):
        store.delete(entry.name)
        raise StoreLost(f"{origin.url}: {entry.name} must have {wrong}; start again")
    return record


def _wrong(entry: Entry, record: FileRecord, staging: Path) -> str:
    """What a file should have and has not; "" if all is right."""
    if record.size != entry.size:
        return f"{entry.size} bytes, but {record.size} came"
    kind, _, digest = entry.digest.partition(":")
    found = record.sha256
    if kind == "git":  # small files: git's own digest of a blob
        content = read_regular(staging / entry.name, MOST_READ)
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return f"{entry.digest}, but has {found}" if digest and digest != found else ""


def _commit(manifest: Manifest, staging: Path, folder: Path, item: Item, say: Say) -> Manifest:
    scratch = staging / f".{uuid.uuid4().hex}"
    with open(scratch, "xb") as file:  # makes no folder: another start may have given this one its name
        file.write(manifest.model_dump_json(indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, staging / MANIFEST)
    for hidden in staging.glob(".*"):  # of starts that were killed
        if hidden.name != MANIFEST:
            remove_tree(hidden)
    if not _is_whole(staging, manifest):
        raise StoreLost(f"{folder}: another start has taken files away; start again")
    if folder.exists():
        if found := fetched(folder, item):
            return found
        say(f"fetch: {folder} was not whole any more and is replaced")
        remove_tree(folder)
    Volume(str(folder.parent)).rename(staging.name, folder.name)
    if staging.name.count("-") == folder.name.count("-"):  # nobody else fetches it now
        for old in folder.parent.glob(f".{folder.name}.*.part"):
            with contextlib.suppress(OSError):
                remove_tree(old)
    say(f"fetch: {folder} is whole: {_sum(manifest.files)}")
    return manifest


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    return all(_size(folder / file.name) == file.size for file in manifest.files)


def _patiently(call: Callable[[], T]) -> T:
    """What loses its way is asked again, with growing pauses."""
    again = retry(
        retry=retry_if_exception_type(StoreLost),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(max=LONGEST_PAUSE),
        reraise=True,
    )
    return again(call)()


def _matches(name: str, include: Sequence[str]) -> bool:
    return not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)


def _listing(entries: Sequence[Entry]) -> str:
    """Stands for names, sizes and versions: files of another listing are not mixed in."""
    return hashlib.sha256(repr([asdict(entry) for entry in entries]).encode()).hexdigest()[:12]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sum(files: Sequence[Entry | FileRecord]) -> str:
    return f"{len(files)} files, {sum(file.size for file in files):,} bytes"
