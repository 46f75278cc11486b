"""Which engines may sample, and how lost ones come back: with engines in this process."""

from pathlib import Path

import pytest

from grpo.cluster.fleet import ARCS, Fleet, Slot, State
from grpo.errors import ClusterError, ConfigError, EngineLost, OutOfMemory
from tests.cluster.local import LocalEngine, LocalHead, make_context


class Engines:
    """Makes engines on node 0, 1, ... and remembers them."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.made: list[LocalEngine] = []
        self.failing: dict[int, Exception] = {}

    def __call__(self, index: int) -> LocalEngine:
        engine = LocalEngine(index, self.events, {}, node_id=f"node {len(self.made)}")
        if len(self.made) in self.failing:
            engine.fails["start"] = self.failing[len(self.made)]  # type: ignore[assignment]
        self.made.append(engine)
        return engine


def test_the_arcs_of_an_engines_state() -> None:
    slot = Slot(0, LocalEngine(0, [], {}))
    for state in (State.RESTARTING, State.STALE, State.HEALTHY, State.DEAD):
        slot.to(state)
    with pytest.raises(AssertionError, match="cannot go from dead to healthy"):
        slot.to(State.HEALTHY)
    assert [state for state in State if State.HEALTHY in ARCS[state]] == [State.STALE]


def test_a_lost_engine_is_replaced_and_told_of_once_it_may_sample(tmp_path: Path) -> None:
    told: list[str] = []
    engines = Engines([])
    fleet = Fleet(make_context(tmp_path, told, rollout={"engines": 2}), engines)
    fleet.gather(wait=True)
    fleet.verified()
    assert told == ["workers rollout: 0 ready, 0 lost", "workers rollout: 2 ready, 0 lost"]
    fleet.lose({fleet.slots[1]: EngineLost("engine 1 died")})
    assert [slot.state for slot in fleet.slots] == [State.HEALTHY, State.RESTARTING]
    fleet.gather(wait=True)
    assert [slot.state for slot in fleet.slots] == [State.HEALTHY, State.STALE]
    assert told[2:] == ["workers rollout: 1 ready, 1 lost"] * 2
    fleet.verified()
    assert told[4:] == ["recovered rollout", "workers rollout: 2 ready, 0 lost"]
    assert len(engines.made) == 3 and engines.made[1].lost and not engines.made[2].lost


def test_one_that_is_lost_while_it_starts_is_started_again_and_several_count_once(tmp_path: Path) -> None:
    engines = Engines([])
    engines.failing = {0: EngineLost("died in its start")}
    context = make_context(tmp_path, [], rollout={"engines": 2})
    fleet = Fleet(context, engines)
    fleet.gather(wait=True)
    assert [slot.state for slot in fleet.slots] == [State.STALE] * 2 and len(engines.made) == 3
    fleet.lose({slot: EngineLost("their node died") for slot in fleet.slots})
    assert context.recoveries.spent == 2, "one for the start, one for both"


def test_an_error_of_the_user_ends_the_start(tmp_path: Path) -> None:
    engines = Engines([])
    engines.failing = {0: ConfigError("model.path holds no model")}
    with pytest.raises(ConfigError, match="model.path"):
        Fleet(make_context(tmp_path, []), engines).gather(wait=True)


def test_memory_is_no_loss_but_that_of_a_lost_engine_may_not_be_free_yet(tmp_path: Path) -> None:
    engines = Engines([])
    engines.failing = {1: OutOfMemory("start: engine 0 is out of memory on its GPU")}
    context = make_context(tmp_path, [])
    fleet = Fleet(context, engines)
    fleet.gather(wait=True)
    fleet.lose({fleet.slots[0]: EngineLost("died")})
    fleet.gather(wait=True)
    assert len(engines.made) == 3 and context.recoveries.spent == 2
    engines.failing = {3: OutOfMemory("start: engine 0 is out of memory on its GPU")}
    with pytest.raises(OutOfMemory):
        Fleet(context, engines).gather(wait=True)


def test_engines_leave_a_node_that_drains_without_spending_a_recovery(tmp_path: Path) -> None:
    head, engines = LocalHead(), Engines([])
    context = make_context(tmp_path, [], head, rollout={"engines": 2})
    fleet = Fleet(context, engines)
    fleet.gather(wait=True)
    head.draining = frozenset({"node 1"})
    fleet.gather(wait=True)
    assert [slot.engine.node_id for slot in fleet.slots] == ["node 0", "node 2"]
    assert context.recoveries.spent == 0


def test_losses_without_end_end_the_run(tmp_path: Path) -> None:
    engines = Engines([])
    engines.failing = {number: EngineLost("died in its start") for number in range(9)}
    with pytest.raises(ClusterError, match="replaced 3 times"):
        Fleet(make_context(tmp_path, []), engines).gather(wait=True)
