"""The two lanes of a run, what each pool works at and when: spans from any thread, and the share in which a pool idles.

A pool is busy while one span at least says that its devices work (`BUSY`); the other spans, as of rewards or of weights
that arrive beside sampling, are shown and count as idle. Spans of one lane may overlap: each thread has a track of its
own in it, the lowest that is free, and what a thread does within something else lies on the same track.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from grpo.types import Lane, Stats

BUSY: dict[Lane, frozenset[str]] = {
    "rollout": frozenset({"sample", "eval", "switch", "sync"}),
    "trainer": frozenset({"train", "publish", "sync", "commit"}),
}
"""What keeps the devices of a pool at work, or others from them, as a commit that must be awaited. To wait for a batch
does not, nor does what goes on beside the next steps."""
ALWAYS: dict[str, dict[Lane, str]] = {
    "train": {"trainer": "train"},
    "checkpoint": {"trainer": "commit"},
    "eval": {"rollout": "eval"},
}
OVERLAPPED: dict[str, dict[Lane, str]] = {"weight_sync": {"trainer": "publish"}, **ALWAYS}
ALONE: dict[str, dict[Lane, str]] = {
    "rollout": {"rollout": "sample"},
    "reward": {"rollout": "reward"},
    "weight_sync": {"rollout": "sync", "trainer": "sync"},
    **ALWAYS,
}
"""The spans that phases of the loop are. In one that overlaps, sampling and switches have spans of their own."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that one lane did, for the batch or version of a step; times are unix seconds."""

    lane: Lane
    what: str
    step: int
    track: int
    start: float
    end: float


@dataclass(slots=True)
class Meter:
    """Adds up the time in which at least one span is open."""

    open: int = 0
    since: float = 0.0
    busy: float = 0.0

    def begin(self, now: float) -> None:
        """One more span is open."""
        self.take_up(now)
        self.open += 1

    def end(self, now: float) -> None:
        """One less."""
        self.take_up(now)
        self.open -= 1

    def take_up(self, now: float) -> None:
        """Counts the time up to now."""
        self.busy += (now - self.since) if self.open else 0.0
        self.since = now


@dataclass(slots=True)
class Held:
    """What a thread is at in a lane, the innermost last."""

    track: int
    open: list[str] = field(default_factory=list)


class Lanes:
    """Spans of several threads, each given to `write` when it ends."""

    def __init__(self, write: Callable[[Span], None], overlapped: bool) -> None:
        self._write = write
        self._phases = OVERLAPPED if overlapped else ALONE
        self._guard = threading.Lock()
        self._meters: dict[Lane, Meter] = {lane: Meter() for lane in BUSY}
        self._held: dict[Lane, dict[int, Held]] = {lane: {} for lane in BUSY}
        self._began: float | None = None
        self._unix = time.time() - time.perf_counter()

    @contextmanager
    def span(self, lane: Lane, what: str, step: int) -> Iterator[None]:
        """Around the work. The same within itself, as a lane within the phase that stands for it, is one span."""
        thread = threading.get_ident()
        with self._guard:
            held, start = self._hold(lane, thread), time.perf_counter()
            new = what not in held.open
            held.open.append(what)
            busy = new and what in BUSY[lane]
            if busy:
                self._meters[lane].begin(start)
        try:
            yield
        finally:
            with self._guard:
                end = time.perf_counter()
                held.open.pop()
                if not held.open:
                    del self._held[lane][thread]
                if busy:
                    self._meters[lane].end(end)
            if new:
                self._write(Span(lane, what, step, held.track, self._unix + start, self._unix + end))

    def moment(self, lane: Lane, what: str, step: int) -> None:
        """Something that takes no time."""
        now = self._unix + time.perf_counter()
        self._write(Span(lane, what, step, 0, now, now))

    def _hold(self, lane: Lane, thread: int) -> Held:
        held = self._held[lane]
        if thread not in held:
            taken = {each.track for each in held.values()}
            held[thread] = Held(min(set(range(len(taken) + 1)) - taken))
        return held[thread]

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Around a phase of the loop, which may be a span in one lane, in both or in none."""
        with ExitStack() as stack:
            for lane, what in self._phases.get(name, {}).items():
                stack.enter_context(self.span(lane, what, step))
            yield

    def step_started(self) -> None:
        """Idle time is counted from here on, if it was not counted already since the last step's end."""
        if self._began is None:
            self._count()

    def step_ended(self) -> Stats:
        """The share of the time since the end of the step before in which each pool had nothing to do."""
        began = self._began
        now, busy = self._count()
        if began is None or now <= began:
            return {}
        return {f"pipeline/{lane}_idle": max(0.0, 1 - seconds / (now - began)) for lane, seconds in busy.items()}

    def rewound(self) -> None:
        """The next step counts from its own start: what lies before it was no step."""
        self._began = None

    def _count(self) -> tuple[float, dict[Lane, float]]:
        with self._guard:
            self._began = now = time.perf_counter()
            busy: dict[Lane, float] = {}
            for lane, meter in self._meters.items():
                meter.take_up(now)
                busy[lane], meter.busy = meter.busy, 0.0
            return now, busy
