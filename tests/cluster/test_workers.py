"""The workers of a run: the end of lost ones, told once and with their stacks."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from grpo.cluster.workers import Workers
from grpo.config import Config
from grpo.errors import EngineLost, TrainerLost
from grpo.interfaces import Call, Place
from grpo.run.stopping import StopRequest
from tests.cluster.local import LocalEngine, LocalHead, LocalRank


class Stuck(LocalRank):
    def stacks(self) -> str:
        return "hang (trainer.py:3)"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def workers(tmp_path: Path, said: list[str]) -> Workers:
    config = Config.model_validate({"model": {"path": "x"}, "run": {"dir": str(tmp_path)}})
    return Workers(config, StopRequest(30), LocalHead(draining=frozenset({"node 2"})), said.append)


def test_a_lost_worker_is_ended_once_and_its_stacks_are_kept(workers: Workers, said: list[str]) -> None:
    events: list[str] = []
    rank = Stuck(0, events, {})
    workers.add(rank)
    workers.started(rank, Place("node 1", [7]))
    lost = TrainerLost("train: trainer rank 0 is frozen")
    workers.discard(rank, lost, True)
    workers.discard(rank, TrainerLost("again"), True)
    assert rank.lost is lost and events == ["trainer rank 0 ends"]
    assert said[0] == str(lost) and said[1].startswith("stacks of trainer rank 0: ")
    assert Path(said[1].partition(": ")[2]).read_text() == "hang (trainer.py:3)"


def test_ranks_that_are_lost_with_one_are_told_of_once(workers: Workers, said: list[str]) -> None:
    ranks = [LocalRank(index, [], {}) for index in range(3)]
    lost = TrainerLost("rank 1 died")
    for rank in ranks:
        workers.add(rank)
        workers.discard(rank, lost, False)
    assert said == ["rank 1 died"]


def test_who_is_alive_and_who_is_leaving(workers: Workers) -> None:
    engines = [LocalEngine(index, [], {}) for index in range(3)]
    for index, engine in enumerate(engines):
        workers.add(engine)
        workers.started(engine, Place(f"node {index + 1}", [index + 10]))
    workers.discard(engines[0], EngineLost("died"), False)
    assert workers.alive("rollout") == engines[1:] and workers.alive("trainer") == []
    assert workers.leaving(engines) == [engines[1]]


def test_the_end_asks_the_living_and_ends_them(workers: Workers) -> None:
    events: list[str] = []
    engines = [LocalEngine(index, events, {}) for index in range(2)]
    for engine in engines:
        workers.add(engine)
    workers.discard(engines[0], EngineLost("died"), False)
    events.clear()
    workers.close()
    assert events == ["engine 1 close", "engine 1 ends"]


def test_an_answer_is_timed_when_it_comes_and_also_where_the_driver_is_woken_before_it_is_noted(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10.0]
    monkeypatch.setattr("grpo.cluster.workers.time.monotonic", lambda: now[0])
    told = Place("node 1", [7], 0, {"process": 1.0, "imports": 4.0})
    early, late = LocalEngine(0, [], {}), LocalEngine(1, [], {})
    for engine in (early, late):
        workers.add(engine)
    call: Call[Place] = Call(early, Future())
    workers.starts(call)
    now[0] = 16.0
    call.future.set_result(told)
    now[0] = 60.0  # the driver looks much later
    assert workers.started(early, told) == {"engine 0": {"place": 1.0, "process": 1.0, "imports": 4.0}}
    assert workers.started(late, told) == {"engine 1": {"place": 45.0, "process": 1.0, "imports": 4.0}}
    assert workers.started(late, Place("node 1", [7])) == {}
