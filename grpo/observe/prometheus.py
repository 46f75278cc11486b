"""The catalogue as Prometheus series. What comes once a step comes as a row; what must show at once has a verb here."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from grpo.config import Config
from grpo.observe.metrics import CATALOGUE, PHASES, Metric, lookup
from grpo.observe.phase_clock import PhaseClock
from grpo.types import Group, Stats

# Labels of counters that no key of a row has
EVENTS = {
    "grpo_steps_total": ("ok", "failed"),
    "grpo_weight_sync_total": ("ok", "error"),
    "grpo_recoveries_total": ("rollout", "trainer"),
    "grpo_engine_events_total": ("joined", "left", "failed"),
    "grpo_tracker_failures_total": ("TensorBoard", "W&B", "MLflow"),
}


class PrometheusMetrics:
    """The catalogue as Prometheus series in a registry of its own. Any thread may call."""

    def __init__(
        self, run: str, version: str, model: str, loss: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._guard = threading.Lock()  # of what belongs together; each series has its own
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the series
        self.registry = CollectorRegistry()
        self._run = run
        (timed,) = (metric for metric in CATALOGUE if metric.name == "grpo_phase_seconds_total")
        self._phases = PhaseClock(timed, run, clock)
        self.registry.register(self._phases)
        self._collectors = {metric.name: self._register(metric) for metric in CATALOGUE if metric is not timed}
        self._set("grpo_start_timestamp_seconds", time.time())
        self._set("grpo_build_info", 1, version)
        self._set("grpo_run_info", 1, model, loss)
        for phase in PHASES:
            self._set("grpo_phase", 0, phase)
        # A counter that first appears with its first failure has no increase to alert on, and no 0 to show
        for metric in CATALOGUE:
            if metric.kind == "counter" and metric is not timed:
                values = EVENTS.get(metric.name) or [value for value in metric.keys.values() if value != "*"]
                for value in values if metric.labels else [""]:
                    self._add(metric.name, 0, *([value] if metric.labels else []))

    def _register(self, metric: Metric) -> Counter | Gauge | Histogram:
        labels = ("run", *metric.labels)
        if metric.kind == "histogram":
            return Histogram(metric.name, metric.help, labels, registry=self.registry, buckets=metric.buckets)
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(metric.name, metric.help, labels, registry=self.registry)

    def _set(self, name: str, value: float, *labels: str) -> None:
        collector = self._collectors[name]
        assert isinstance(collector, Gauge)
        collector.labels(self._run, *labels).set(value)

    def _add(self, name: str, value: float, *labels: str) -> None:
        collector = self._collectors[name]
        assert isinstance(collector, Counter)
        collector.labels(self._run, *labels).inc(value)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        collector = self._collectors[name]
        assert isinstance(collector, Histogram)
        collector.labels(self._run, *labels).observe(value)

    def record(self, row: Stats) -> None:
        """Takes over every key of a row. Only gauges can show a number that is not finite."""
        for key, value in row.items():
            metric, label = lookup(key)
            labels = (label,) if label else ()
            if metric.kind == "gauge":
                self._set(metric.name, value, *labels)
            elif math.isfinite(value):
                (self._add if metric.kind == "counter" else self._observe)(metric.name, value, *labels)

    def start(self, config: Config, attempt: int, engines: bool = True) -> None:
        """What is known before the first step; `engines`: whether there are any."""
        self._set("grpo_attempt", attempt)
        self._set("grpo_run_steps", config.run.steps)
        self._set("grpo_checkpoint_every_steps", config.checkpoint.every)
        self._set("grpo_max_staleness_steps", config.rollout.max_staleness, config.rollout.update)
        for role, expected in (("rollout", config.rollout.fewest_engines * engines), ("trainer", config.train.ranks)):
            self._set("grpo_workers", expected, role, "expected")
            self.workers(role, ready=0, lost=0)
        self.engines(config.rollout.most_engines * engines, healthy=0, joining=0)
        self.progress()
        for phase, seconds in config.deadlines:
            self._set("grpo_deadline_seconds", seconds, phase)

    def restore(self, row: Mapping[str, float | None], step: int, at: float) -> None:
        """Gauges as the last step before a checkpoint left them."""
        gauges = {key: value for key, value in row.items() if value is not None and lookup(key)[0].kind == "gauge"}
        self.record(gauges | {"step": step, "time": at})

    def rewound(self, step: int) -> None:
        """The run resumes from the checkpoint of that step, or begins at step 0."""
        self._set("grpo_resumed_step", step)
        self._set("grpo_checkpoint_step", step)

    def committed(self, step: int, size: int) -> None:
        """A checkpoint of `size` bytes is the newest."""
        self._set("grpo_checkpoint_step", step)
        self._set("grpo_checkpoint_size_bytes", size)
        self._set("grpo_checkpoint_last_success_timestamp_seconds", time.time())

    def workers(self, role: str, ready: int, lost: int) -> None:
        """How many actors of a role are there and how many are missing."""
        with self._guard:
            self._set("grpo_workers", ready, role, "ready")
            self._set("grpo_workers", lost, role, "lost")

    def engines(self, wanted: int, healthy: int, joining: int) -> None:
        """How many engines the run asks for, how many sample, and how many are about to."""
        with self._guard:
            for state, count in (("wanted", wanted), ("healthy", healthy), ("joining", joining)):
                self._set("grpo_engines", count, state)

    def engine_event(self, event: str) -> None:
        """One has joined or left, or could not join."""
        self._add("grpo_engine_events_total", 1, event)

    def started(self, role: str, actors: Iterable[Stats]) -> None:
        """Actors of a role have started; the slowest one counts."""
        slowest = max(actors, key=lambda seconds: sum(seconds.values()), default={})
        for phase, seconds in slowest.items():
            self._set("grpo_start_seconds", seconds, role, phase)

    def policy_version(self, role: str, version: int) -> None:
        """The version of the weights that a role holds."""
        self._set("grpo_policy_version", version, role)

    def sync_ended(self, ok: bool) -> None:
        """Counts a sync: all engines have taken verified weights, or it ended by an exception."""
        self._add("grpo_weight_sync_total", 1, "ok" if ok else "error")

    def progress(self) -> None:
        """A sign of progress, now."""
        self._set("grpo_progress_timestamp_seconds", time.time())

    def recovered(self, role: str, seconds: float) -> None:
        """What a role had lost was replaced, `seconds` after that was noticed."""
        self._add("grpo_recoveries_total", 1, role)
        self._set("grpo_recovery_timestamp_seconds", time.time(), role)
        self.record({"recovery/seconds": seconds})

    def tracker_failed(self, tracker: str) -> None:
        """A service or file that is told the rows has failed once more."""
        self._add("grpo_tracker_failures_total", 1, tracker)

    def checkpoint_skipped(self) -> None:
        """One more checkpoint was damaged and passed over."""
        self._add("grpo_checkpoint_skipped_total", 1)

    def record_samples(self, groups: Sequence[Group], step: int) -> None:
        """Fills the distributions over a step's samples."""
        for sample in (sample for group in groups for sample in group.samples):
            if sample.reward is not None:  # a row of a supervised warm-up has none
                self._observe("grpo_reward", sample.reward)
            self._observe("grpo_completion_tokens", sample.sampled_tokens)
            self._observe("grpo_sample_staleness_steps", sample.lag(step))
            self._add("grpo_completion_truncated_total", sample.truncated)

    def phase_started(self, phase: str) -> None:
        """The run is in this phase until `phase_ended`."""
        self._phases.began(phase)
        self._set("grpo_phase", 1, phase)

    def phase_ended(self, phase: str, ok: bool) -> None:
        """Not `ok`: it ended by an exception. Counts syncs and checkpoints that failed."""
        self._phases.ended(phase)
        self._set("grpo_phase", 0, phase)
        if phase == "weight_sync" and not ok:
            self.sync_ended(ok=False)
        if phase == "checkpoint" and not ok:
            self._add("grpo_checkpoint_failures_total", 1)

    def step_ended(self, ok: bool) -> None:
        """Counts the step; not `ok`: it ended by an exception."""
        self._add("grpo_steps_total", 1, "ok" if ok else "failed")
