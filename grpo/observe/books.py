"""books.jsonl: what a run trained on, row by row in a chain, so that `grpo audit` needs nothing but the run's folder.

    {"event": "stream", "step": 0, "run": …, "streams": […]}   the order of prompts; the books begin behind that step
    {"event": "resume", "step": 40, "attempt": 2, "clock": …}  a start, or a return to a checkpoint, and its rules
    {"event": "sync", "version": 41, "digest": …}              all engines have taken these weights, verified
    {"event": "step", "step": 41, "prompts": […], …}           a batch that was trained
    {"event": "eval", "step": 50, …}                           an evaluation

A batch is the ids of its prompts in order, those that were skipped with their reward, how many were dropped as their
rewards failed, digests of all samples (tokens, logprobs, reward; 16 digits each, a text a group), their versions
(`[how many samples, [first token, version, …]]`), the digests of these versions, and digests of its own lines in
metrics.jsonl and samples.jsonl. With `data.curriculum` it also is what that choice follows from: the turns that were
skipped, with the reason, and how many completions of each group were right, of how many. Each row ends with the chain:
sha256 of the row before's and of this row. A checkpoint seals the chain (books.json); going back to it cuts the rows
behind it off, as a resumed run writes them again.
"""

import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from grpo.config import Config
from grpo.observe.chain import Seal, lines_of, packed, sample_digest, short
from grpo.run.clock import Clock
from grpo.run.layout import BOOKS, SUPERSEDED
from grpo.store.files import json_object, open_append, replace
from grpo.types import Groups, Skipped

Row = dict[str, object]


class Books:
    """Writes the books of a run, from any thread. Raises OSError."""

    def __init__(self, run_dir: Path, config: Config, streams: Sequence[Mapping[str, object]], attempt: int) -> None:
        self.run_dir, self.config, self.streams, self.attempt = run_dir, config, streams, attempt
        self._path = run_dir / BOOKS
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._end = Seal()
        self._weights: dict[int, str] = {}
        self._here: dict[int, str] = {}
        """What was verified since the books were opened."""
        self._marks: dict[int, Seal] = {}
        """Where the books were when a step ended."""

    def rewind(self, step: int, content: bytes) -> str:
        """Goes on behind what a checkpoint has sealed; says why, if it must begin anew.

        Rows behind it are kept in superseded/. Syncs among them stay known: samples that a checkpoint holds may be of
        those weights.
        """
        with self._lock:
            self._close()
            seal = Seal.read(content) if step else Seal()
            scratch = self._path.with_name(f".{BOOKS}.{secrets.token_hex(8)}")
            try:
                known, carried, problem = self._cut(seal, scratch)
                replace(scratch, self._path)
            finally:
                scratch.unlink(missing_ok=True)
            self._file = os.fdopen(open_append(self._path), "ab", buffering=0)
            self._end, self._weights = seal if seal and not problem else Seal(), known
            if not self._end.rows:
                self._append({"event": "stream", "step": step, "run": secrets.token_hex(8), "streams": self.streams})
            self._append({"event": "resume", "step": step, "attempt": self.attempt, **rules(self.config, step)})
            for version, digest in carried:
                self._append({"event": "sync", "version": version, "digest": digest, "carried": True})
                self._weights.setdefault(version, digest)
            self._marks, self._here = {step: self._end}, {}
        return problem

    def _cut(self, seal: Seal | None, scratch: Path) -> tuple[dict[int, str], list[tuple[int, str]], str]:
        """Copies the sealed part; syncs in it and behind it, and what is wrong with it."""
        known: dict[int, str] = {}
        carried: dict[tuple[int, str], None] = {}
        end, lost = Seal(), []
        with open(scratch, "xb") as out:
            for line in lines_of(self._path):
                if seal and end.size < seal.size:
                    end = end.after(line)
                    out.write(line)
                    known |= dict(_sync(line))
                else:
                    lost.append(line)
                    carried |= dict.fromkeys(_sync(line))
            broken = seal is None or end != seal
            out.flush()
            if broken:
                out.truncate(0)
            os.fsync(out.fileno())
        if broken:
            lost = list(lines_of(self._path))
        if lost:
            self._set_aside(lost)
        problem = f"{self._path}: does not hold what the checkpoint has sealed; the books begin anew" if broken else ""
        return known, list(carried), problem

    def _set_aside(self, lost: Iterable[bytes]) -> None:
        folder = self.run_dir / SUPERSEDED
        folder.mkdir(exist_ok=True)
        stem, _, suffix = BOOKS.rpartition(".")
        with open(folder / f"{stem}-{len(list(folder.glob(f'{stem}-*'))):04d}.{suffix}", "wb") as out:
            out.writelines(lost)

    def seal(self, step: int | None = None) -> bytes:
        """What the checkpoint of a step keeps, once all that it covers is on the disk; None: of all so far."""
        with self._lock:
            if self._file:
                os.fsync(self._file.fileno())
            end = self._end if step is None else self._marks.get(step, self._end)
            self._marks = {number: mark for number, mark in self._marks.items() if step is None or number >= step}
            return json.dumps(asdict(end)).encode()

    def sync(self, version: int, digest: str) -> None:
        """All engines have taken these weights, verified."""
        with self._lock:
            if self._here.get(version) != digest:  # engines that are replaced take it once more
                self._here[version] = self._weights[version] = digest
                self._append({"event": "sync", "version": version, "digest": digest})

    def weights(self, version: int) -> str | None:
        """The digest of weights that engines have taken, verified."""
        with self._lock:
            return self._weights.get(version)

    def step(
        self,
        step: int,
        groups: Groups,
        skipped: Groups,
        dropped: int,
        not_drawn: Sequence[Skipped],
        lines: "Lines",
    ) -> None:
        """A batch that was trained."""
        rewards = [[group.prompt.id, group.penalised_G[0]] for group in skipped]
        counted: Row = {"skipped": rewards, "dropped": dropped} if skipped or dropped else {}
        if curriculum := self.config.data.curriculum:
            right, replaced = (
                [[group.right(curriculum.pass_reward), len(group.samples)] for group in some]
                for some in (groups, skipped)
            )
            counted["curriculum"] = {"not_drawn": not_drawn, "right": right, "replaced": replaced}
        prompts = [group.prompt.id for group in groups]
        samples = ["".join(map(sample_digest, group.samples)) for group in groups]
        self._made("step", step, groups, {"prompts": prompts, **counted, "samples": samples}, lines)

    def evaluation(self, step: int, groups: Groups, lines: "Lines") -> None:
        """Held-out prompts that were scored."""
        every = "".join(sample_digest(sample) for group in groups for sample in group.samples)
        self._made("eval", step, groups, {"samples": short(every.encode())}, lines)

    def _made(self, event: str, step: int, groups: Groups, row: Row, lines: "Lines") -> None:
        spans = [sample.versions for group in groups for sample in group.samples]
        used = sorted({version for each in spans for _, version in each})
        with self._lock:
            weights = {str(version): self._weights.get(version) for version in used}
            of = {"versions": packed(spans), "weights": weights, **asdict(lines)}
            self._append({"event": event, "step": step, **row, **of})
            self._marks[step] = self._end

    def _append(self, row: Row) -> None:
        line = self._end.written(row)
        if self._file:
            self._file.write(line)
        self._end = self._end.after(line)

    def close(self) -> None:
        """Writes no more."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file:
            self._file.close()
        self._file = None


@dataclass
class Lines:
    """Digests of what else the folder holds of a step: its line in metrics.jsonl, its lines in samples.jsonl."""

    metrics: str = ""
    kept: tuple[int, str] = (0, "")


def rules(config: Config, base: int) -> Row:
    """What a start's batches must keep to."""
    rollout = config.rollout
    names = ("prompts_per_step", "samples_per_prompt", "refill", "max_refills")
    clock = asdict(Clock.of(config, config.eval.prompts > 0, base))
    curriculum = config.data.curriculum
    choice = {"curriculum": curriculum.model_dump()} if curriculum else {}
    return {
        "clock": clock,
        **choice,
        **{name: value for name in names if (value := getattr(rollout, name, None)) is not None},
    }


def _sync(line: bytes) -> Iterator[tuple[int, str]]:
    row = json_object(line) if line.startswith(b'{"event": "sync"') else {}
    version, digest = row.get("version"), row.get("digest")
    if type(version) is int and isinstance(digest, str):
        yield version, digest
