"""Waits for workers, with real Ray and small actors; the sweep of kills is in tests/chaos."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from grpo.cluster.handles import SharedBatch
from grpo.cluster.session import Session
from grpo.errors import BugError, DataError, EngineLost, TrainerLost
from grpo.run.advice import LOST
from tests.cluster.actors import SECONDS, Rank, make
from tests.fakes import prompt, sample


@pytest.mark.slow
def test_results_come_in_order(cluster: Session, rank: Rank) -> None:
    other = make(cluster, 1)
    calls = [rank.number(1), other.number(2), rank.number(3)]
    assert cluster.workers.get(calls, SECONDS, "train") == [1, 2, 3]


@pytest.mark.slow
def test_an_actors_own_error_arrives_as_it_is(cluster: Session, rank: Rank) -> None:
    with pytest.raises(DataError, match="^row 3: no answer$"):
        cluster.workers.get([rank.does("refuse")], SECONDS, "rollout")
    assert not rank.lost


@pytest.mark.slow
def test_an_unexpected_error_names_the_actor_the_phase_and_the_cause(cluster: Session, rank: Rank) -> None:
    with pytest.raises(
        BugError, match=r"^weight sync: trainer rank 0 failed by a bug .*: ValueError: two lines at actors"
    ):
        cluster.workers.get([rank.does("fail")], SECONDS, "train")


@pytest.mark.slow
def test_a_wait_ends_at_its_deadline_and_the_actor_with_it(cluster: Session, rank: Rank, said: list[str]) -> None:
    with pytest.raises(TrainerLost, match=r"^train must end within 0.5 s \(deadlines.\*\), but trainer rank 0 has not"):
        cluster.workers.get([rank.does("hang")], 0.5, "train")
    assert rank.lost and not psutil.pid_exists(rank.pids[0])
    stacks = Path(said[-1].partition(": ")[2]).read_text()
    assert "hang (" in stacks, "the stuck line is named"


@pytest.mark.slow
def test_a_dead_actor_is_reported_while_its_sibling_still_works(cluster: Session, rank: Rank) -> None:
    busy = make(cluster, 1)
    hanging = busy.does("hang")
    with pytest.raises(TrainerLost, match="^train: trainer rank 0 died: "):
        cluster.workers.get([hanging, rank.does("die")], 60, "train")
    assert not hanging.future.done(), "it must not wait for the sibling"


@pytest.mark.slow
def test_outcomes_wait_for_all_and_keep_the_failures_in_their_places(cluster: Session, rank: Rank) -> None:
    others = [make(cluster, index) for index in (1, 2)]
    calls = [rank.does("die"), others[0].does("hang", 1), others[1].does("refuse")]
    lost, slow, refused = cluster.workers.outcomes(calls, SECONDS, "train")
    assert (type(lost), slow, type(refused)) == (TrainerLost, None, DataError)


@pytest.mark.slow
def test_a_frozen_actor_is_noticed_written_down_and_killed(cluster: Session, rank: Rank, said: list[str]) -> None:
    threading.Timer(0.5, os.kill, (rank.pids[0], signal.SIGSTOP)).start()
    hanging = rank.does("hang", 600)
    with pytest.raises(TrainerLost, match="^train: trainer rank 0 is frozen: no sign of life for deadlines.health = 4"):
        cluster.workers.get([hanging], 600, "train")
    assert not psutil.pid_exists(rank.pids[0])
    assert "hang (" in Path(said[-1].partition(": ")[2]).read_text()


@pytest.mark.slow
def test_a_busy_actor_is_not_taken_for_a_frozen_one(cluster: Session, rank: Rank) -> None:
    began = time.monotonic()
    assert cluster.workers.get([rank.does("hang", 8)], SECONDS, "train") == [None]
    assert time.monotonic() - began > 4, "longer than deadlines.health"


def test_lost_actors_have_errors_of_their_role() -> None:
    assert {"rollout": EngineLost, "trainer": TrainerLost} == LOST


@pytest.mark.slow
def test_a_batch_for_several_ranks_lies_in_the_store_once(cluster: Session) -> None:
    import ray

    batch = SharedBatch([sample(prompt(1), 0, 0)])
    assert batch.put() is batch.put()
    assert ray.get(batch.put()) == list(batch)
