"""Who is told the rows of a run beside metrics.jsonl: a failure there is said once and counted, and the run goes on."""

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from grpo.config import Config
from grpo.config.text import first_line
from grpo.errors import ConfigError, GrpoError, Interrupted
from grpo.observe.tensorboard import TensorBoardTracker
from grpo.observe.trackers import Tracker, kept_ids, wanted_services
from grpo.run.layout import TENSORBOARD
from grpo.types import Stats

CLOSE_SECONDS = 30.0
"""That a service has at the end of the run for what it has not sent yet."""
HINTS = {
    "wandb": "log in with `wandb login`, set WANDB_MODE=offline, or set it to null",
    "mlflow": "correct the URI or set it to null",
}


class Tracking:
    """The trackers of one run. `say` prints a line, `failed` counts a failure by the tracker's name."""

    def __init__(
        self, config: Config, run_dir: Path, say: Callable[[str], None], failed: Callable[[str], None]
    ) -> None:
        self._config, self._run_dir, self._say, self._failed = config, run_dir, say, failed
        self._said: set[str] = set()
        self._guard = threading.Lock()  # rows come from several threads
        self._trackers: list[Tracker] = []

    def open(self) -> None:
        """Begins, or goes on, at each service.

        Raises ConfigError where one refuses a run that it has never seen: now there is somebody to correct it. One that
        has seen it may be away later on, and the run goes on without it.
        """
        self._trackers.append(TensorBoardTracker(self._run_dir / TENSORBOARD))
        for key, name, make in wanted_services(self._config):
            known = name in kept_ids(self._run_dir)
            try:
                self._trackers.append(make(self._config, self._run_dir))
            except GrpoError:
                raise
            except (Exception, SystemExit) as error:
                if not known:
                    said = f"{key}: {make.name} must accept the run, but says: {first_line(error)}; {HINTS[name]}"
                    raise ConfigError(said) from error
                self._note(make.name, error)

    def log(self, step: int, row: Stats) -> None:
        """One row to all of them."""
        self._each(lambda tracker: tracker.log(step, row))

    def rewind(self, rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> None:
        """Back to these rows."""
        known = list(rows)
        self._each(lambda tracker: tracker.rewind(known))

    def close(self, ok: bool) -> None:
        """The end of the run; nobody is waited for longer than CLOSE_SECONDS."""
        closing = threading.Thread(target=self._each, args=(lambda tracker: tracker.close(ok),), daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            self._note("a tracker", TimeoutError(f"it has not ended within {CLOSE_SECONDS:g} s"))

    def _each(self, verb: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            try:
                with self._guard:
                    verb(tracker)
            except Interrupted:
                raise
            except (Exception, SystemExit) as error:  # whatever a library may raise: its numbers are in metrics.jsonl
                self._note(tracker.name, error)

    def _note(self, name: str, error: BaseException) -> None:
        self._failed(name)
        if name not in self._said:
            self._said.add(name)
            what = f"{type(error).__name__}: {first_line(error)}"
            self._say(f"warning: {name} has failed ({what}); the run goes on, and its numbers are in metrics.jsonl")
