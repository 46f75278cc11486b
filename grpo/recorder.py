"""Everything a person sees of a run: its folder, the progress line, Prometheus and, if asked, W&B or MLflow."""

import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from grpo import __version__
from grpo.config import Config
from grpo.errors import ConfigError
from grpo.metrics import PrometheusMetrics, summarize
from grpo.progress import RunProgress
from grpo.runfolder import RunFolder, prepare_folder
from grpo.trackers import Tracker, close_tracker, wanted_trackers
from grpo.types import Group, Stats


class RunRecorder:
    """Implements `controller.Recorder`; a context manager that creates the run's folder and closes what it opened.

    Entering raises ConfigError if the folder holds a run, the port is taken or a tracker's package is missing, and
    CheckpointError if the folder cannot be written. `command` is shown in the report. By default it is this process's
    own, and `run_dir` is `run.dir`.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path | None = None,
        progress: RunProgress | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.config = config
        self.run_dir = Path(config.run.dir) if run_dir is None else run_dir
        self.progress = progress or RunProgress(config.run.steps)
        self.port: int | None = None
        self._command = shlex.join(["grpo", *sys.argv[1:]] if command is None else command)
        self._prometheus = PrometheusMetrics(config.run.name, __version__, config.model.path, config.algorithm.loss)
        self._trackers: list[Tracker] = []
        self._row: Stats = {}
        self._depth = 0
        self._step = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            prepare_folder(self.run_dir)
            self._serve(stack)
            for opener in wanted_trackers(self.config):
                self._trackers.append(opener(self.config, self.run_dir))
                stack.push(close_tracker(self._trackers[-1]))
            self._folder = RunFolder(self.run_dir, self.config)
            stack.callback(self._folder.close)
            stack.callback(self.progress.close)
            self._folder.write_row("start", 0, {}, command=self._command, version=__version__)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = "ok" if kind is None else kind.__name__
        try:
            self._folder.write_row("end", self._step, {}, outcome=outcome, message=str(error or ""))
        finally:
            self._stack.__exit__(kind, error, traceback)

    def say(self, text: str) -> None:
        """Prints one line with the time since the start."""
        self.progress.say(text)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        self._step = step
        self.progress.step_started()
        ok = False
        try:
            with self._block("step", "step/seconds"):
                yield
            ok = True
        finally:
            self._prometheus.step_ended(ok)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.progress.phase(name)
        self._prometheus.phase_started(name)
        ok = False
        try:
            with self._block(name, f"phase/{name}"):
                yield
            ok = True
        finally:
            self.progress.phase("")
            self._prometheus.phase_ended(name, ok)

    def log_sync(self, stats: Stats) -> None:
        assert self._depth > 0, "log_sync belongs inside of phase('weight_sync')"
        self._row |= stats

    def log_step(self, step: int, groups: Sequence[Group], stats: Stats) -> None:
        assert self._depth > 0, "log_step belongs inside of step()"
        self._row |= stats | summarize(groups, step)
        self._prometheus.record_samples(groups, step)
        self._folder.write_samples("step", step, groups)

    def log_eval(self, step: int, groups: Sequence[Group], scores: Stats) -> None:
        assert self._depth > 0, "log_eval belongs inside of phase('eval')"
        self._step = step
        self._row |= scores
        self._folder.write_samples("eval", step, groups)
        self.progress.eval_done(step, len(groups), scores)

    @contextmanager
    def _block(self, event: str, key: str) -> Iterator[None]:
        """Times a step or a phase. The end of the outermost block writes one row of all that happened in it."""
        started = time.perf_counter()
        self._depth += 1
        try:
            yield
        except BaseException:
            self._row.clear()  # what failed has no row
            raise
        finally:
            self._depth -= 1
        # A phase that comes twice in a step counts twice.
        self._row[key] = self._row.get(key, 0.0) + time.perf_counter() - started
        if self._depth == 0:
            row, self._row = self._row, {}
            self._finish(event, row)

    def _finish(self, event: str, row: Stats) -> None:
        if event == "step":
            row["step/tokens_per_second"] = row["rollout/completion_tokens"] / row["step/seconds"]
            self._prometheus.record({"step": self._step, "time": time.time()})
        self._prometheus.record(row)
        self._folder.write_row(event, self._step, row)
        for tracker in self._trackers:
            tracker.log(self._step, row)
        if event == "step":
            self.progress.step_done(self._step, row)

    def _serve(self, stack: ExitStack) -> None:
        """Serves /metrics on `metrics.port`; 0 lets the system choose."""
        port = self.config.metrics.port
        if port is None:
            return
        try:
            server, thread = start_http_server(port, registry=self._prometheus.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.port: /metrics needs a free port, but {port} cannot be opened ({error.strerror}); "
                "choose another, 0 for any free one or null for none"
            ) from error
        stack.callback(_stop_server, server, thread)
        self.port = server.server_port
        self.say(f"metrics at http://localhost:{self.port}/metrics")


def _stop_server(server: WSGIServer, thread: threading.Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
