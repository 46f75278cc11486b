"""The layout of checkpoints, and how one is read: only if every byte is as its manifest says.

    step_000040/
        manifest.json   written last: size and sha256 of every other file, step, attempt, configuration, versions
        state.json      counters, data order, metrics offset: whatever the controller needs to resume
        policy/         Hugging Face folder
        …               what the trainer ranks and the controller put beside it
    latest              name of the newest folder, for people and scripts; it is never trusted

On a volume a checkpoint is built as `step_000040.tmp-<attempt>` and renamed. If that name is taken (by one that is
damaged, or by a start that was overtaken in that very moment) the folder there is moved aside to
`step_000040.attempt-<n>`, where it still counts, until the new one verifies: the newest attempt's word holds.
A bucket has no rename: files go to `step_000040.attempt-<attempt>`, which no other attempt writes to, and count from
the moment its manifest.json is there. Order is by step, then attempt; times of files mean nothing.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo.errors import CheckpointError
from grpo.store import Store, clean_name, open_store
from grpo.types import FileRecord

MANIFEST, STATE, POINTER, POLICY = "manifest.json", "state.json", "latest", "policy"
ADAPTER = "adapter"
FOLDER = re.compile(r"step_([0-9]{6,})(?:\.attempt-([0-9]+))?")
LEFTOVER = re.compile(r"step_[0-9]{6,}(?:\.attempt-[0-9]+)?\.tmp-([0-9]+)")
READERS = 4
"""Files that are read side by side when a checkpoint is verified."""


class CheckpointManifest(BaseModel):
    """What manifest.json says; `files` lists every file but itself, named from the checkpoint's folder."""

    model_config = ConfigDict(frozen=True, strict=True)

    digest: str
    """sha256 of all the rest."""
    step: int
    attempt: int
    world_size: int
    score: Annotated[float, Field(allow_inf_nan=False)] | None
    data_fingerprint: str | None
    config_hash: str
    config: dict[str, object]
    versions: dict[str, str]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Commit:
    """A checkpoint whose every byte was compared with its manifest. `folder` is a path or an s3:// URL."""

    step: int
    attempt: int
    folder: str
    state: dict[str, Any]  # the controller's own, as JSON; only the controller knows more
    config: dict[str, object]
    files: tuple[FileRecord, ...]
    score: float | None = None

    def read(self, name: str) -> bytes:
        """A file that the manifest lists. Raises CheckpointError for another name or if its bytes have changed."""
        data = open_store(self.folder).read(name)
        if FileRecord(name, len(data), hashlib.sha256(data).hexdigest()) not in self.files:
            raise CheckpointError(f"{self.folder}/{name}: must be as its manifest says, but is not; start again")
        return data


def checkpoints_url(directory: str | None, run_dir: Path) -> str:
    """Where a run's checkpoints are; `directory` is its checkpoint.dir."""
    return directory or str(run_dir / "checkpoints")


def order(name: str) -> tuple[int, float]:
    """(step, attempt) of a folder; the plain name is that of the last attempt."""
    found = FOLDER.fullmatch(name)
    assert found, f"{name} is no checkpoint's name"
    return int(found[1]), int(found[2]) if found[2] else math.inf


def committed(store: Store) -> list[str]:
    """Folders of commits, whole or damaged, the oldest first.

    A bucket's folder without a manifest is an upload that never ended, unless the pointer knows better.
    """
    names = sorted(filter(FOLDER.fullmatch, store.folders()), key=order)
    if store.renames:
        return names
    files = set(store.names())
    pointed = store.read(POINTER).decode(errors="replace") if POINTER in files else ""
    return [name for name in names if name == pointed or f"{name}/{MANIFEST}" in files]


def unfinished(store: Store, attempt: int) -> list[str]:
    """What killed writers of this attempt and of those before it left; a newer attempt's is never touched."""
    folders = store.folders()
    left = [name for name in folders if (found := LEFTOVER.fullmatch(name)) and int(found[1]) <= attempt]
    if not store.renames:
        commits = committed(store)
        left += [
            name for name in folders if FOLDER.fullmatch(name) and name not in commits and order(name)[1] <= attempt
        ]
    return left


def load(store: Store, name: str) -> Commit:
    """Reads every file of a commit. Raises CheckpointError, with the first file that is wrong, if it is damaged."""
    manifest = read_manifest(store, name)
    files = manifest.files
    for wanted in files:  # before any is read: one that was blown up takes hours
        if (size := store.size(f"{name}/{wanted.name}")) not in (None, wanted.size):
            raise CheckpointError(f"{name}/{wanted.name} has {size} bytes instead of {wanted.size}")
    with ThreadPoolExecutor(READERS) as pool:
        for wanted, found in zip(files, pool.map(lambda file: store.record(f"{name}/{file.name}"), files), strict=True):
            if found is None:
                raise CheckpointError(f"{name}/{wanted.name} is missing")
            if found.sha256 != wanted.sha256:
                raise CheckpointError(f"{name}/{wanted.name} has other bytes than were written (sha256)")
    state = json.loads(store.read(f"{name}/{STATE}"))
    return Commit(manifest.step, manifest.attempt, store.path(name), state, manifest.config, files, manifest.score)


def seal(body: Mapping[str, object]) -> bytes:
    """Text of a manifest, with a digest of itself. Raises ValueError for what is not JSON."""
    return json.dumps({"digest": _digest(body), **body}, indent=1, allow_nan=False).encode()


def read_manifest(store: Store, name: str) -> CheckpointManifest:
    """The manifest of a folder. Raises CheckpointError if it is not exactly as it was written."""
    file = f"{name}/{MANIFEST}"
    if not store.exists(file):
        raise CheckpointError(f"{file} is missing")
    data = store.read(file)
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or body.pop("digest", None) != _digest(body) or seal(body) != data:
            raise CheckpointError(f"{file} is not as it was written (digest)")
        manifest = CheckpointManifest.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{file} is no manifest of this version: {error.errors()[0]['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if manifest.step != order(name)[0]:
        raise CheckpointError(f"{file} is that of step {manifest.step}")
    if STATE not in {clean_name(record.name) for record in manifest.files}:
        raise CheckpointError(f"{file} does not list {STATE}")
    return manifest


def readable(store: Store, name: str) -> CheckpointManifest | None:
    """The manifest, or None if it is damaged."""
    try:
        return read_manifest(store, name)
    except CheckpointError:
        return None


def _digest(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
