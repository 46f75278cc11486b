"""Published versions between engines and ranks in this process; the real ones are in the tests of whole runs."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo.cluster import syncing
from grpo.cluster.fleet import Fleet, State
from grpo.cluster.publishing import PublishedWeights
from grpo.cluster.rollouts import FleetRollouts
from grpo.cluster.trainer_group import TrainerGroup
from grpo.errors import ClusterError, EngineLost, TrainerLost, WeightSyncError
from grpo.types import Prompt, Sampling
from tests.cluster.local import LocalEngine, LocalHead, LocalRank, Wire, make_context
from tests.fakes import FakeRecorder

SAMPLING = Sampling(2, 8, 1.0, 1.0)
PROMPTS = [Prompt(f"p:{n}", "q", "a", (1,)) for n in range(4)]
SECONDS = 20


class Stack:
    """Two engines and a rank, and the weights between them."""

    def __init__(self, run_dir: Path, update: str) -> None:
        self.events: list[str] = []
        self.wire: Wire = {}
        self.engines: list[LocalEngine] = []
        rollout = {"engines": 2, "max_staleness": 2, "update": update}
        self.context = make_context(run_dir, [], LocalHead(), rollout=rollout)
        self.fleet = Fleet(self.context, self.make_engine)
        self.trainer = TrainerGroup(self.context, lambda index: LocalRank(index, self.events, self.wire))
        self.recorder = FakeRecorder([])
        self.weights = PublishedWeights(self.context, self.fleet, self.trainer, [1, 2, 3], self.recorder)
        self.rollouts = FleetRollouts(self.context, self.fleet, self.weights.ensure, mixes=update == "in_flight")

    def make_engine(self, index: int) -> LocalEngine:
        engine = LocalEngine(index, self.events, self.wire, node_id=f"node {len(self.engines)}")
        self.engines.append(engine)
        return engine

    def step(self, step: int) -> None:
        self.trainer.step([], step)
        self.weights.publish(step)

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)

    def close(self) -> None:
        self.context.workers.background.cancel()
        assert self.context.workers.background.join(SECONDS)


@pytest.fixture
def between(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, "between_batches")
    stack.weights.begin(0)
    yield stack
    stack.close()


@pytest.fixture
def in_flight(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, "in_flight")
    stack.weights.begin(0)
    yield stack
    stack.close()


def test_a_version_is_received_ahead_and_taken_when_it_is_wanted(between: Stack) -> None:
    between.events.clear()
    between.step(1)
    between.until(lambda: between.weights.arrived == 1)
    assert between.weights.version == 0 and {engine.version for engine in between.engines} == {0}
    between.weights.hold(1)
    assert between.weights.version == 1 and {engine.version for engine in between.engines} == {1}
    said = [event for event in between.events if "engine 0" in event or "published" in event or "publish " in event]
    assert said == [
        "trainer rank 0 publish 1 0",
        "trainer rank 0 send_published 1",
        "engine 0 receive_weights 1 ahead",
        "engine 0 commit_weights 1",
    ]
    assert between.weights.digests.keys() == {0, 1}


def test_engines_take_versions_one_after_the_other_while_the_trainer_is_ahead(between: Stack) -> None:
    between.step(1)
    between.step(2)
    between.until(lambda: between.weights.arrived == 1)
    between.weights.hold(1)
    between.until(lambda: between.weights.arrived == 2)
    assert between.weights.version == 1
    between.weights.hold(2)
    assert between.weights.version == 2


def test_who_waits_for_a_version_that_is_not_published_yet_gets_it_later(between: Stack) -> None:
    between.context.workers.background.start("feeder", lambda: between.weights.hold(1))
    between.step(1)
    between.until(lambda: between.weights.version == 1)


def test_an_engine_lost_in_a_batch_is_brought_to_the_version_of_the_batch(between: Stack) -> None:
    """Not to the newest: the trainer is ahead."""
    between.step(1)
    between.step(2)
    between.weights.hold(1)
    between.events.clear()
    for engine in between.engines[:2]:
        engine.fails["generate"] = EngineLost("died")
    groups = between.rollouts.generate(PROMPTS, SAMPLING, step=4)
    assert {sample.versions for group in groups for sample in group.samples} == {((0, 1),)}
    assert "engine 0 receive_weights 1 ahead" in between.events and "trainer rank 0 perturb" in between.events
    assert between.weights.version == 1
    between.weights.hold(2)
    assert between.weights.version == 2 and {slot.state for slot in between.fleet.slots} == {State.HEALTHY}


def test_a_version_that_the_trainer_stands_at_is_brought_to_a_new_engine(
    between: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test has sent the same weights just before, which says nothing about what engines had."""
    monkeypatch.setattr(syncing, "SURELY_CHANGED", 0)
    between.engines[0].fails["generate"] = EngineLost("died")
    between.rollouts.generate(PROMPTS, SAMPLING, step=1)
    between.step(1)
    between.weights.hold(1)
    assert between.weights.version == 1 and between.weights.self_tested
    rank = between.trainer.ranks[0]
    assert isinstance(rank, LocalRank)
    moved = {"train/grad_norm": 1.0, "train/learning_rate": 1.0}
    monkeypatch.setattr(rank, "step", lambda batch, step: rank.does(f"step {step}", lambda: moved))
    between.engines[1].fails["generate"] = EngineLost("died")
    between.rollouts.generate(PROMPTS, SAMPLING, step=2)
    between.step(2)
    with pytest.raises(WeightSyncError, match="has moved, and sent the weights of version 1 again as version 2"):
        between.weights.hold(2)


def test_a_new_engine_joins_at_the_next_version_with_a_self_test(between: Stack) -> None:
    between.engines[0].fails["generate"] = EngineLost("died")
    between.rollouts.generate(PROMPTS, SAMPLING, step=1)
    assert [slot.state for slot in between.fleet.slots] == [State.RESTARTING, State.HEALTHY]
    between.step(1)
    between.events.clear()
    between.weights.hold(1)
    assert "trainer rank 0 perturb" in between.events and "trainer rank 0 restore" in between.events
    assert {slot.engine.version for slot in between.fleet.slots} == {1}  # type: ignore[attr-defined]


def test_an_engine_lost_while_it_receives_ahead_leaves_the_others_at_work(between: Stack) -> None:
    between.engines[1].fails["receive_weights"] = EngineLost("died")
    between.step(1)
    between.until(lambda: between.weights.tried == 1)
    between.weights.hold(1)
    assert between.weights.version == 1
    assert {slot.state for slot in between.fleet.slots} <= {State.HEALTHY, State.RESTARTING}


def test_a_lost_rank_is_noticed_by_the_carrier_and_raised_for_who_waits(between: Stack) -> None:
    rank = between.trainer.ranks[0]
    assert isinstance(rank, LocalRank)
    rank.fails["send_published"] = TrainerLost("rank 0 died")
    between.step(1)
    with pytest.raises(TrainerLost, match="rank 0 died"):
        between.weights.hold(1)
    assert between.trainer.lost is not None


def test_bytes_that_arrive_otherwise_than_they_were_sent_end_the_run(between: Stack) -> None:
    between.engines[0].drops = "head"
    between.step(1)
    with pytest.raises(WeightSyncError, match="head"):
        between.weights.hold(1)
    assert between.engines[0].version == 0


def test_too_many_losses_end_the_run(between: Stack) -> None:
    with pytest.raises(ClusterError, match="replaced 3 times"):
        for step in range(1, 6):
            for slot in between.fleet.slots:
                engine = slot.engine
                assert isinstance(engine, LocalEngine)
                engine.fails["generate"] = EngineLost("died")
            between.rollouts.generate(PROMPTS, SAMPLING, step)


def test_in_flight_a_version_is_taken_at_once(in_flight: Stack) -> None:
    in_flight.events.clear()
    in_flight.step(1)
    in_flight.weights.hold(1)
    assert in_flight.weights.version == 1
    assert [event for event in in_flight.events if "engine 1" in event] == [
        "engine 1 receive_weights 1 ahead",
        "engine 1 commit_weights 1 in flight",
    ]
    assert in_flight.recorder.lanes == [("rollout", "receive", 1), ("rollout", "switch", 1)]


def test_in_flight_a_new_engine_waits_until_nothing_is_sampled(in_flight: Stack) -> None:
    in_flight.engines[0].fails["generate"] = EngineLost("died")
    in_flight.rollouts.generate(PROMPTS, SAMPLING, step=1)
    with in_flight.fleet.gate.sampling():
        in_flight.step(1)
        in_flight.until(lambda: in_flight.fleet.gate.waiting)
        assert in_flight.weights.version == 0
    in_flight.weights.hold(1)
    assert {slot.state for slot in in_flight.fleet.slots} == {State.HEALTHY}


def test_in_flight_an_engine_whose_switch_fails_is_replaced(in_flight: Stack) -> None:
    in_flight.engines[0].fails["commit_weights"] = EngineLost("engine 0 is stale: the switch to version 1 broke off")
    in_flight.step(1)
    in_flight.weights.hold(1)
    in_flight.until(lambda: "engine 0 ends" in in_flight.events)
    in_flight.step(2)
    in_flight.weights.hold(2)
    in_flight.until(lambda: len(in_flight.fleet.of(State.HEALTHY)) == 2)
    assert len(in_flight.engines) == 3 and {engine.version for engine in in_flight.engines[1:]} == {2}


def test_weights_that_are_not_what_was_verified_end_what_is_sampled(in_flight: Stack) -> None:
    """At once: engines may have no model any more."""
    in_flight.engines[0].fails["commit_weights"] = WeightSyncError("head has changed since it was received")
    in_flight.step(1)
    in_flight.until(lambda: in_flight.weights.failure is not None)
    with pytest.raises(WeightSyncError, match="head has changed"):
        in_flight.rollouts.generate(PROMPTS, SAMPLING, step=2)


def test_a_new_beginning_forgets_what_was_published(between: Stack) -> None:
    between.step(1)
    between.step(2)
    between.close()
    between.trainer.step([], 1)
    between.weights.begin(1)
    assert between.weights.version == 1 and between.weights.published.keys() == {1}
    assert {engine.version for engine in between.engines} == {1}
