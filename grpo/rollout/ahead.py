"""Batches that are drawn ahead of the step that trains them, in the order of a clock and never of who is first.

One thread, the feeder, takes prompts and lets engines sample batch after batch, never more than `rollout.max_staleness`
ahead of training, each from the weights that `run/clock.py` says. Rewards are computed beside the next batch.

    between_batches   a batch begins when the one before is sampled and all engines hold its version
    in_flight         a batch begins as soon as the engines hold the oldest version that it may have

With `rollout.refill` a batch begins when the one before is scored: which prompts are next is known only then.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from grpo.errors import ClusterError, GrpoError, TrainerLost
from grpo.interfaces import Batch, Recorder, Weights
from grpo.rollout.drawing import Draw, Drawer, check_versions
from grpo.rollout.drawn import Ahead, dump_drawn, load_drawn
from grpo.run.background import Background, Cancelled
from grpo.run.clock import Clock
from grpo.run.faults import phase_point
from grpo.run.stopping import StopRequest
from grpo.types import Groups, Prompt, Stats

SLICE_SECONDS = 0.25
"""Between two looks at whether a wait makes sense."""
JOIN_SECONDS = 60.0
"""For threads that were told to end, besides what rewards may take: in all other waits they look whether they were."""


class AheadCollector:
    """A `Collector` whose batches are drawn in the background."""

    def __init__(
        self,
        drawer: Drawer,
        weights: Weights,
        recorder: Recorder,
        stop: StopRequest,
        held_out: Sequence[Prompt],
        background: Background,
    ) -> None:
        self.drawer, self.weights, self.recorder, self.stop, self.held_out = drawer, weights, recorder, stop, held_out
        self.background = background
        self.clock = Clock.of(drawer.config, bool(held_out))
        self._changed = threading.Condition()  # its lock may be taken again inside
        self._reset(0, [])

    def _reset(self, step: int, ahead: Sequence[Batch]) -> None:
        self._batches: dict[int, Future[Batch]] = {}
        self._trained = step
        self._sampled = step + len(ahead)
        self._failure: BaseException | None = None
        self._failed_from = 0
        self._running = False
        for number, batch in enumerate(ahead, start=step + 1):
            self._batch(number).set_result(batch)

    def next(self, step: int, sampled: Callable[[], None]) -> Batch:
        """The batch of a step, once it is drawn. Raises what drawing it raised."""
        self._advance(step - 1)
        with self._changed:
            ahead = sum(future.done() for number, future in self._batches.items() if number >= step)
        with self.recorder.phase("rollout"):
            batch = self._wait(self._batch(step))
        sampled()
        with self._changed:
            for old in [number for number in self._batches if number < step]:
                del self._batches[old]
        return replace(batch, stats=batch.stats | {"pipeline/batches_ahead": float(ahead)})

    def evaluate(self, step: int) -> tuple[Groups, Stats]:
        """Scored groups of the held-out prompts. The engines go on with batches that have the same version."""
        self._advance(step)
        if not self.clock.in_flight and self.weights.version != step:
            last = self.clock.furthest(step - 1)  # of an older version
            self._until(lambda: self._sampled >= last)
        self.weights.hold(step)
        groups = self.drawer.evaluate(self.held_out, step)
        return self.drawer.scores(groups)

    def state(self) -> Mapping[str, object]:
        """Where the stream of prompts is; of no use once the feeder runs."""
        return self.drawer.prompts.state()

    def recorded(self, step: int) -> Mapping[str, object]:
        """What became of prompts up to that step."""
        return self.drawer.prompts.recorded(step)

    def drawn(self, step: int) -> Callable[[], bytes]:
        """The batches that the step's checkpoint must hold."""
        last = min(step + self.clock.staleness, self.clock.last)
        ahead = [self._batch(number) for number in range(step + 1, last + 1)]
        return lambda: dump_drawn(self._rule(), step, self._those_drawn(ahead))

    def restore(self, step: int, prompts: Mapping[str, object], drawn: bytes) -> None:
        """Goes on behind what was drawn already. Batches of another rule of versions are drawn again."""
        self.stop_ahead()
        self._join()
        self.drawer.rollouts.abandon()
        self.clock = Clock.of(self.drawer.config, bool(self.held_out), base=step)
        ahead = load_drawn(drawn) if drawn else Ahead(self._rule(), [])
        draws = ahead.draws if ahead.rule == self._rule() else []
        batches = self.drawer.restore(prompts, draws)
        with self._changed:
            self._reset(step, batches)

    def stop_ahead(self) -> None:
        """Tells the feeder to end; whoever waits for a batch is told that it will not come."""
        self.background.cancel()
        self._fail(0, Cancelled("drawing ahead was stopped"))

    def _those_drawn(self, batches: "Sequence[Future[Batch]]") -> list[Batch]:
        """All of them; `in_flight`, where the rest need not come out the same, those before one that failed."""
        drawn = []
        for batch in batches:
            try:
                drawn.append(batch.result())
            except GrpoError as error:
                if not self.clock.in_flight or isinstance(error, TrainerLost):
                    raise
                break
        return drawn

    def _rule(self) -> dict[str, object]:
        """What drawn batches depend on, besides what else a run may not change."""
        rollout = self.drawer.config.rollout
        names = ("max_staleness", "update", "refill", "max_refills", "prompts_per_step", "samples_per_prompt")
        rule = self.drawer.config.data.curriculum
        return {name: getattr(rollout, name) for name in names} | ({"curriculum": rule.model_dump()} if rule else {})

    # What the loop's thread does

    def _advance(self, trained: int) -> None:
        """The loop has trained that step; the feeder starts with the first batch that is wanted."""
        with self._changed:
            self._trained = max(self._trained, trained)
            if not self._running:
                self._running = True
                self.background.start("feeder", self._feed)
            self._changed.notify_all()

    def _join(self) -> None:
        seconds = self.drawer.config.deadlines.reward + JOIN_SECONDS
        deadline = time.monotonic() + seconds
        while not self.background.join(SLICE_SECONDS):
            self.stop.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"what is sampled and scored ahead must end within {seconds:g} s after a loss, but goes on; start "
                    "the run again, it resumes from its last checkpoint"
                )

    def _wait(self, batch: "Future[Batch]") -> Batch:
        while True:
            self.stop.check()
            try:
                return batch.result(SLICE_SECONDS)
            except NotYet:
                self.recorder.alive()

    # What the feeder and the threads of batches do

    def _feed(self) -> None:
        for step in range(self._sampled + 1, self.clock.last + 1):
            with self._failing(step):
                self._until(partial(self._may_begin, step))
                self.weights.hold(self.clock.oldest(step))
                draw = Draw(step)
                prompts = self.drawer.take(draw)
                if self.drawer.rounds > 1:
                    self._make(draw, prompts)
                elif self.clock.in_flight:
                    self.background.start(f"batch-{step}", partial(self._make, draw, prompts))
                else:
                    groups = self._sample(draw, prompts)
                    self.background.start(f"rewards-{step}", partial(self._finish, draw, groups))
                with self._changed:
                    self._sampled = step
                    self._changed.notify_all()

    def _may_begin(self, step: int) -> bool:
        return step <= self.clock.furthest(self._trained)

    def _make(self, draw: Draw, prompts: Sequence[Prompt]) -> None:
        """The whole of a batch."""
        with self._failing(draw.step):
            self._finish(draw, self._sample(draw, prompts))

    def _finish(self, draw: Draw, groups: Groups) -> None:
        """What is left to do for a batch whose first prompts are sampled."""
        with self._failing(draw.step):
            self._score(draw, groups)
            while self.drawer.wants(draw):
                self._score(draw, self._sample(draw, self.drawer.take(draw)))
            batch = self.drawer.batch(draw)
            with self._changed:
                if not (future := self._batch(draw.step)).done():
                    future.set_result(batch)

    def _sample(self, draw: Draw, prompts: Sequence[Prompt]) -> Groups:
        with self.recorder.lane("rollout", "sample", draw.step):
            groups = self.drawer.sample(draw, prompts)
        check_versions(groups, self.clock.oldest(draw.step), self.clock.newest(draw.step))
        return groups

    def _score(self, draw: Draw, groups: Groups) -> None:
        with self.recorder.lane("rollout", "reward", draw.step):
            phase_point("reward", "began", draw.step)
            self.drawer.score(draw, groups)
            phase_point("reward", "ended", draw.step)

    # Who waits for whom

    def _batch(self, step: int) -> "Future[Batch]":
        """Where the batch of a step will be, or what drawing it raised."""
        with self._changed:
            if step not in self._batches:
                future = self._batches[step] = Future()
                if self._failure and step >= self._failed_from:
                    future.set_exception(self._failure)
            return self._batches[step]

    @contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """What is raised inside is raised for whoever asks for that batch or a later one, and ends the thread."""
        try:
            yield
        except BaseException as error:
            self._fail(step, error)
            raise Cancelled from error

    def _fail(self, step: int, error: BaseException) -> None:
        with self._changed:
            if not self._failure or step < self._failed_from:
                self._failure, self._failed_from = error, step
            for number, future in self._batches.items():
                if number >= step and not future.done():
                    future.set_exception(error)
            self._changed.notify_all()

    def _until(self, true: Callable[[], bool]) -> None:
        with self._changed:
            while not true():
                self.background.look(self.stop)
                if self._failure:
                    raise self._failure
                self._changed.wait(SLICE_SECONDS)
