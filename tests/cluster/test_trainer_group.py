"""The ranks as one trainer: with ranks in this process."""

from pathlib import Path

import pytest

from grpo.cluster.trainer_group import TrainerGroup
from grpo.errors import CheckpointError, ClusterError, StoreLost, TrainerLost
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
