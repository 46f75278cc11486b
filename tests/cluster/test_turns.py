"""Engines and ranks in turns on the same GPUs: who rests when, with both in this process."""

from pathlib import Path

import pytest

from grpo.cluster.fleet import Fleet, State
from grpo.cluster.syncing import WeightSync
from grpo.cluster.turns import TurnTakingTrainer
from grpo.errors import BugError, ClusterError, EngineLost, TrainerLost
from tests.cluster.local import LocalEngine, LocalHead, LocalRank, Wire, make_context


class Turns:
    """Two engines and two ranks."""

    def __init__(self, run_dir: Path, recoveries: int = 3) -> None:
        self.events: list[str] = []
        self.wire: Wire = {}
        self.engines: list[LocalEngine] = []
        sections = {"rollout": {"engines": 2}, "train": {"ranks": 2}, "cluster": {"colocate": True}}
        self.head = LocalHead()
        context = make_context(run_dir, [], self.head, recoveries, **sections)
        self.fleet = Fleet(context, self.engine)
        self.trainer = TurnTakingTrainer(context, self.rank, self.fleet)
        self.weights = WeightSync(context, self.fleet, self.trainer, self_test_prompt=[1, 2, 3])

    def engine(self, index: int) -> LocalEngine:
        self.engines.append(LocalEngine(index, self.events, self.wire))
        return self.engines[-1]

    def rank(self, index: int) -> LocalRank:
        assert all(engine.resting for engine in self.engines if not engine.fails), "ranks start while engines rest"
        return LocalRank(index, self.events, self.wire)

    def seen(self, *words: str) -> list[str]:
        found = [event for event in self.events if any(word in event for word in words)]
        self.events.clear()
        return found


@pytest.fixture
def turns(tmp_path: Path) -> Turns:
    return Turns(tmp_path)


def test_ranks_start_and_step_while_engines_rest_and_a_sync_wakes_them(turns: Turns) -> None:
    both = ["engine 0 rest", "engine 1 rest"]
    starts = ["engine 0 start", "engine 1 start", *both, "trainer rank 0 start", "trainer rank 1 start"]
    assert turns.seen("start", "rest") == starts
    turns.weights.publish(0)
    assert not any(engine.resting for engine in turns.engines)
    turns.events.clear()
    assert turns.trainer.step([], 1)["train/seconds_rest"] >= 0
    assert turns.seen("rest", "step") == [*both, "trainer rank 0 step 1", "trainer rank 1 step 1"]
    assert all(engine.resting for engine in turns.engines)
    turns.weights.publish(1)
    order = turns.seen("send_weights 1", "receive_weights 1", "commit_weights 1")
    verbs = ("send_weights", "receive_weights", "commit_weights")
    assert [event.split()[-2] for event in order] == [verb for verb in verbs for _ in range(2)]
    assert [engine.resting for engine in turns.engines] == [False, False]


def test_an_engine_that_is_lost_as_it_falls_asleep_is_replaced_before_the_step(turns: Turns) -> None:
    turns.weights.publish(0)
    turns.events.clear()
    turns.engines[1].fails["rest"] = EngineLost("engine 1 died")
    turns.trainer.step([], 1)
    assert turns.seen("start", "rest", "step", "ends") == [
        *("engine 0 rest", "engine 1 rest", "engine 1 ends", "engine 1 start", "engine 0 rest", "engine 1 rest"),
        *("trainer rank 0 step 1", "trainer rank 1 step 1"),
    ]
    turns.weights.publish(1)
    assert len(turns.fleet.of(State.HEALTHY)) == 2 and turns.weights.version == 1


def test_new_ranks_start_once_engines_rest_wherever_the_old_ones_were_lost(turns: Turns) -> None:
    turns.weights.publish(0)
    turns.trainer.noticed(TrainerLost("rank 0 died"), turns.trainer.ranks)
    turns.events.clear()
    turns.trainer.rebuild()
    assert [event for event in turns.seen("rest", "start", "step")][:3] == [
        "engine 0 rest",
        "engine 1 rest",
        "trainer rank 0 start",
    ]
    turns.weights.publish(0)
    assert not any(engine.resting for engine in turns.engines)


def test_engines_that_all_have_to_leave_rest_for_the_step_that_was_sampled(turns: Turns) -> None:
    """No other may come, and the step would be lost."""
    turns.weights.publish(0)
    for engine in turns.engines:
        engine.node_id = "node 0"
    turns.head.draining = frozenset({"node 0"})
    turns.events.clear()
    turns.trainer.step([], 1)
    assert turns.seen("start", "rest", "step", "ends") == [
        *("engine 0 rest", "engine 1 rest", "trainer rank 0 step 1", "trainer rank 1 step 1")
    ]


def test_engines_that_are_lost_too_often_end_it(tmp_path: Path) -> None:
    turns = Turns(tmp_path, recoveries=0)
    turns.engines[0].fails["rest"] = EngineLost("engine 0 died")
    with pytest.raises(ClusterError, match="engine 0 died"):
        turns.trainer.step([], 1)


def test_what_is_no_loss_is_raised_as_it_is(turns: Turns) -> None:
    turns.engines[0].fails["rest"] = BugError("no such verb")
    with pytest.raises(BugError, match="no such verb"):
        turns.trainer.step([], 1)


def test_a_supervised_loss_is_asked_for_while_engines_rest(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    turns.weights.publish(0)
    monkeypatch.setattr(LocalRank, "evaluate", lambda rank, _: rank.does("evaluate", dict), raising=False)
    turns.events.clear()
    turns.trainer.evaluate([])
    assert turns.seen("rest", "evaluate") == [
        *("engine 0 rest", "engine 1 rest", "trainer rank 0 evaluate", "trainer rank 1 evaluate")
    ]
