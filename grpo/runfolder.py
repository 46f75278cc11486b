"""The folder of a run: what is in it, and the only code that writes and reads its rows.

    config.yaml     the resolved configuration
    metrics.jsonl   one row for each step and evaluation and for each phase outside of them; first "start", last "end"
    samples.jsonl   one row for each group that is kept, of training ("step") and of evaluation ("eval")
    tensorboard/    the numbers of metrics.jsonl, under the same names
    policy/         step_000040/ and so on, written by the trainer
    report.html     written by `grpo report`

A row of metrics.jsonl: {"event": "step", "step": 3, "time": 1790000000.1, "reward/mean": 0.5, "phase/rollout": 1.2, …}.
`event` is start, step, eval, weight_sync, checkpoint or end; times are in seconds; a number that is not finite is null.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from tensorboard.summary import Writer

from grpo.config import Config
from grpo.configfile import dump
from grpo.errors import CheckpointError, ConfigError
from grpo.metrics import lookup
from grpo.types import Group, Stats

CONFIG, METRICS, SAMPLES, TENSORBOARD, POLICY = "config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard", "policy"
REPORT = "report.html"


def policy_folder(run_dir: Path, step: int) -> Path:
    """Where the policy of a step is saved."""
    return run_dir / POLICY / f"step_{step:06d}"


def prepare_folder(run_dir: Path) -> None:
    """Creates the folder. Raises ConfigError if it holds a run, as a second one would mix with it."""
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        found = [name for name in (CONFIG, METRICS, SAMPLES, POLICY) if (run_dir / name).exists()]
    if found:
        raise ConfigError(
            f"run.dir: a run needs a folder of its own, but {run_dir} holds {', '.join(found)}; "
            "choose another run.dir or delete that folder"
        )


class RunFolder:
    """Writes to a prepared folder. Raises ConfigError if it holds a run, CheckpointError if it cannot be written.

    Files are line-buffered: a killed run loses at most the line that it was writing.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        self.run_dir = run_dir
        self._groups_kept = config.metrics.completions_per_step
        with _writing(run_dir), ExitStack() as stack:
            self._metrics = stack.enter_context(self._create(METRICS))
            self._samples = stack.enter_context(self._create(SAMPLES))
            (run_dir / CONFIG).write_text(dump(config), encoding="utf-8")
            self._tensorboard = Writer(str(run_dir / TENSORBOARD))
            stack.callback(self._tensorboard.close)
            self._stack = stack.pop_all()

    def close(self) -> None:
        with _writing(self.run_dir):
            self._stack.close()

    def write_row(self, event: str, step: int, row: Stats, **text: str) -> None:
        """One row of metrics.jsonl, and its numbers as TensorBoard scalars."""
        numbers = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with _writing(self.run_dir):
            self._write(self._metrics, {"event": event, "step": step, "time": round(time.time(), 3), **text, **numbers})
            for key, value in row.items():
                self._tensorboard.add_scalar(key, value, step, description=lookup(key)[0].help)
            self._tensorboard.flush()

    def write_samples(self, event: str, step: int, groups: Sequence[Group]) -> None:
        """The first `metrics.completions_per_step` groups, one row of samples.jsonl each."""
        with _writing(self.run_dir):
            for group in groups[: self._groups_kept]:
                self._write(self._samples, {"event": event, "step": step, **sample_row(group)})

    def _create(self, name: str) -> IO[str]:
        try:
            return open(self.run_dir / name, "x", buffering=1, encoding="utf-8")
        except FileExistsError:  # two runs started at once in this folder; only one can create the file
            prepare_folder(self.run_dir)
            raise

    @staticmethod
    def _write(file: IO[str], row: Mapping[str, object]) -> None:
        file.write(json.dumps(row, allow_nan=False) + "\n")


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"run.dir: the run must be able to write to {run_dir}, but: {error}; free space or choose another run.dir"
        ) from error


def sample_row(group: Group) -> dict[str, object]:
    return {
        "prompt_id": group.prompt.id,
        "question": group.prompt.question,
        "answer": group.prompt.answer,
        "completions": [sample.text for sample in group.samples],
        "rewards": group.rewards_G,
        "finish_reasons": [sample.finish_reason for sample in group.samples],
        "versions": [sample.version for sample in group.samples],
    }


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file of a run, none if there is no file. The half line of a killed run is left out.

    Raises CheckpointError for a line that is no JSON object before the last.
    """
    if not path.exists():
        return
    broken: str | None = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if broken is not None:
                raise CheckpointError(f"{path}:{number - 1}: a row must be a JSON object, but {broken}; delete it")
            try:
                row = json.loads(line)
            except ValueError as error:
                broken = str(error)
                continue
            if isinstance(row, dict):
                yield row
            else:
                broken = f"found {type(row).__name__}"
