"""The rollout engines: which of them may sample, how a lost one comes back, and how further ones join.

    DEAD -> RESTARTING -> STALE -> HEALTHY       and from each of the last three back to DEAD

An engine becomes HEALTHY only through a verified weight sync. Whatever breaks off in the middle of one is DEAD: half a
model is never served.

Where `rollout.engines` is {min, max} the fleet asks Ray for max engines all the time: those without a node are actors
that wait for one, which an autoscaler sees. Whoever has started joins at the next sync. An engine is *spare* as long as
`min` others serve: then its loss counts for nothing, and what keeps it from joining ends nothing but is tried again,
after a pause that grows.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from grpo.cluster.context import RunContext
from grpo.cluster.gate import Gate
from grpo.errors import ClusterError, EngineLost, GrpoError, OutOfMemory
from grpo.interfaces import Call, Engine, Place, Worker
from grpo.types import Stats

PAUSE_SECONDS, LONGEST_PAUSE = 10.0, 600.0
"""Before a spare engine that failed is started again; twice as long each time."""
LOOK_SECONDS = 1.0
"""Between two looks at whether an engine has a node."""
CALM_SECONDS = 600.0
"""Who has served for so long has not failed before."""


class State(StrEnum):
    """Of an engine."""

    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    HEALTHY = "healthy"


ARCS = {
    State.DEAD: {State.RESTARTING},
    State.RESTARTING: {State.STALE, State.DEAD},
    State.STALE: {State.HEALTHY, State.DEAD},
    State.HEALTHY: {State.DEAD},
}


@dataclass(eq=False)
class Slot:
    """The place of one engine; `lost` and `lost_at` tell of the one before, where that was missed."""

    index: int
    engine: Engine
    state: State = State.DEAD
    starting: Call[Place] | None = None
    since: float = 0.0
    """When it came into its state; of one that starts, when it had a node."""
    has_node: bool = False
    lost: ClusterError | None = None
    lost_at: float = 0.0
    failures: int = 0
    again_at: float = 0.0

    def to(self, state: State) -> None:
        """Along one of ARCS."""
        assert state in ARCS[self.state], f"an engine cannot go from {self.state} to {state}"
        self.state, self.since = state, time.monotonic()

    def mourn(self, error: ClusterError) -> None:
        """It is lost: when another may take its place, where it is not needed at once."""
        calm = self.state is State.HEALTHY and time.monotonic() - self.since > CALM_SECONDS
        self.failures = (0 if calm else self.failures) + error.counts
        self.to(State.DEAD)
        self.lost, self.lost_at = error, self.since
        self.again_at = self.since + (pause(self.failures) if error.counts else 0.0)


class Fleet:
    """All engines of a run. `create` makes the engine of a place; the observer is told of losses and who may sample.

    Several threads may use it, one at a time. `most` engines: what this machine has room for, where no node comes.
    """

    def __init__(self, context: RunContext, create: Callable[[int], Engine], most: int | None = None) -> None:
        rollout = context.config.rollout
        self.context, self.create = context, create
        self.fewest, self.most = rollout.fewest_engines, most or rollout.most_engines
        self.elastic = self.fewest < self.most
        self.gate = Gate(context.workers.look)
        self._turn = threading.RLock()
        self._began = False
        self.slots = [Slot(index, create(index)) for index in range(self.most)]
        for slot in self.slots:
            self._start(slot)

    def of(self, *states: State) -> list[Slot]:
        """The places whose engine is in one of these states."""
        return [slot for slot in self.slots if slot.state in states]

    @property
    def serving(self) -> list[Slot]:
        """Those that have started."""
        return self.of(State.STALE, State.HEALTHY)

    @property
    def joining(self) -> list[Slot]:
        """Those that have started and are not needed: what keeps them from joining ends nothing."""
        enough = self.elastic and len(self.of(State.HEALTHY)) >= self.fewest
        return self.of(State.STALE) if enough else []

    def lose(self, lost: Mapping[Slot, ClusterError]) -> None:
        """Ends these engines and lets new ones start: one loss, however many. Raises ClusterError at one too many."""
        if not lost:
            return
        with self._turn:
            served = self.of(State.HEALTHY)
            for slot, error in lost.items():
                self.context.workers.discard(slot.engine, error, False)
                slot.mourn(error)
            spare = len(self.serving) >= self.fewest
            if not spare:
                self.context.recoveries.spend(max(lost.values(), key=lambda error: error.counts))
            for slot in lost:
                slot.lost = None if spare else slot.lost
                if self.elastic and (slot in served or lost[slot].counts):
                    self.context.observer.engine("left" if slot in served else "failed", str(slot.engine))
            self._revive()
            self._report()

    def failed(self, errors: Mapping[Engine, ClusterError]) -> None:
        """These engines failed whoever asked them; those that are replaced already are not lost again."""
        with self._turn:
            alive = self.of(State.RESTARTING, State.STALE, State.HEALTHY)
            self.lose({slot: errors[slot.engine] for slot in alive if slot.engine in errors})

    def refuse(self, slots: Sequence[Slot], error: GrpoError) -> None:
        """Engines that are not needed cannot join, for now."""
        with self._turn:
            counts = not isinstance(error, ClusterError) or error.counts
            left = [slot for slot in slots if slot.state is not State.DEAD]
            self.lose({slot: EngineLost(f"{slot.engine} cannot join: {error}", counts) for slot in left})

    def leaving(self) -> list[Worker]:
        """Healthy engines whose node is about to go away, if others stay that can take over what they sample."""
        healthy = [slot.engine for slot in self.of(State.HEALTHY)]
        going = self.context.workers.leaving(healthy)
        return going if len(going) < len(healthy) else []

    def retire(self, last: bool = True) -> None:
        """Replaces engines whose node is about to go away; the new ones wait for another node.

        Without `last` they stay where nobody else serves.
        """
        with self._turn:
            serving = self.serving
            leaving = self.context.workers.leaving([slot.engine for slot in serving])
            if len(leaving) == len(serving) and not last:
                return
            error = EngineLost("engines move: their node is about to go away", counts=False)
            self.lose({slot: error for slot in serving if slot.engine in leaving})

    def gather(self, wait: bool, last: bool = True) -> None:
        """Takes in the engines that have started since; with `wait` it waits until as many as needed have.

        `last` as in `retire`.
        """
        with self._turn:
            self._take_started(last)
            began, limit = time.monotonic(), self.context.config.deadlines.start
            while wait and len(self.serving) < self.fewest:
                starting = self.of(State.RESTARTING)
                ends = {slot: max(slot.since, began) + limit for slot in starting}
                late = [slot for slot in starting if time.monotonic() > ends[slot]]
                if any(slot.has_node for slot in starting):  # a place that one has is enough
                    late = [slot for slot in late if slot.has_node]
                self._take([(slot, self._late(slot)) for slot in late])
                if not late:
                    left = min(min(ends.values()) - time.monotonic(), LOOK_SECONDS if self.elastic else limit)
                    self.context.workers.first([slot.starting for slot in starting if slot.starting], left)
                    self._take_started(last)
            self._report()

    def _take_started(self, last: bool) -> None:
        """Whoever has started, well or badly, since the last look."""
        self.retire(last)
        self._revive()
        limit = self.context.config.deadlines.start
        if self.elastic:
            self._find_nodes()
        starting = self.of(State.RESTARTING)
        ended = [slot for slot in starting if slot.starting and slot.starting.future.done()]
        calls = [slot.starting for slot in ended if slot.starting]
        outcomes = self.context.workers.outcomes(calls, limit, "start", ask=None)
        self._take(list(zip(ended, outcomes, strict=True)))
        overdue = [slot for slot in starting if slot.has_node and time.monotonic() - slot.since > limit]
        self._take([(slot, self._late(slot)) for slot in overdue if slot.state is State.RESTARTING])

    def _find_nodes(self) -> None:
        """Which of those that start have a node by now: those that wait for one are not late, however long it takes."""
        if not self.context.workers.headless:
            for slot in self.of(State.RESTARTING):
                if not slot.has_node and not slot.engine.wanted_node():
                    slot.has_node, slot.since = True, time.monotonic()

    def _late(self, slot: Slot) -> GrpoError:
        error = self.context.workers.too_late(slot.engine, self.context.config.deadlines.start, "start")
        self.context.workers.discard(slot.engine, error, True)
        return error

    def _take(self, outcomes: Sequence[tuple[Slot, Place | GrpoError]]) -> None:
        """What starting came to; those that did well first."""
        told: dict[str, Stats] = {}
        for slot, outcome in sorted(outcomes, key=lambda each: isinstance(each[1], GrpoError)):
            if isinstance(outcome, OutOfMemory) and slot.lost:
                outcome = EngineLost(str(outcome))  # it had room before: that of the lost one is not free yet
            if not isinstance(outcome, GrpoError):
                told |= self.context.workers.started(slot.engine, outcome)
                slot.to(State.STALE)
            elif self.elastic and len(self.serving) >= self.fewest:
                self.refuse([slot], outcome)
            elif isinstance(outcome, EngineLost):
                self.lose({slot: outcome})
            else:
                raise outcome
        if told:
            self.context.observer.started("rollout", told)

    def verified(self) -> None:
        """Every stale engine has taken part in a verified sync."""
        with self._turn:
            for slot in sorted(self.of(State.STALE), key=lambda slot: slot.lost is None):
                slot.to(State.HEALTHY)
                if self.elastic and self._began:
                    self.context.observer.engine("joined", str(slot.engine))
                missed = slot if slot.lost else next((other for other in self.slots if other.lost), None)
                if missed and missed.lost:
                    self.context.observer.recovered("rollout", missed.lost, time.monotonic() - missed.lost_at)
                    missed.lost = None
            self._began = True
            self._report()

    def _revive(self) -> None:
        """Lets new engines start in the places of lost ones: after a pause those that others do not wait for."""
        for slot in self.of(State.DEAD):
            if len(self.serving) < self.fewest or time.monotonic() >= slot.again_at:
                slot.engine = self.create(slot.index)
                self._start(slot)

    def _start(self, slot: Slot) -> None:
        slot.to(State.RESTARTING)
        slot.has_node = False
        slot.starting = self.context.workers.starts(slot.engine.start())

    def _report(self) -> None:
        healthy, starting = len(self.of(State.HEALTHY)), self.of(State.RESTARTING)
        missing = min(sum(slot.lost is not None for slot in self.slots), max(0, self.fewest - healthy))
        self.context.observer.workers("rollout", healthy, missing)
        joining = len(self.of(State.STALE)) + sum(slot.has_node or not self.elastic for slot in starting)
        self.context.observer.engines(self.most, healthy, joining)


def pause(failures: int) -> float:
    """Seconds before the next try."""
    return float(min(PAUSE_SECONDS * 2 ** min(failures - 1, 30), LONGEST_PAUSE)) if failures else 0.0
