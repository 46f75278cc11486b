"""Which engines may sample, and how lost ones come back: with engines in this process."""

import time
from pathlib import Path

import pytest

from grpo.cluster import fleet as fleet_module
from grpo.cluster import waiting
from grpo.cluster.fleet import ARCS, Fleet, Slot, State, pause
from grpo.errors import ClusterError, ConfigError, EngineLost, GrpoError, NoNode, OutOfMemory
from tests.cluster.local import LocalEngine, LocalHead, make_context
from tests.fakes import FakeRecorder


class Engines:
    """Makes engines on node 0, 1, ... and remembers them."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.made: list[LocalEngine] = []
        self.failing: dict[int, Exception] = {}
        self.waiting: set[int] = set()
        """Those that have no node yet."""

    def __call__(self, index: int) -> LocalEngine:
        engine = LocalEngine(index, self.events, {}, node_id=f"node {len(self.made)}")
        if len(self.made) in self.waiting:
            engine.wants = "1 CPU"
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


ELASTIC = {"engines": {"min": 1, "max": 3}}


def elastic(tmp_path: Path, told: list[str], engines: Engines, **sections: object) -> Fleet:
    """One engine that samples, of up to three; the others wait for nodes."""
    engines.waiting = {1, 2}
    fleet = Fleet(make_context(tmp_path, told, rollout=ELASTIC, **sections), engines)
    fleet.gather(wait=True)
    fleet.verified()
    return fleet


def states(fleet: Fleet) -> list[str]:
    return [str(slot.state) for slot in fleet.slots]


def pool(fleet: Fleet) -> tuple[int, int, int]:
    observer = fleet.context.observer
    assert isinstance(observer, FakeRecorder)
    return observer.pool


def test_a_run_starts_with_the_fewest_engines_and_others_join_as_they_find_nodes(tmp_path: Path) -> None:
    told: list[str] = []
    engines = Engines([])
    fleet = elastic(tmp_path, told, engines)
    assert states(fleet) == ["healthy", "restarting", "restarting"] and pool(fleet) == (3, 1, 0)
    engines.made[1].wants = ""  # its node came
    fleet.gather(wait=False)
    assert pool(fleet) == (3, 1, 1), "it is starting"
    engines.made[1].has_started()
    fleet.gather(wait=False)
    assert states(fleet) == ["healthy", "stale", "restarting"] and fleet.joining == [fleet.slots[1]]
    fleet.verified()
    assert states(fleet) == ["healthy", "healthy", "restarting"] and pool(fleet) == (3, 2, 0)
    assert [line for line in told if "engine" in line] == ["engine 1 joined"]


def test_losses_of_engines_that_are_not_needed_count_for_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    engines = Engines([])
    fleet = elastic(tmp_path, told, engines, recoveries=0)
    for joining in (1, 2):
        engines.made[joining].has_started()
    fleet.gather(wait=False)
    fleet.verified()
    fleet.lose({fleet.slots[0]: EngineLost("its node died"), fleet.slots[2]: EngineLost("its node died")})
    assert states(fleet) == ["dead", "healthy", "dead"] and fleet.context.recoveries.spent == 0
    assert told[-3:] == ["engine 0 left", "engine 2 left", "workers rollout: 1 ready, 0 lost"]
    with pytest.raises(ClusterError, match="the last one died; engines or ranks were replaced 0 times"):
        fleet.lose({fleet.slots[1]: EngineLost("the last one died")})


def test_the_loss_of_the_last_engine_is_over_once_any_serves(tmp_path: Path) -> None:
    told: list[str] = []
    engines = Engines([])
    fleet = elastic(tmp_path, told, engines)
    engines.waiting.add(3)
    fleet.lose({fleet.slots[0]: EngineLost("its node died")})
    assert fleet.context.recoveries.spent == 1 and told[-1] == "workers rollout: 0 ready, 1 lost"
    engines.made[2].has_started()
    fleet.gather(wait=True)
    fleet.verified()
    assert told[-3:] == ["engine 2 joined", "recovered rollout", "workers rollout: 1 ready, 0 lost"]


def test_a_drained_engine_asks_for_another_node_at_once(tmp_path: Path) -> None:
    head, engines = LocalHead(), Engines([])
    fleet = elastic(tmp_path, [], engines, head=head)
    engines.made[1].has_started()
    fleet.gather(wait=False)
    fleet.verified()
    assert fleet.leaving() == []
    head.draining = frozenset({"node 0"})
    assert fleet.leaving() == [engines.made[0]]
    fleet.retire()
    assert states(fleet) == ["restarting", "healthy", "restarting"] and len(engines.made) == 4
    head.draining = frozenset({"node 0", "node 1"})
    assert fleet.leaving() == [], "nobody stays that could take over"
    fleet.gather(wait=False, last=False)
    assert fleet.slots[1].engine is engines.made[1], "it takes the weights of a step before it leaves"
    fleet.gather(wait=False, last=False)
    assert fleet.slots[1].engine is not engines.made[1], "another has started meanwhile"


@pytest.mark.parametrize("error", [EngineLost("died"), ConfigError("no model here"), OutOfMemory("too small")])
def test_an_engine_that_cannot_start_is_tried_again_after_pauses_that_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: GrpoError
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(fleet_module.time, "monotonic", lambda: clock[0])
    told: list[str] = []
    engines = Engines([])
    fleet = elastic(tmp_path, told, engines, recoveries=0)
    pauses = []
    for attempt in (1, 3, 4, 5):
        engines.made[attempt].has_started(error)
        fleet.gather(wait=False)
        assert states(fleet) == ["healthy", "dead", "restarting"], "and the run goes on"
        pauses.append(fleet.slots[1].again_at - clock[0])
        clock[0] += pauses[-1] - 0.5
        fleet.gather(wait=False)
        assert fleet.slots[1].state is State.DEAD
        clock[0] += 1.0
        engines.waiting.add(len(engines.made))
        fleet.gather(wait=False)
        assert fleet.slots[1].state is State.RESTARTING
    assert pauses == [10.0, 20.0, 40.0, 80.0]
    assert told.count("engine 1 failed") == 4


def test_an_engine_that_starts_for_too_long_on_its_node_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "log_folder", lambda config: "logs")
    engines = Engines([])
    fleet = elastic(tmp_path, [], engines, deadlines={"start": 0.3, "health": 4})
    time.sleep(0.5)
    fleet.gather(wait=False)
    assert states(fleet) == ["healthy", "restarting", "restarting"], "for a node it may wait as long as it likes"
    engines.made[1].wants = ""
    fleet.gather(wait=False)
    time.sleep(0.5)
    fleet.gather(wait=False)
    assert states(fleet) == ["healthy", "dead", "restarting"]
    assert str(engines.made[1].lost).startswith("start must end within 0.3 s (deadlines.*), but engine 1 has not")


def test_below_the_fewest_a_run_waits_for_a_node_as_long_as_a_start_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "describe_nodes", lambda label, draining: ["head (no role)"])
    engines = Engines([])
    engines.waiting = {0, 1, 2}
    fleet = Fleet(make_context(tmp_path, [], rollout=ELASTIC, deadlines={"start": 0.3, "health": 4}), engines)
    with pytest.raises(NoNode, match=r"no node for engine 0 came within 0.3 s \(deadlines.start\): it needs 1 CPU"):
        fleet.gather(wait=True)


@pytest.mark.parametrize(("failures", "seconds"), [(0, 0), (1, 10), (2, 20), (7, 600), (5000, 600)])
def test_pauses_are_bounded(failures: int, seconds: float) -> None:
    assert pause(failures) == seconds
