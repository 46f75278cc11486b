"""The rollout engines: which of them may sample, and how a lost one comes back.

    DEAD -> RESTARTING -> STALE -> HEALTHY       and from each of the last three back to DEAD

An engine becomes HEALTHY only through a verified weight sync. Whatever breaks off in the middle of one is DEAD: half a
model is never served.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from grpo.cluster.context import RunContext
from grpo.cluster.gate import Gate
from grpo.errors import ClusterError, EngineLost, GrpoError, OutOfMemory
from grpo.interfaces import Call, Engine, Place
from grpo.types import Stats


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
    """The place of one engine; `lost` and `lost_at` tell of the one before."""

    index: int
    engine: Engine
    state: State = State.DEAD
    starting: Call[Place] | None = None
    lost: ClusterError | None = None
    lost_at: float = 0.0

    def to(self, state: State) -> None:
        """Along one of ARCS."""
        assert state in ARCS[self.state], f"an engine cannot go from {self.state} to {state}"
        self.state = state


class Fleet:
    """All engines of a run. `create` makes the engine of a place; the observer is told of losses and who may sample.

    Several threads may use it, one at a time.
    """

    def __init__(self, context: RunContext, create: Callable[[int], Engine]) -> None:
        self.context, self.create = context, create
        self.gate = Gate(context.workers.look)
        self._turn = threading.RLock()
        self.slots = [Slot(index, create(index)) for index in range(context.config.rollout.engines)]
        for slot in self.slots:
            self._start(slot)

    def of(self, *states: State) -> list[Slot]:
        """The places whose engine is in one of these states."""
        return [slot for slot in self.slots if slot.state in states]

    def lose(self, lost: Mapping[Slot, ClusterError]) -> None:
        """Ends these engines and lets new ones start: one loss, however many. Raises ClusterError at one too many."""
        if not lost:
            return
        with self._turn:
            for slot, error in lost.items():
                self.context.workers.discard(slot.engine, error, False)
                slot.to(State.DEAD)
                slot.lost, slot.lost_at = error, time.monotonic()
            self.context.recoveries.spend(max(lost.values(), key=lambda error: error.counts))
            for slot in lost:
                slot.engine = self.create(slot.index)
                self._start(slot)
            self._report()

    def failed(self, errors: Mapping[Engine, ClusterError]) -> None:
        """These engines failed whoever asked them; those that are replaced already are not lost again."""
        with self._turn:
            self.lose({slot: errors[slot.engine] for slot in self.slots if slot.engine in errors})

    def retire(self) -> None:
        """Replaces engines whose node is about to go away; the new ones wait for another node."""
        with self._turn:
            serving = self.of(State.STALE, State.HEALTHY)
            leaving = self.context.workers.leaving([slot.engine for slot in serving])
            error = EngineLost("engines move: their node is about to go away", counts=False)
            self.lose({slot: error for slot in serving if slot.engine in leaving})

    def gather(self, wait: bool) -> None:
        """Takes in the engines that have started since; with `wait` those that are still starting too."""
        with self._turn:
            self._gather(wait)

    def _gather(self, wait: bool) -> None:
        self.retire()
        starting = self.of(State.RESTARTING)
        if not wait:
            starting = [slot for slot in starting if slot.starting and slot.starting.future.done()]
        calls = [slot.starting for slot in starting if slot.starting]
        outcomes = self.context.workers.outcomes(calls, self.context.config.deadlines.start, "start", ask=None)
        told: dict[str, Stats] = {}
        for slot, outcome in zip(starting, outcomes, strict=True):
            if (
                isinstance(outcome, OutOfMemory) and slot.lost
            ):  # it had room before: that of the lost one is not free yet
                outcome = EngineLost(str(outcome))
            if isinstance(outcome, EngineLost):
                self.lose({slot: outcome})
            elif isinstance(outcome, GrpoError):
                raise outcome
            else:
                told |= self.context.workers.started(slot.engine, outcome)
                slot.to(State.STALE)
        self.context.observer.started("rollout", told)
        self._report()
        if wait and self.of(State.RESTARTING):  # one was lost while it started
            self._gather(wait=True)

    def verified(self) -> None:
        """Every stale engine has taken part in a verified sync."""
        with self._turn:
            for slot in self.of(State.STALE):
                slot.to(State.HEALTHY)
                if slot.lost:
                    self.context.observer.recovered("rollout", slot.lost, time.monotonic() - slot.lost_at)
                    slot.lost = None
            self._report()

    def _start(self, slot: Slot) -> None:
        slot.to(State.RESTARTING)
        slot.starting = self.context.workers.starts(slot.engine.start())

    def _report(self) -> None:
        self.context.observer.workers(
            "rollout", len(self.of(State.HEALTHY)), sum(slot.lost is not None for slot in self.slots)
        )
