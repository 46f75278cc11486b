"""The ranks as one trainer: with ranks in this process."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from grpo.cluster.trainer_group import TrainerGroup
from grpo.errors import BugError, CheckpointError, ClusterError, DiskError, OutOfMemory, StoreLost, TrainerLost
from grpo.interfaces import Call
from grpo.types import Sample, Stats
from tests.cluster.local import LocalRank, make_context


def make_trainer(tmp_path: Path, told: list[str], events: list[str]) -> TrainerGroup:
    return TrainerGroup(make_context(tmp_path, told, train={"ranks": 2}), lambda index: LocalRank(index, events, {}))


def rank_of(trainer: TrainerGroup, index: int) -> LocalRank:
    rank = trainer.ranks[index]
    assert isinstance(rank, LocalRank)
    return rank


def test_it_tells_of_its_ranks_and_of_the_step_that_they_are_at(tmp_path: Path) -> None:
    told: list[str] = []
    trainer = make_trainer(tmp_path, told, [])
    trainer.ready()
    trainer.step([], 1)
    assert told == [
        "trainer has 0",
        "workers trainer: 0 ready, 0 lost",
        "workers trainer: 2 ready, 0 lost",
        "trainer has 1",
    ]
    rank_of(trainer, 1).fails["step"] = TrainerLost("rank 1 died")
    with pytest.raises(TrainerLost):
        trainer.step([], 2)
    trainer.rebuild()
    lost = "workers trainer: 0 ready, 2 lost"
    assert told[4:] == [lost, "trainer has 0", lost, "workers trainer: 2 ready, 0 lost"]
    assert trainer.lost is None and trainer.version == 0


def test_one_that_is_lost_takes_the_others_along(tmp_path: Path) -> None:
    events: list[str] = []
    trainer = make_trainer(tmp_path, [], events)
    trainer.ready()
    rank_of(trainer, 0).fails["save"] = ClusterError("the collective broke")
    with pytest.raises(TrainerLost, match="^save: a trainer rank failed: the collective broke$"):
        trainer.save("folder", 1)
    assert events[-2:] == ["trainer rank 0 ends", "trainer rank 1 ends"]


def test_the_only_rank_that_is_lost_is_rebuilt(tmp_path: Path) -> None:
    """Whoever waits for it has discarded it by then."""
    context = make_context(tmp_path, [])
    trainer = TrainerGroup(context, lambda index: LocalRank(index, [], {}))
    trainer.ready()
    rank, lost = rank_of(trainer, 0), TrainerLost("rank 0 died")
    rank.fails["step"] = lost
    context.workers.discard(rank, lost, False)
    with pytest.raises(TrainerLost):
        trainer.step([], 1)
    trainer.rebuild()
    assert trainer.lost is None and trainer.ranks != [rank]


def test_a_loss_of_ranks_that_were_replaced_ends_no_new_ones(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], [])
    trainer.ready()
    old = trainer.ranks
    trainer.noticed(TrainerLost("rank 0 died"), old[:1])
    trainer.noticed(TrainerLost("rank 1 died, says another thread"), old[1:])
    assert str(trainer.lost) == "rank 0 died"
    trainer.rebuild()
    trainer.noticed(TrainerLost("rank 0 died, says a thread that is late"), old)
    assert trainer.lost is None


@pytest.mark.parametrize("error", [StoreLost("the bucket is gone"), CheckpointError("trainer.json is damaged")])
def test_what_is_no_loss_of_a_rank_ends_none(tmp_path: Path, error: ClusterError) -> None:
    events: list[str] = []
    trainer = make_trainer(tmp_path, [], events)
    trainer.ready()
    rank_of(trainer, 1).fails["save"] = error
    with pytest.raises(type(error)):
        trainer.save("folder", 1)
    assert "trainer rank 0 ends" not in events


def test_weights_have_moved_only_if_an_update_moved_them(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], [])
    trainer.ready()
    assert not trainer.moved
    trainer.step([], 1)
    assert trainer.moved


def test_leaving_is_a_loss_that_does_not_count(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], [])
    trainer.ready()
    with pytest.raises(TrainerLost) as caught:
        trainer.leave()
    assert not caught.value.counts and trainer.lost is caught.value


def test_what_would_come_again_is_no_lost_rank(tmp_path: Path) -> None:
    """Rank 0 sees the collective break by what happened to rank 1."""
    events: list[str] = []
    trainer = make_trainer(tmp_path, [], events)
    trainer.ready()
    for error in (OutOfMemory("no room"), BugError("shapes"), DiskError("full")):
        rank_of(trainer, 0).fails["step"] = ClusterError("lost its connection")
        rank_of(trainer, 1).fails["step"] = error
        with pytest.raises(type(error)) as caught:
            trainer.step([], 1)
        assert caught.value is error
    assert "trainer rank 0 ends" not in events


class Late(LocalRank):
    """Its step ends a moment after that of the others."""

    def step(self, batch: Sequence[Sample], step: int) -> Call[Stats]:
        future: Future[Stats] = Future()
        threading.Timer(0.6, future.set_exception, [OutOfMemory("no room")]).start()
        return Call(self, future)


def test_a_rank_has_a_moment_to_say_why_a_connection_broke(tmp_path: Path) -> None:
    kinds = [LocalRank, Late]
    trainer = TrainerGroup(make_context(tmp_path, [], train={"ranks": 2}), lambda index: kinds[index](index, [], {}))
    trainer.ready()
    rank_of(trainer, 0).fails["step"] = ClusterError("lost its connection")
    with pytest.raises(OutOfMemory):
        trainer.step([], 1)


def test_new_ranks_without_room_are_tried_again_where_lost_ones_had_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], [])
    rank_of(trainer, 0).fails["start"] = OutOfMemory("no room")
    trainer.lost = TrainerLost("rank 1 died")
    trainer.starting = [rank.start("host", 1) for rank in trainer.ranks]
    with pytest.raises(TrainerLost, match="no room"):
        trainer.ready()
    first = make_trainer(tmp_path, [], [])
    rank_of(first, 0).fails["start"] = OutOfMemory("no room")
    first.starting = [rank.start("host", 1) for rank in first.ranks]
    with pytest.raises(OutOfMemory):
        first.ready()


def test_a_traceback_is_kept_in_the_runs_folder(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], [])
    trainer.ready()
    error = BugError("shapes")
    error.traceback, error.traceback_file = "Traceback ...", str(tmp_path / "errors" / "trainer-0-step.txt")
    rank_of(trainer, 0).fails["step"] = error
    with pytest.raises(BugError):
        trainer.step([], 1)
    assert (tmp_path / "errors" / "trainer-0-step.txt").read_text() == "Traceback ..."
