"""The walk along the books, with everything else in the folder beside it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.data.stream import MixedStream, PromptStream, stream_of
from grpo.errors import AuditError, NotProved
from grpo.observe.audit.choice import Choice
from grpo.observe.audit.lines import Beside, check_named, reading
from grpo.observe.audit.proof import Proof, refuted, shown
from grpo.observe.audit.rules import Spans, Versions, natural, spans_of
from grpo.observe.audit.seals import Drawn, Sealed, check_sealed, read_checkpoints
from grpo.observe.chain import DIGITS, LINK, Seal, lines_of
from grpo.run.clock import Clock
from grpo.run.layout import BOOKS, CONFIG, METRICS, SAMPLES

TRIES = 3
AS_WRITTEN = "a row is as a run writes it"
IN_ORDER = "steps come once, in order"
RULE_OF_DRAWN = ("prompts_per_step", "samples_per_prompt", "refill", "max_refills", "curriculum")


def audit(run_dir: Path) -> Proof:
    """Proves what the folder of a run holds. Raises AuditError with the first contradiction.

    NotProved if nothing contradicts and not all can be proved; CheckpointError for what cannot be read. A run may go on
    meanwhile: what changes under the reader is read again.
    """
    for left in reversed(range(TRIES)):
        before = _identity(run_dir)
        try:
            return _Audit(run_dir).run()
        except AuditError:
            if not left or before == _identity(run_dir):
                raise
    raise AssertionError("the last try returns or raises")


def _identity(run_dir: Path) -> list[int]:
    """Files that a resume has put in the place of others have other ones."""
    paths = [run_dir / name for name in (BOOKS, METRICS, SAMPLES)]
    return [os.stat(path).st_ino if path.exists() else 0 for path in paths]


class _Audit:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.proof, self.versions = run_dir, Proof(), Versions()
        self.end, self.step, self.begun = Seal(), 0, 0
        self.stream: PromptStream | MixedStream | None = None
        self.at_seal = 0
        self.rules: dict[str, Any] = {}
        self.metrics_of: dict[int, list[str]] = {}
        self.drawn: dict[int, tuple[str, Drawn]] = {}

    def run(self) -> Proof:
        with reading(self.run_dir / CONFIG):
            os.stat(self.run_dir / CONFIG)
        self.proof.checkpoints, sealed = read_checkpoints(self.run_dir)
        self.seals = sorted((one for one in sealed.values() if one.seal), key=_place)
        self.kept_steps = {step for one in self.seals for step in one.metrics}
        path = self.run_dir / BOOKS
        with reading(path):
            if not path.exists():
                self._without_books(sealed)
            for line in lines_of(path):
                self._line(line)
            self._finish(path.stat().st_size)
        return self.proof

    def _without_books(self, sealed: Mapping[int, Sealed]) -> None:
        if self.seals:
            found = f"checkpoints/{self.seals[-1].name} has sealed some and there are none"
            raise refuted(BOOKS, "the books are as checkpoints have sealed them", found, "they were taken away")
        raise NotProved(
            f"{self.run_dir}: a proof needs {BOOKS}, but there is none: the run is older than they are, is "
            f"a warm-up, or has not begun; its {len(sealed)} checkpoints are whole, the rest is not proved"
        )

    @property
    def where(self) -> str:
        return f"{BOOKS}:{self.end.rows}"

    def _line(self, line: bytes) -> None:
        self.end = self.end.after(line)
        body, link, chain = line.rpartition(LINK)
        if not link or chain != self.end.chain.encode() + b'"}\n':
            found = f"that of row {self.end.rows} does not follow from it and the rows before"
            raise refuted(
                self.where, "every row continues the chain", found, "a row was changed, added, moved or taken out"
            )
        try:
            row = json.loads(body + b"}")
            if self.end.rows == 1:
                self._stream(row)
            else:
                getattr(self, f"_on_{row['event']}")(row)
            self._sealed()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            problem = f"it reads {shown(line[:60])} ({type(error).__name__}: {shown(str(error))})"
            raise refuted(self.where, AS_WRITTEN, problem, "this program has not written it") from error

    def _stream(self, row: Mapping[str, Any]) -> None:
        if row["event"] != "stream":
            raise refuted(
                self.where, "the books begin with the order of prompts", f"found {shown(row['event'])}", "they were cut"
            )
        self.begun = self.step = natural(row["step"])
        self.stream = stream_of(row["streams"])
        self.choice = Choice(self.stream)
        self.metrics = Beside(self.run_dir / METRICS, self.begun)
        self.samples = Beside(self.run_dir / SAMPLES, self.begun)

    def _on_resume(self, row: Mapping[str, Any]) -> None:
        if row["step"] != self.step:
            found = f"it resumes behind step {shown(row['step'])} and the books are at {self.step}"
            raise refuted(self.where, IN_ORDER, found, "rows of another time were put here")
        clock = Clock(**row["clock"])
        for number in (clock.staleness, clock.base, clock.last, clock.every - 1):
            natural(number)
        if self.rules and self._rule(self.rules) != self._rule(row):
            self.drawn.clear()  # they are drawn again
        self.rules = dict(row)
        self.choice.resume(row.get("curriculum"), clock, self.step)
        self.versions.resume(clock)
        self.proof.starts += 1
        if self.proof.starts == 1 and self.begun:
            self.proof.notes.append(f"the books begin behind step {self.begun}: what was before is not proved")

    @staticmethod
    def _rule(row: Mapping[str, Any]) -> list[object]:
        clock = row["clock"]
        return [clock["staleness"], clock["in_flight"], *(row.get(name) for name in RULE_OF_DRAWN)]

    def _on_sync(self, row: Mapping[str, Any]) -> None:
        self.versions.sync(natural(row["version"]), str(row["digest"]), row.get("carried") is True)

    def _on_step(self, row: Mapping[str, Any]) -> None:
        step, where = row["step"], f"{self.where}: step {shown(row['step'])}"
        if step != self.step + 1:
            found = f"step {self.step + 1} comes next"
            raise refuted(where, IN_ORDER, found, "a step is double, missing or exchanged")
        kept, samples = row["prompts"], row["samples"]
        skipped, dropped = [prompt for prompt, _ in row.get("skipped", ())], natural(row.get("dropped", 0))
        assert self.stream
        if not self.begun:
            self.choice.check(where, step, row, kept, skipped, dropped)
        spans = spans_of(row["versions"])
        counts = [len(text) / DIGITS for text in samples]
        most = self.rules["samples_per_prompt"]
        if len(samples) != len(kept) or sum(counts) != len(spans) or not all(0 < count <= most for count in counts):
            found = f"{len(kept)} prompts, {sum(counts):g} samples and {len(spans)} versions do not fit"
            raise refuted(where, "a batch has samples of each of its prompts", found, "samples are missing or too many")
        self.versions.check(where, step, spans)
        sizes = [int(count) for count in counts]
        lines = self._common(where, row, spans)
        check_named(lines, spans, row["weights"], kept, sizes)
        name, drawn = self.drawn.pop(step, ("", None))
        self.choice.check_right(where, row, sizes, lines, (name, drawn.rewards) if drawn else None)
        if drawn and (drawn.prompts, drawn.samples) != (kept, samples):
            found = f"that is not what checkpoints/{name} holds as drawn"
            raise refuted(where, "what was drawn ahead is what is trained", found, "samples were exchanged or changed")
        self.step = step
        self.proof.steps += 1
        self.proof.prompts += len(kept)
        self.proof.skipped += len(skipped) + dropped
        turns = [(prompt, difficulty) for prompt, difficulty in row.get("curriculum", {}).get("not_drawn", ())]
        self.proof.turns.update(turns)
        self.proof.not_drawn += len(turns)
        self.proof.samples += len(spans)

    def _on_eval(self, row: Mapping[str, Any]) -> None:
        where, step = f"{self.where}: evaluation {shown(row['step'])}", row["step"]
        spans = spans_of(row["versions"])
        used = {version for each in spans for _, version in each}
        if step != self.step or used - {step}:
            found = f"it says step {shown(step)} and versions {shown(sorted(used))} behind step {self.step}"
            raise refuted(
                where, "an evaluation is of the step before it", found, "a row is double, missing or exchanged"
            )
        check_named(self._common(where, row, spans), spans, row["weights"])
        self.proof.evaluations += 1

    def _common(self, where: str, row: Mapping[str, Any], spans: Sequence[Spans]) -> list[tuple[str, bytes]]:
        """Its lines of samples.jsonl."""
        self.versions.check_digests(where, {version for each in spans for _, version in each}, row["weights"])
        self.metrics.check(where, row["event"], row["step"], 1, row["metrics"])
        if row["step"] in self.kept_steps:
            self.metrics_of.setdefault(row["step"], []).append(row["metrics"])
        return self.samples.check(where, row["event"], row["step"], *row["kept"])

    def _sealed(self) -> None:
        """Checkpoints whose seal is on this row."""
        while self.seals and _place(self.seals[0])[0] <= self.end.size:
            sealed = self.seals.pop(0)
            assert self.stream
            if not self.begun:
                check_sealed(sealed, self.end, self.step, self.stream, self.rules)
                self.choice.check_sealed(sealed)
            elif sealed.seal != self.end:
                found = f"{self.where} has another chain than checkpoints/{sealed.name}"
                raise refuted(BOOKS, "the books are as checkpoints have sealed them", found, "a row was changed")
            for step, digests in sealed.metrics.items():
                if step > self.begun and digests != self.metrics_of.get(step):
                    found = f"its metrics.jsonl has other lines of step {step} than the books"
                    raise refuted(
                        f"checkpoints/{sealed.name}", "a checkpoint agrees with the books", found, "one is forged"
                    )
            self.drawn = {step: (sealed.name, batch) for step, batch in sealed.drawn.items()}
            self.at_seal = self.step

    def _finish(self, size: int) -> None:
        if self.seals:
            found = f"checkpoints/{self.seals[0].name} has sealed more than the {self.end.rows} rows that are there"
            raise refuted(BOOKS, "the books are as checkpoints have sealed them", found, "they were cut")
        if self.stream is None:
            raise NotProved(f"{self.run_dir / BOOKS}: a proof needs rows, but there is none yet; nothing is proved")
        rest = self.metrics.check_rest(self.step), self.samples.check_rest(self.step)
        proof, at = self.proof, max(self.at_seal, self.begun)
        proof.versions = len(self.versions.synced)
        streams = self.stream.streams.values() if isinstance(self.stream, MixedStream) else [self.stream]
        proof.epochs = min(stream.turns // len(stream.prompts) for stream in streams)
        if any(rest) or size > self.end.size:
            proof.notes.append(f"what follows step {self.step} is half written: not proved")
        if self.step > at:
            proof.notes.append(f"steps {at + 1} to {self.step} are not sealed by a checkpoint yet")
        last = self.versions.clocks[-1].last if self.versions.clocks else 0
        if self.step < last:
            proof.notes.append(f"the run is at step {self.step} of {last}: it goes on, or was stopped")
        if self.begun:
            raise NotProved(f"{self.run_dir}: {'; '.join(proof.notes)}; nothing contradicts")


def _place(sealed: Sealed) -> tuple[int, int]:
    return sealed.seal.size if sealed.seal else 0, sealed.commit.step
