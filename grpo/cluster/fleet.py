"""The rollout engines: which of them may sample, and how a lost one comes back.

    DEAD -> RESTARTING -> STALE -> HEALTHY       and from each of the last three back to DEAD

An engine becomes HEALTHY only through a verified weight sync. Whatever breaks off in the middle of one is DEAD: half a
model is never served.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from grpo.cluster.session import Session
from grpo.cluster.waiting import ActorHandle, Call
from grpo.config import Config
from grpo.errors import ClusterError, EngineLost, GrpoError
from grpo.interfaces import Observer


class State(StrEnum):
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


class RecoveryBudget:
    """Counts replacements since the last checkpoint, so that a run which cannot get on gives up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spent = 0

    def spend(self, lost: ClusterError) -> None:
        """Raises ClusterError if that was once too often."""
        self.spent += lost.counts
        if self.spent > self.limit:
            raise ClusterError(
                f"{lost}; engines or ranks were replaced {self.limit} times since the last checkpoint "
                "(run.max_recoveries), so the run gives up: look at the actors' logs"
            ) from lost

    def reset(self) -> None:
        self.spent = 0


@dataclass(eq=False)
class Slot:
    """The place of one engine; `lost` and `lost_at` tell of the one before."""

    index: int
    handle: ActorHandle
    state: State = State.DEAD
    starting: Call | None = None
    lost: ClusterError | None = None
    lost_at: float = 0.0

    def to(self, state: State) -> None:
        assert state in ARCS[self.state], f"an engine cannot go from {self.state} to {state}"
        self.state = state


class Fleet:
    """All engines of a run. `create` makes the actor of a place; `observer` is told of losses and of who may sample."""

    def __init__(
        self,
        session: Session,
        config: Config,
        create: Callable[[int], ActorHandle],
        recoveries: RecoveryBudget,
        observer: Observer,
    ) -> None:
        self.session, self.config, self.create = session, config, create
        self.recoveries, self.observer = recoveries, observer
        self.slots = [Slot(index, create(index)) for index in range(config.rollout.engines)]
        for slot in self.slots:
            self._start(slot)

    def of(self, *states: State) -> list[Slot]:
        return [slot for slot in self.slots if slot.state in states]

    def lose(self, lost: Mapping[Slot, ClusterError]) -> None:
        """Ends these engines and lets new ones start: one loss, however many. Raises ClusterError at one too many."""
        if not lost:
            return
        for slot, error in lost.items():
            self.session.discard(slot.handle, error, False)
            slot.to(State.DEAD)
            slot.lost, slot.lost_at = error, time.monotonic()
        self.recoveries.spend(max(lost.values(), key=lambda error: error.counts))
        for slot in lost:
            slot.handle = self.create(slot.index)
            self._start(slot)
        self._report()

    def retire(self) -> None:
        """Replaces engines whose node is about to go away; the new ones wait for another node."""
        serving = self.of(State.STALE, State.HEALTHY)
        leaving = self.session.leaving([slot.handle for slot in serving])
        error = EngineLost("engines move: their node is about to go away", counts=False)
        self.lose({slot: error for slot in serving if slot.handle in leaving})

    def gather(self, wait: bool) -> None:
        """Takes in the engines that have started since; with `wait` those that are still starting too."""
        self.retire()
        starting = self.of(State.RESTARTING)
        if not wait:
            starting = [slot for slot in starting if slot.starting and self.session.has_answered(slot.starting)]
        calls = [slot.starting for slot in starting if slot.starting]
        outcomes = self.session.outcomes(calls, self.config.deadlines.start, "start", heartbeat="")
        for slot, outcome in zip(starting, outcomes, strict=True):
            if isinstance(outcome, EngineLost):
                self.lose({slot: outcome})
            elif isinstance(outcome, GrpoError):
                raise outcome
            else:
                self.session.started(slot.handle, outcome)
                slot.to(State.STALE)
        self._report()
        if wait and self.of(State.RESTARTING):  # one was lost while it started
            self.gather(wait=True)

    def verified(self) -> None:
        """Every stale engine has taken part in a verified sync."""
        for slot in self.of(State.STALE):
            slot.to(State.HEALTHY)
            if slot.lost:
                self.observer.recovered("rollout", slot.lost, time.monotonic() - slot.lost_at)
                slot.lost = None
        self._report()

    def _start(self, slot: Slot) -> None:
        slot.to(State.RESTARTING)
        slot.starting = slot.handle.call("start")

    def _report(self) -> None:
        self.observer.workers("rollout", len(self.of(State.HEALTHY)), sum(slot.lost is not None for slot in self.slots))
