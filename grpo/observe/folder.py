"""The folder of a run: what is in it, and the only code that writes and reads its rows.

    config.yaml     the resolved configuration
    metrics.jsonl   one row for each step and evaluation and for each phase outside of them; first "start", last "end"
    samples.jsonl   one row for each group that is kept, of training ("step") and of evaluation ("eval"); "prompt" is
                    what the model saw, control tokens included; of each sample the "versions" of the weights that made
                    its first token and the "newest_versions" that made its last, and as "weights" the digest of the
                    newest of all, as the books know it
    timeline.jsonl  what each pool did when (grpo/observe/timeline.py); trace.json: the same for Perfetto
    tensorboard/    the numbers of metrics.jsonl, under the same names
    books.jsonl     what was trained on, in a chain that `grpo audit` follows (grpo/observe/books.py)
    checkpoints/    what a run resumes from, and its policies (grpo/checkpoint)
    rewards.jsonl   replies of reward services, by digest of the request (grpo/rewards/replies.py)
    attempts/       one file for each start of the run (grpo/run/lease.py)
    superseded/     rows of steps that were lost after a checkpoint and made again
    stacks/         stacks of frozen actors, as text
    errors/         tracebacks of what failed in actors, as text
    logs/           what each start of the run in a pod said (grpo/run/pod.py); of a local Ray that failed, Ray's own
    FATAL.json      why the run cannot be resumed (grpo/run/fatal.py)
    report.html     written by `grpo report`
    trackers.json   the run's ids at W&B and MLflow

A row of metrics.jsonl: {"event": "step", "step": 3, "time": 1790000000.1, "reward/mean": 0.5, "phase/rollout": 1.2, …}.
`event` is start, startup, step, eval, weight_sync, checkpoint, commit, recovery, engine or end; times are in seconds; a
number that is not finite is null. A startup says what the start of one actor took, by phase (grpo/run/start.py). A
commit is a checkpoint that was written beside the steps and is durable now; a weight_sync beside them has the version
as its step. An engine has joined or left, or could not join, where they come and go.
A step carries digests of its prompt ids ("prompts"), of its sampled tokens ("tokens") and of the weights that it left
behind ("weights"): two runs with equal digests did the same.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO

from grpo.config import Config
from grpo.config.load import dump_config
from grpo.errors import CheckpointError, ConfigError
from grpo.observe.chain import short
from grpo.observe.rows import step_of
from grpo.run.layout import CHECKPOINTS, CONFIG, METRICS, SAMPLES, SUPERSEDED
from grpo.store import MOST_READ, open_store
from grpo.store.files import open_append, read_regular
from grpo.types import Group, Stats


def prepare_folder(run_dir: Path, resume: str) -> None:
    """Creates the folder. Raises ConfigError if it holds a run and `run.resume` is never."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        found = [name for name in (CONFIG, METRICS, SAMPLES, CHECKPOINTS) if (run_dir / name).exists()]
    if found and resume == "never":
        raise ConfigError(
            f"run.dir: with run.resume: never a run needs a folder of its own, but {run_dir} holds {', '.join(found)}; "
            "choose another run.dir, delete that folder, or resume that run (run.resume: auto)"
        )


MOST_SAMPLES = 1 << 34
"""Bytes of samples.jsonl: what is longer was not written by a run."""


class RunFolder:
    """Writes to a prepared folder, from any thread. Raises CheckpointError if it cannot be written.

    Files are line-buffered: a killed run loses at most the line that it was writing.
    """

    def __init__(self, run_dir: Path, config: Config, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self.run_dir = run_dir
        self._decode = decode
        self._guard = threading.Lock()
        self._closed = False
        self._groups_kept = config.metrics.completions_per_step
        with writing(run_dir):
            commit_file(run_dir / CONFIG, dump_config(config).encode())
            self._open()

    def _open(self) -> None:
        with ExitStack() as stack:
            self._metrics = stack.enter_context(appended(self.run_dir / METRICS))
            self._samples = stack.enter_context(appended(self.run_dir / SAMPLES))
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Flushes and closes what it writes. Raises CheckpointError for a disk that is full only now."""
        with self._guard, writing(self.run_dir):
            self._closed = True
            self._stack.close()

    def metrics(self, step: int | None = None) -> bytes:
        """The rows of metrics.jsonl so far, without those of steps after `step`."""
        with self._guard, writing(self.run_dir):
            content = read_regular(self.run_dir / METRICS, MOST_READ)
        if step is None:
            return content
        lines = content.splitlines(True)
        # Before the row of the step itself there is nothing that came after it: those need not be looked at.
        since = list(takewhile(lambda line: not _is_end_of(step, line), reversed(lines)))
        later = [line for line in reversed(since) if step_of(line) <= step]
        return b"".join([*lines[: len(lines) - len(since)], *later])

    def rewind(self, step: int, metrics: bytes, own: Sequence[str]) -> None:
        """Goes back to the rows as they were at a checkpoint, and the lines `own` of this start that came after.

        Rows that are taken out, since their steps will be made again, are kept in superseded/. New files take the place
        of the old ones, so that an older start which still holds those open cannot write into them.
        """
        with self._guard, writing(self.run_dir):
            self._stack.close()
            samples = self.run_dir / SAMPLES
            kept = [
                line
                for line in read_regular(samples, MOST_SAMPLES).splitlines(True)
                if metrics and step_of(line) <= step
            ]
            for name, content in ((METRICS, metrics + "".join(own).encode()), (SAMPLES, b"".join(kept))):
                self._set_aside(name, content)
                commit_file(self.run_dir / name, content)
            self._open()

    def _set_aside(self, name: str, content: bytes) -> None:
        """Keeps the lines of a file that its new content does not have."""
        lines = set(content.splitlines())
        found = read_regular(self.run_dir / name, MOST_SAMPLES).splitlines()
        lost = [line for line in found if line not in lines]
        if lost:
            folder = self.run_dir / SUPERSEDED
            folder.mkdir(exist_ok=True)
            stem, _, suffix = name.rpartition(".")
            number = len(list(folder.glob(f"{stem}-*")))
            commit_file(folder / f"{stem}-{number:04d}.{suffix}", b"\n".join(lost) + b"\n")

    def write_row(self, event: str, step: int, row: Stats, **text: str) -> str:
        """One row of metrics.jsonl; returns the line."""
        numbers = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with self._guard, writing(self.run_dir):
            line = line_of({"event": event, "step": step, "time": round(time.time(), 3), **text, **numbers})
            if not self._closed:  # else a thread is at something yet after the last row of the run
                self._metrics.write(line)
        return line

    def write_samples(
        self, event: str, step: int, groups: Sequence[Group], weights: Callable[[int], str | None] | None = None
    ) -> tuple[int, str]:
        """The first `metrics.completions_per_step` groups that are scored, a row each; their number and digest.

        `weights` knows the digest of a version.
        """
        lines = []
        with self._guard, writing(self.run_dir):
            for group in [group for group in groups if group.scored][: self._groups_kept]:
                seen = {"prompt": self._decode(group.prompt.token_ids)} if self._decode else {}
                newest = max((sample.newest_version for sample in group.samples), default=0)
                made_by = {"weights": weights(newest)} if weights else {}
                lines.append(line_of({"event": event, "step": step, **sample_row(group), **made_by, **seen}))
                self._samples.write(lines[-1])
        return len(lines), short("".join(lines).encode())


def appended(path: Path) -> IO[str]:
    """A regular file, opened to add lines to it."""
    return open(open_append(path), "a", buffering=1, encoding="utf-8")


def line_of(row: Mapping[str, object]) -> str:
    """A row as it stands in a file."""
    return json.dumps(row, allow_nan=False) + "\n"


def _is_end_of(step: int, line: bytes) -> bool:
    return step_of(line) == step and line.startswith(b'{"event": "step"')


def commit_file(path: Path, content: bytes) -> None:
    """Commits a file by rename."""
    open_store(str(path.parent)).write(path.name, content)


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Raises CheckpointError where the run's folder cannot be written inside."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"run.dir: the run must be able to write to {run_dir}, but: {error}; free space or choose another run.dir"
        ) from error


def sample_row(group: Group) -> dict[str, object]:
    """What samples.jsonl keeps of a group; one item for each sample in all its lists."""
    return {
        "prompt_id": group.prompt.id,
        **({"source": group.prompt.source} if group.prompt.source else {}),
        "question": group.prompt.question,
        "answer": group.prompt.answer,
        "completions": [sample.text for sample in group.samples],
        "rewards": group.rewards_G,
        **(
            {"penalties": [sample.penalty for sample in group.samples]} if any(s.penalty for s in group.samples) else {}
        ),
        "finish_reasons": [sample.finish_reason for sample in group.samples],
        "versions": [sample.oldest_version for sample in group.samples],
        "newest_versions": [sample.newest_version for sample in group.samples],
    }
