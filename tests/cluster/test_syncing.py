"""Weight syncs with engines and ranks in this process; a real one is in the tests of whole runs."""

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.cluster.fleet import Fleet, State
from grpo.cluster.syncing import WeightSync, surely_changed
from grpo.cluster.trainer_group import TrainerGroup
from grpo.errors import ClusterError, EngineLost, GrpoError, MemoryNotShared, OutOfMemory, TrainerLost, WeightSyncError
from grpo.interfaces import Call, Place
from grpo.observe.metrics import CATALOGUE
from grpo.types import Manifest, TensorRecord
from tests.cluster.local import LocalEngine, LocalHead, LocalRank, Wire, make_context


class Stack:
    """Two engines and two ranks; what they are asked lands in `events`, what the observer is told in `told`."""

    def __init__(self, run_dir: Path, engines: object = 2, recoveries: int = 3, **more: object) -> None:
        self.events: list[str] = []
        self.told: list[str] = []
        self.wire: Wire = {}
        self.head = LocalHead()
        self.engines: list[LocalEngine] = []
        sections = {"rollout": {"engines": engines}, "train": {"ranks": 2}, **more}
        self.context = make_context(run_dir, self.told, self.head, recoveries, **sections)
        self.fleet = Fleet(self.context, self.make_engine)
        self.trainer = TrainerGroup(self.context, lambda index: LocalRank(index, self.events, self.wire))
        self.weights = WeightSync(self.context, self.fleet, self.trainer, self_test_prompt=[1, 2, 3])

    def make_engine(self, index: int) -> LocalEngine:
        engine = LocalEngine(index, self.events, self.wire, node_id=f"node {len(self.engines)}")
        self.engines.append(engine)
        return engine

    def rank(self, index: int) -> LocalRank:
        rank = self.trainer.ranks[index]
        assert isinstance(rank, LocalRank)
        return rank

    def seen(self, *words: str) -> list[str]:
        """Events that hold one of the words, and a fresh list from then on."""
        found = [event for event in self.events if any(word in event for word in words)]
        self.events.clear()
        return found


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


def test_the_first_sync_opens_a_transfer_and_proves_that_engines_follow(stack: Stack) -> None:
    stats = stack.weights.publish(0)
    assert stack.seen("transfer", "perturb", "restore", "receive", "commit") == [
        "trainer rank 0 offer_transfer",
        "trainer rank 0 open_transfer 3",
        "engine 0 join_transfer local://here 1 of 3",
        "engine 1 join_transfer local://here 2 of 3",
        *("trainer rank 0 perturb", "trainer rank 1 perturb"),
        *("engine 0 receive_weights 0", "engine 1 receive_weights 0"),
        *("engine 0 commit_weights 0", "engine 1 commit_weights 0"),
        *("trainer rank 0 restore", "trainer rank 1 restore"),
        *("engine 0 receive_weights 0", "engine 1 receive_weights 0"),
        *("engine 0 commit_weights 0", "engine 1 commit_weights 0"),
        *("engine 0 receive_weights 0", "engine 1 receive_weights 0"),
        *("engine 0 commit_weights 0", "engine 1 commit_weights 0"),
    ]
    assert stats["sync/self_test_diff"] == 0.0 and stats["sync/bytes"] == 16.0
    assert [slot.state for slot in stack.fleet.slots] == [State.HEALTHY] * 2


def test_a_sync_tells_its_parts_and_of_engines_the_slowest(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    took = {0: {"wire": 1.0, "digest": 5.0}, 1: {"wire": 2.0, "load": 3.0}}
    taken = LocalEngine.receive_weights

    def timed(
        engine: LocalEngine, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> Call[list[Manifest]]:
        call = taken(engine, version, records, ahead)
        future: Future[list[Manifest]] = Future()
        future.set_result([replace(manifest, seconds=took[engine.index]) for manifest in call.result])
        return Call(engine, future)

    monkeypatch.setattr(LocalEngine, "receive_weights", timed)
    stats = stack.weights.publish(0)
    parts = {name.removeprefix("sync/receive_"): value for name, value in stats.items() if "receive_" in name}
    assert parts == {"wire_seconds": 2.0, "digest_seconds": 5.0, "load_seconds": 3.0}
    assert all(stats[f"sync/{part}_seconds"] >= 0 for part in ("exchange", "verify", "commit"))
    assert set(stats) <= {key for metric in CATALOGUE for key in metric.keys}


def test_the_next_sync_sends_and_commits_alone(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.trainer.step([], 1)
    stack.events.clear()
    assert "sync/self_test_diff" not in stack.weights.publish(1)
    assert stack.events == [
        *("engine 0 ping", "engine 1 ping"),
        *("trainer rank 0 send_weights 1", "trainer rank 1 send_weights 1"),
        *("engine 0 receive_weights 1", "engine 1 receive_weights 1"),
        *("engine 0 commit_weights 1", "engine 1 commit_weights 1"),
    ]
    assert stack.weights.version == 1 and [engine.version for engine in stack.engines] == [1, 1]
    assert stack.told[-1] == "rollout has 1"


def test_nothing_is_committed_that_was_not_received_as_it_was_sent(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.trainer.step([], 1)
    stack.engines[1].drops = "head"
    stack.events.clear()
    with pytest.raises(WeightSyncError, match="worker 1: head is missing"):
        stack.weights.publish(1)
    assert stack.seen("commit") == []
    assert stack.weights.version == 0


def test_an_engine_that_holds_weights_and_does_not_compute_with_them_is_found(stack: Stack) -> None:
    stack.engines[1].prompt_logprobs = lambda ids: stack.engines[1].does("old", lambda: [-1.0, -2.0])  # type: ignore
    with pytest.raises(WeightSyncError, match="engine 1 must follow the trainer"):
        stack.weights.publish(0)


def test_an_engine_lost_in_a_transfer_is_replaced_and_all_meet_anew(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.trainer.step([], 1)
    stack.engines[0].fails["receive_weights"] = EngineLost("engine 0 died")
    stack.events.clear()
    stack.weights.publish(1)
    assert stack.seen("ends", "open_transfer") == ["engine 0 ends", "trainer rank 0 open_transfer 3"]
    assert [slot.state for slot in stack.fleet.slots] == [State.HEALTHY] * 2
    assert [engine.version for engine in stack.engines] == [0, 1, 1] and len(stack.engines) == 3
    assert stack.context.recoveries.spent == 1


def test_engines_that_fail_with_a_lost_one_are_one_loss_and_the_cause_is_told(stack: Stack) -> None:
    """The end of one engine breaks the group for the other, which says so by a plain ClusterError."""
    stack.weights.publish(0)
    stack.engines[0].fails["receive_weights"] = ClusterError("the group broke off")
    stack.engines[1].fails["receive_weights"] = EngineLost("engine 1 died")
    stack.weights.publish(1)
    assert str(stack.engines[0].lost) == "engine 1 died" and len(stack.engines) == 4
    assert stack.context.recoveries.spent == 1


def test_perturbed_weights_are_put_back_if_an_engine_is_lost_in_the_self_test(stack: Stack) -> None:
    stack.engines[1].fails["receive_weights"] = EngineLost("engine 1 died")
    stack.weights.publish(0)
    assert stack.seen("perturb", "restore")[:4] == [
        *("trainer rank 0 perturb", "trainer rank 1 perturb"),
        *("trainer rank 0 restore", "trainer rank 1 restore"),
    ]
    assert stack.rank(0).weights == {"embed": "0", "head": "0"}
    assert {engine.weights["embed"] for engine in stack.engines[:1] + stack.engines[2:]} == {"0"}


def test_a_lost_rank_ends_the_trainer_and_not_the_engines_that_answered(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.rank(1).fails["send_weights"] = TrainerLost("rank 1 died")
    stack.events.clear()
    with pytest.raises(TrainerLost, match="rank 1 died"):
        stack.weights.publish(1)
    assert stack.seen("ends") == ["trainer rank 1 ends", "trainer rank 0 ends"]
    assert [slot.state for slot in stack.fleet.slots] == [State.HEALTHY] * 2
    stack.trainer.rebuild()
    stack.weights.publish(0)
    assert "trainer rank 0 open_transfer 3" in stack.events, "new ranks meet the engines anew"


def test_an_error_that_a_retry_does_not_mend_is_raised_before_losses_are_repaired(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.engines[0].fails["receive_weights"] = WeightSyncError("engine 0 is stale")
    stack.engines[1].fails["receive_weights"] = EngineLost("engine 1 died")
    with pytest.raises(WeightSyncError, match="engine 0 is stale"):
        stack.weights.publish(1)
    assert len(stack.engines) == 2


def test_engines_that_all_have_to_leave_take_the_weights_of_the_step_first(stack: Stack) -> None:
    """Where all pods go at once no other engine comes, and without its sync the step could not be committed."""
    stack.weights.publish(0)
    stack.head.draining = frozenset({"node 0", "node 1"})
    stack.trainer.step([], 1)
    stack.weights.publish(1)
    assert [slot.engine.node_id for slot in stack.fleet.slots] == ["node 0", "node 1"] and stack.weights.version == 1
    assert stack.weights.ensure() == 1
    assert [slot.engine.node_id for slot in stack.fleet.slots] == ["node 2", "node 3"]
    assert stack.weights.version == 1 and stack.context.recoveries.spent == 0


def test_ensure_brings_new_engines_to_the_trainers_version(stack: Stack) -> None:
    stack.weights.publish(0)
    assert stack.weights.ensure() == 0
    stack.trainer.step([], 1)
    stack.fleet.lose({slot: EngineLost("their node died") for slot in stack.fleet.slots})
    assert stack.weights.ensure() == 1
    assert [engine.version for engine in stack.engines[2:]] == [1, 1]


class FrozenCore(LocalEngine):
    """Its process lives, its core is stopped while weights arrive."""

    def receive_weights(
        self, version: int, records: tuple[TensorRecord, ...], ahead: bool = False
    ) -> Call[list[Manifest]]:
        self.events.append(f"{self} receive_weights {version}")
        self.fails["health"] = EngineLost(f"{self} made no token and took no call; it is frozen")
        return Call(self, Future())


def test_a_core_that_freezes_in_the_middle_is_noticed_within_the_deadline_of_health(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.seen()
    stack.engines[1].__class__ = FrozenCore
    stack.weights.publish(1)
    events = [*dict.fromkeys(stack.seen("engine 1"))]
    assert events[:4] == ["engine 1 ping", "engine 1 receive_weights 1", "engine 1 health", "engine 1 ends"]
    assert len(stack.engines) == 3 and stack.engines[2].version == 1
    assert str(stack.engines[1].lost) == (
        "weight sync: engine 1 is frozen: no sign of life for deadlines.health = 4 s"
    ), "and not deadlines.sync"


def test_what_would_come_again_in_an_engine_loses_nobody(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.engines[0].fails["receive_weights"] = OutOfMemory("weight sync: engine 0 is out of memory")
    stack.engines[1].fails["receive_weights"] = ClusterError("the transfer broke off")
    with pytest.raises(OutOfMemory):
        stack.weights.publish(1)
    assert len(stack.engines) == 2 and not stack.engines[0].lost


def test_engines_that_share_a_gpu_join_transfers_of_their_own(stack: Stack) -> None:
    """NCCL takes a GPU once in a group, so the second engine of each GPU is in a second group."""
    stack.fleet.gather(wait=True)
    stack.engines[1].lane = 1
    stack.weights.publish(0)
    assert stack.seen("transfer") == [
        "trainer rank 0 offer_transfer",
        "trainer rank 0 open_transfer 2 2",
        "engine 0 join_transfer local://here 1 of 2",
        "engine 1 join_transfer local://lane-1 1 of 2",
    ]


def on_one_node(stack: Stack) -> None:
    stack.trainer.ready()
    stack.fleet.gather(wait=True)
    for worker in (*stack.engines, stack.rank(0)):
        worker.node_id = "node 0"
    stack.engines[1].lane = 1
    stack.events.clear()


def test_on_one_node_all_join_one_transfer_through_its_memory(stack: Stack) -> None:
    on_one_node(stack)
    stack.weights.publish(0)
    assert stack.seen("transfer") == [
        "trainer rank 0 offer_transfer near",
        "trainer rank 0 open_transfer 3",
        "engine 0 join_transfer local://here 1 of 3",
        "engine 1 join_transfer local://here 2 of 3",
    ]


def test_where_that_memory_cannot_be_read_they_meet_by_nccl_from_then_on(stack: Stack) -> None:
    on_one_node(stack)
    stack.rank(0).fails["open_transfer"] = MemoryNotShared("it cannot be shared")
    stack.weights.publish(0)
    found = stack.seen("offer", "open")
    assert found[0] == "trainer rank 0 offer_transfer near"
    assert found[-2:] == ["trainer rank 0 offer_transfer", "trainer rank 0 open_transfer 2 2"]
    stack.trainer.connected = False
    stack.weights.publish(0)
    assert stack.seen("offer") == ["trainer rank 0 offer_transfer"]
    stack.trainer.connected = False
    for worker in (*stack.engines, stack.rank(0)):
        worker.node_id = "node 7"
    stack.weights.publish(0)
    assert stack.seen("offer") == ["trainer rank 0 offer_transfer near"], "what one node cannot, another may"


def test_another_fault_of_a_transfer_is_no_reason_to_try_another(stack: Stack) -> None:
    on_one_node(stack)
    stack.rank(0).fails["open_transfer"] = WeightSyncError("nothing has moved")
    with pytest.raises(WeightSyncError, match="nothing has moved"):
        stack.weights.publish(0)


def test_where_it_was_asked_for_it_is_an_error(tmp_path: Path) -> None:
    stack = Stack(tmp_path, sync={"transport": "ipc"})
    on_one_node(stack)
    stack.rank(0).fails["open_transfer"] = MemoryNotShared("it cannot be shared")
    with pytest.raises(MemoryNotShared, match="it cannot be shared"):
        stack.weights.publish(0)


@pytest.fixture
def elastic(tmp_path: Path) -> Stack:
    """One engine that has weights, and one that is about to join; not one loss may count."""
    made = Stack(tmp_path, {"min": 1, "max": 2}, recoveries=0)
    made.fleet.slots[1].engine.wants = "1 CPU"  # type: ignore[attr-defined]
    late = made.fleet.slots[1].starting = Call(made.engines[1], Future())
    made.weights.publish(0)
    late.future.set_result(Place("node 1", []))
    made.engines[1].wants = ""
    made.trainer.step([], 1)
    made.seen()
    return made


def test_an_engine_joins_after_a_self_test_by_itself(elastic: Stack) -> None:
    assert elastic.weights.publish(1)["sync/self_test_diff"] == 0.0
    assert [engine.version for engine in elastic.engines] == [1, 1]
    assert elastic.seen("join_transfer", "perturb", "receive", "commit_weights 1") == [
        *("engine 1 join_transfer local://here 1 of 2", "trainer rank 0 perturb", "trainer rank 1 perturb"),
        *("engine 1 receive_weights 0", "engine 1 receive_weights 0"),
        *("engine 0 join_transfer local://here 1 of 3", "engine 1 join_transfer local://here 2 of 3"),
        *("trainer rank 0 perturb", "trainer rank 1 perturb"),
        *("engine 0 receive_weights 0", "engine 1 receive_weights 0") * 2,
        *("engine 0 receive_weights 1", "engine 1 receive_weights 1"),
        *("engine 0 commit_weights 1", "engine 1 commit_weights 1"),
    ]
    assert (
        elastic.told[-2:] == ["workers rollout: 2 ready, 0 lost", "rollout has 1"] and "engine 1 joined" in elastic.told
    )


@pytest.mark.parametrize(
    ("verb", "error"),
    [
        ("join_transfer", ClusterError("no way to the trainer")),
        ("receive_weights", EngineLost("died")),
        ("receive_weights", WeightSyncError("a tensor was not claimed")),
        ("commit_weights", OutOfMemory("no room")),
        ("prompt_logprobs", EngineLost("died")),
    ],
)
def test_an_engine_that_cannot_join_harms_no_other(elastic: Stack, verb: str, error: GrpoError) -> None:
    elastic.engines[1].fails[verb] = error
    elastic.weights.publish(1)
    assert elastic.engines[0].version == 1 and elastic.engines[0].weights == {"embed": "1", "head": "1"}
    assert [slot.state for slot in elastic.fleet.slots] == [State.HEALTHY, State.DEAD]
    assert "engine 1 failed" in elastic.told and elastic.context.recoveries.spent == 0
    assert elastic.rank(0).weights == {"embed": "1", "head": "1"}, "without noise"


def test_an_engine_that_computes_otherwise_does_not_join(elastic: Stack) -> None:
    elastic.engines[1].prompt_logprobs = lambda ids: elastic.engines[1].does("old", lambda: [-1.0, -2.0])  # type: ignore
    elastic.weights.publish(1)
    assert [slot.state for slot in elastic.fleet.slots] == [State.HEALTHY, State.DEAD]
    assert "engine 1 cannot join: engine 1 must follow the trainer" in str(elastic.engines[1].lost)


def test_an_engine_that_died_while_idle_is_no_part_of_the_next_sync(stack: Stack) -> None:
    stack.weights.publish(0)
    stack.engines[1].fails["ping"] = EngineLost("engine 1 died")
    stack.weights.publish(1)
    assert stack.engines[0].lost is None and stack.engines[0].version == 1 and len(stack.engines) == 3


def test_only_what_training_moves_makes_an_update_sure() -> None:
    head = TensorRecord("lm_head.weight", (151936, 1536), "bfloat16", moves=False)
    small, large = (TensorRecord("q_proj.weight", (size, 1536), "bfloat16") for size in (600, 700))
    assert not surely_changed([head, small])
    assert surely_changed([head, large])
    assert head == TensorRecord("lm_head.weight", (151936, 1536), "bfloat16"), "engines know nothing of it"
