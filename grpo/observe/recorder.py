"""Everything a person sees of a run: its folder, the progress line, Prometheus and, if asked, W&B or MLflow."""

import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from grpo import __version__
from grpo.config import Config
from grpo.errors import WeightSyncError
from grpo.observe.books import Books, Lines
from grpo.observe.chain import SEAL, short
from grpo.observe.folder import RunFolder, prepare_folder, writing
from grpo.observe.health import Health
from grpo.observe.lanes import Lanes
from grpo.observe.metrics import digests, summarize
from grpo.observe.progress import RunProgress
from grpo.observe.prometheus import PrometheusMetrics
from grpo.observe.rows import number, numbers_of, read_rows
from grpo.observe.server import serving_run
from grpo.observe.startup import DRIVER, STARTUP, start_line, total
from grpo.observe.timeline import Timeline
from grpo.observe.tracking import Tracking
from grpo.run.faults import fault_point, phase_point
from grpo.run.layout import METRICS
from grpo.run.start import Phases
from grpo.types import EngineEvent, Group, Groups, Lane, Skipped, Stats

ENGINE = "engine"
"""Event of a row that says what became of an engine."""
TOLD: dict[EngineEvent, str] = {
    "joined": "has joined the engines that sample",
    "left": "has left the engines that sample",
    "failed": "could not join; it is tried again later",
}


class RunRecorder:
    """Implements `controller.Recorder`; a context manager that creates the run's folder and closes what it opened.

    Entering raises ConfigError if the folder holds a run that must not be resumed, the port is taken or a
    tracker's package is missing, and CheckpointError if the folder cannot be written. `command` is shown in the report.
    By default it is this process's own, and `run_dir` is `run.dir`. `attempt` counts the starts of the run. `decode`
    makes the text of prompts, as the model sees it, for samples.jsonl. `streams` is what the order of prompts follows
    from; without it there are no books. `phases` have known since the command began what the start is at. `engines`:
    whether there are any; a supervised warm-up has none.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path | None = None,
        progress: RunProgress | None = None,
        command: Sequence[str] | None = None,
        attempt: int = 1,
        decode: Callable[[Sequence[int]], str] | None = None,
        streams: Sequence[Mapping[str, object]] = (),
        phases: Phases | None = None,
        engines: bool = True,
    ) -> None:
        self.config = config
        self.run_dir = Path(config.run.dir) if run_dir is None else run_dir
        self.progress = progress or RunProgress(config.run.steps)
        self.port: int | None = None
        self.health = Health(config)
        self._command = shlex.join(["grpo", *sys.argv[1:]] if command is None else command)
        loss = config.algorithm.loss if engines else "sft"
        self._prometheus = PrometheusMetrics(config.run.name, __version__, config.model.path, loss)
        self._prometheus.start(config, attempt, engines)
        self._attempt, self._engines = attempt, engines
        self._engine_count = 0
        self._decode = decode
        self._tracking = Tracking(config, self.run_dir, self.say, self._prometheus.tracker_failed)
        self._phases, self._started = phases, dict[str, Stats]()
        self._own: list[str] = []
        """Rows of this start that outlive going back to a checkpoint, whether that holds them or not."""
        self._guard = threading.RLock()
        """Of what other threads write while the main thread goes back."""
        self._lanes = Lanes(lambda span: self._timeline.add(span), overlapped=config.rollout.max_staleness > 0)
        self._row: Stats = {}
        self._digests: dict[str, str] = {}
        self._books = Books(self.run_dir, config, streams, attempt) if streams else None
        self._booked: Callable[[Lines], None] | None = None
        self._lines = Lines()
        self._depth = 0
        self._step = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            prepare_folder(self.run_dir, self.config.run.resume)
            self.port = stack.enter_context(serving_run(self.config, self._prometheus.registry, self.health))
            if self.port is not None:
                self.say(f"metrics at http://localhost:{self.port}/metrics")
            stack.push(lambda kind, error, trace: self._tracking.close(ok=kind is None))
            self._tracking.open()
            self._folder = RunFolder(self.run_dir, self.config, self._decode)
            stack.callback(self._folder.close)
            self._timeline = Timeline(self.run_dir, self.config.rollout.max_staleness, self.config.metrics.trace)
            stack.callback(self._timeline.close)
            stack.callback(self.progress.close)
            if self._books:
                stack.callback(self._books.close)
            said = {"command": self._command, "version": __version__, "attempt": str(self._attempt)}
            self._own.append(self._folder.write_row("start", 0, {}, **said))
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
        self._lanes.step_started()
        ok = False
        try:
            with self._block("step", "step/seconds"):
                yield
            ok = True
        finally:
            self._prometheus.step_ended(ok)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self._engines:
            self._start_ended()  # there is no first sync that does it
        self.progress.phase(name)
        self._prometheus.phase_started(name)
        self.alive(name)
        ok = False
        try:
            with self._block(name, f"phase/{name}"), self._lanes.phase(name, self._step):
                phase_point(name, "began", self._step)
                yield
                phase_point(name, "ended", self._step)
            ok = True
        finally:
            self.progress.phase("")
            self._prometheus.phase_ended(name, ok)
            self.alive("")

    @contextmanager
    def lane(self, lane: Lane, what: str, step: int) -> Iterator[None]:
        self.alive()
        try:
            with self._lanes.span(lane, what, step):
                yield
        except WeightSyncError:  # the phase of the same name does not see what is beside the steps
            self._prometheus.sync_ended(ok=False)
            raise
        self.alive()

    def log_sync(self, stats: Stats, digest: str) -> None:
        assert self._depth > 0, "log_sync belongs inside of phase('weight_sync')"
        self._row |= stats
        self._start_ended()
        if digest:  # else engines take them later, which has a row of its own
            self._digests["weights"] = digest
            self._prometheus.sync_ended(ok=True)
        self.health.ready()

    def log_version(self, version: int, stats: Stats, digest: str) -> None:
        self._prometheus.sync_ended(ok=True)
        self._write("weight_sync", version, stats, weights=digest)
        self.health.ready()
        self.alive()

    def log_step(
        self,
        step: int,
        groups: Groups,
        stats: Stats,
        skipped: Groups = (),
        not_drawn: Sequence[Skipped] = (),
    ) -> None:
        assert self._depth > 0, "log_step belongs inside of step()"
        self._row |= stats | summarize(groups, step)
        self._digests |= digests(groups)
        self.health.ready()  # where no weight sync says so before
        self._prometheus.record_samples(groups, step)
        self._lines.kept = self._folder.write_samples(
            "step", step, groups, self._books.weights if self._books else None
        )
        if books := self._books:
            dropped = int(stats.get("reward/dropped_groups", 0))
            self._booked = partial(books.step, step, groups, skipped, dropped, not_drawn)

    def log_eval(self, step: int, groups: Sequence[Group], scores: Stats) -> None:
        assert self._depth > 0, "log_eval belongs inside of phase('eval')"
        self._step = step
        self._row |= scores
        self._lines.kept = self._folder.write_samples(
            "eval", step, groups, self._books.weights if self._books else None
        )
        if books := self._books:
            self._booked = partial(books.evaluation, step, groups)
        self.progress.eval_done(step, len(groups), scores)

    def log_commit(self, step: int, size: int, stats: Stats | None = None) -> None:
        """A checkpoint of `size` bytes is the newest."""
        self._prometheus.committed(step, size)
        if stats is not None:
            self._write("commit", step, stats)
        self.alive()

    def attachments(self, step: int | None = None) -> dict[str, bytes]:
        """What a checkpoint keeps for `rewind`: the rows of metrics.jsonl up to those of `step`, or all."""
        self.alive()  # the ranks have copied their share
        if not self._books:
            return {METRICS: self._folder.metrics(step)}
        with writing(self.run_dir):
            return {SEAL: self._books.seal(step), METRICS: self._folder.metrics(step)}

    def rewind(self, step: int, attachments: Mapping[str, bytes]) -> None:
        """Goes back to what was recorded when a checkpoint took the attachments; step 0 has none.

        Gauges show the last step again; counters begin anew with every process, as Prometheus expects.
        """
        self._step = step
        self._prometheus.rewound(step)
        self._lanes.rewound()
        self._timeline.rewind(step)
        kept = attachments.get(METRICS, b"")
        held = set(kept.decode(errors="replace").splitlines(True))
        with self._guard:
            self._folder.rewind(step, kept, [row for row in self._own if row not in held])
        if self._books:
            with writing(self.run_dir):
                problem = self._books.rewind(step, attachments.get(SEAL, b""))
            if problem:
                self.say(f"warning: {problem}")
        self.progress.rewind(step)
        if step:
            self.say(f"resumes from the checkpoint of step {step}")
        rows = [row for row in read_rows(self.run_dir / METRICS) if row["event"] not in (STARTUP, ENGINE)]
        self._tracking.rewind((int(number(row, "step")), numbers_of(row)) for row in rows)
        steps = [row for row in rows if row["event"] == "step"]
        for row in steps[-1:]:
            self._prometheus.restore(numbers_of(row), step, number(row, "time"))
        fault_point("resume.restored", step)

    def damaged(self, name: str, reason: str) -> None:
        """A checkpoint that was passed over."""
        self._prometheus.checkpoint_skipped()
        self.say(f"warning: checkpoint {name} is damaged and was passed over: {reason}")

    def starting(self, phase: str) -> None:
        if self._phases:
            self._phases.begin(phase)

    def started(self, role: str, actors: Mapping[str, Stats]) -> None:
        """A row for each of them, which says nothing about a step and goes to no tracker."""
        self._prometheus.started(role, actors.values())
        self._started |= actors
        for actor, seconds in actors.items():
            row = {f"start/{phase}": took for phase, took in {"seconds": total(seconds), **seconds}.items()}
            with self._guard:
                self._own.append(self._folder.write_row(STARTUP, self._step, row, role=role, actor=actor))

    def _start_ended(self) -> None:
        """The first weights are on the engines, or on their way: what comes next is a step."""
        phases, self._phases = self._phases, None
        if phases:
            self.started("driver", {DRIVER: phases.end()})
            self.say(start_line(self._started))

    def workers(self, role: str, ready: int, lost: int) -> None:
        self._prometheus.workers(role, ready, lost)
        self.alive()

    def engines(self, wanted: int, healthy: int, joining: int) -> None:
        self._engine_count = healthy
        self._prometheus.engines(wanted, healthy, joining)

    def engine(self, event: EngineEvent, name: str) -> None:
        """Beside the log a row, and a moment in the timeline; none of it says anything about a step."""
        self.say(f"{name} {TOLD[event]}")
        self._prometheus.engine_event(event)
        self._lanes.moment("rollout", event, self._step)
        with self._guard:
            self._own.append(self._folder.write_row(ENGINE, self._step, {}, what=event, engine=name))

    def policy_version(self, role: str, version: int, digest: str = "") -> None:
        if digest and self._books:
            with writing(self.run_dir):
                self._books.sync(version, digest)
        self._prometheus.policy_version(role, version)
        self.alive()

    def alive(self, phase: str | None = None) -> None:
        self._prometheus.progress()
        self.health.alive(phase)

    def recovered(self, role: str, error: Exception, seconds: float) -> None:
        """Something was lost and is replaced, `seconds` after that was noticed."""
        self.say(f"{role} replaced in {seconds:.1f} s")
        self._prometheus.recovered(role, seconds)
        self.alive()
        said = {"role": role, "cause": str(error)}
        with self._guard:
            self._own.append(self._folder.write_row("recovery", self._step, {"recovery/seconds": seconds}, **said))

    @contextmanager
    def _block(self, event: str, key: str) -> Iterator[None]:
        """Times a step or a phase. The end of the outermost block writes one row of all that happened in it."""
        started = time.perf_counter()
        self._depth += 1
        try:
            yield
        except BaseException:
            self._row.clear()  # what failed has no row
            self._digests.clear()
            self._booked = None
            raise
        finally:
            self._depth -= 1
        # A phase that comes twice in a step counts twice.
        self._row[key] = self._row.get(key, 0.0) + time.perf_counter() - started
        if self._depth == 0:
            row, self._row = self._row, {}
            text, self._digests = self._digests, {}
            self._finish(event, row, text)

    def _finish(self, event: str, row: Stats, text: Mapping[str, str]) -> None:
        if event == "step":
            row["step/tokens_per_second"] = row["rollout/completion_tokens"] / row["step/seconds"]
            row |= self._lanes.step_ended()
            if self._engines:
                row["pipeline/engines"] = float(self._engine_count)
                row["pipeline/queue_seconds"] = row.get("phase/rollout", 0.0)
            else:
                row.pop("pipeline/rollout_idle", None)
            self._prometheus.record({"step": self._step, "time": time.time()})
        line = self._write(event, self._step, row, **text)
        if booked := self._booked:
            self._booked, self._lines.metrics = None, short(line.encode())
            with writing(self.run_dir):
                booked(self._lines)
        if event == "step":
            self.progress.step_done(self._step, row)

    def _write(self, event: str, step: int, row: Stats, **text: str) -> str:
        """A row to all who are told rows, from any thread; its line in metrics.jsonl."""
        self._prometheus.record(row)
        line = self._folder.write_row(event, step, row, **text)
        self._tracking.log(step, row)
        return line
