"""The Ray floor with small actors; the whole job is in test_end_to_end.py, the sweep of kills in test_chaos.py."""

import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.cluster import processes as node
from grpo.cluster.fleet import ARCS, Fleet, RecoveryBudget, Slot, State
from grpo.cluster.groups import RayRollouts, RayTrainer, request_seed
from grpo.cluster.session import Session, session
from grpo.cluster.waiting import ActorHandle
from grpo.config import Config
from grpo.errors import (
    ClusterError,
    DataError,
    EngineLost,
    GrpoError,
    TrainerLost,
)
from grpo.run.stopping import StopRequest
from grpo.types import Group, Prompt, Sampling
from tests.fakes import FakeRecorder, sample

SECONDS = 30


def make_config(run_dir: Path, **sections: object) -> Config:
    base = {
        "model": {"path": "unused"},
        "run": {"dir": str(run_dir)},
        "rollout": {"engines": 2},
        "train": {"ranks": 24},  # room for every actor below
        "deadlines": {"health": 4, "rollout": 20},
    }
    return Config.model_validate(base | sections)


class Worker:
    """An actor with verbs that succeed, fail, hang and die."""

    def __init__(self, config: object = None, index: int = 0, device: str = "cpu") -> None:
        self.index = index

    def start(self) -> tuple[str, list[int]]:
        import ray

        return ray.get_runtime_context().get_node_id(), [os.getpid()]

    def ping(self, _seconds: float) -> None:
        pass

    def number(self, value: int) -> int:
        return value

    def child(self) -> int:
        """A process that ignores the end of its parent, as an engine core does."""
        return psutil.Popen(["sleep", "300"], start_new_session=True).pid

    def refuse(self) -> None:
        raise DataError("row 3: no answer")

    def fail(self) -> None:
        raise ValueError("two\nlines")

    def hang(self, seconds: float = 60) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os._exit(3)

    def close(self) -> None:
        pass


class Echo(Worker):
    """An engine whose samples name the prompt, and which answers in the order of the requests."""

    def __init__(self, config: object, index: int, device: str) -> None:
        super().__init__(config, index, device)
        self.version = 0

    async def start(self) -> tuple[str, list[int]]:  # type: ignore[override]
        return super().start()

    async def health(self, _seconds: float) -> str:
        return "ok"

    async def generate(self, requests: list[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        if any(prompt.question == f"freeze {self.index}" for prompt, _ in requests) and not MARKER.exists():
            MARKER.write_text("")
            os.kill(os.getpid(), signal.SIGSTOP)
        return [Group(prompt, (sample(prompt, 0, version=0, text=f"seed {seed}"),)) for prompt, seed in requests]


MARKER = Path("/dev/shm", f"grpo-test-cluster-{os.environ.setdefault('GRPO_TEST_PID', str(os.getpid()))}")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def cluster(run_dir: Path, said: list[str]) -> Iterator[Session]:
    with StopRequest(30) as stop, session(make_config(run_dir), stop, said.append) as current:
        yield current


def make(cluster: Session, role: str, index: int = 0) -> ActorHandle:
    handle = cluster.create(Worker, role, index, 0, None, index, "cpu")
    cluster.started(handle, cluster.get([handle.call("start")], SECONDS, "start", heartbeat="")[0])
    return handle


@pytest.fixture
def rank(cluster: Session) -> ActorHandle:
    return make(cluster, "trainer")


@pytest.mark.slow
def test_results_come_in_order(cluster: Session, rank: ActorHandle) -> None:
    other = make(cluster, "trainer", 1)
    calls = [rank.call("number", 1), other.call("number", 2), rank.call("number", 3)]
    assert cluster.get(calls, SECONDS, "train") == [1, 2, 3]


@pytest.mark.slow
def test_an_actors_own_error_arrives_as_it_is(cluster: Session, rank: ActorHandle) -> None:
    with pytest.raises(DataError, match="^row 3: no answer$"):
        cluster.get([rank.call("refuse")], SECONDS, "rollout")
    assert not rank.lost


@pytest.mark.slow
def test_an_unexpected_error_names_the_actor_the_phase_and_the_logs(cluster: Session, rank: ActorHandle) -> None:
    with pytest.raises(ClusterError, match=r"^train: trainer rank 0 failed: .*lines; logs are in .*logs$"):
        cluster.get([rank.call("fail")], SECONDS, "train")


@pytest.mark.slow
def test_a_wait_ends_at_its_deadline_and_the_actor_with_it(
    cluster: Session, rank: ActorHandle, said: list[str]
) -> None:
    with pytest.raises(TrainerLost, match=r"^train must end within 0.5 s \(deadlines.\*\), but trainer rank 0 has not"):
        cluster.get([rank.call("hang")], 0.5, "train")
    assert rank.lost and not psutil.pid_exists(rank.pids[0])
    stacks = Path(said[-1].partition(": ")[2]).read_text()
    assert "hang (" in stacks, "the stuck line is named"


@pytest.mark.slow
def test_a_dead_actor_is_reported_while_its_sibling_still_works(cluster: Session, rank: ActorHandle) -> None:
    busy = make(cluster, "trainer", 1)
    began = time.monotonic()
    with pytest.raises(TrainerLost, match="^train: trainer rank 0 died: "):
        cluster.get([busy.call("hang"), rank.call("die")], 60, "train")
    assert time.monotonic() - began < 50, "it must not wait for the sibling"


@pytest.mark.slow
def test_outcomes_wait_for_all_and_keep_the_failures_in_their_places(cluster: Session, rank: ActorHandle) -> None:
    others = [make(cluster, "trainer", index) for index in (1, 2)]
    calls = [rank.call("die"), others[0].call("hang", 1), others[1].call("refuse")]
    lost, slow, refused = cluster.outcomes(calls, SECONDS, "train")
    assert (type(lost), slow, type(refused)) == (TrainerLost, None, DataError)


@pytest.mark.slow
def test_a_frozen_actor_is_noticed_written_down_and_killed(
    cluster: Session, rank: ActorHandle, said: list[str]
) -> None:
    threading.Timer(0.5, os.kill, (rank.pids[0], signal.SIGSTOP)).start()
    began = time.monotonic()
    with pytest.raises(TrainerLost, match="^train: trainer rank 0 is frozen: no sign of life for deadlines.health = 4"):
        cluster.get([rank.call("hang")], 60, "train")
    assert time.monotonic() - began < 40
    assert not psutil.pid_exists(rank.pids[0])
    assert "hang (" in Path(said[-1].partition(": ")[2]).read_text()


@pytest.mark.slow
def test_a_busy_actor_is_not_taken_for_a_frozen_one(cluster: Session, rank: ActorHandle) -> None:
    assert cluster.get([rank.call("hang", 8)], SECONDS, "train") == [None]


@pytest.mark.slow
def test_engines_share_prompts_and_a_frozen_ones_share_goes_to_the_others(cluster: Session, run_dir: Path) -> None:
    MARKER.unlink(missing_ok=True)
    told: list[str] = []
    config = make_config(run_dir)
    fleet = Fleet(
        cluster,
        config,
        lambda index: cluster.create(Echo, "rollout", index, 0, config, index, "cpu"),
        RecoveryBudget(3),
        FakeRecorder(told),
    )
    fleet.gather(wait=True)
    fleet.verified()
    assert told == ["workers rollout: 0 ready, 0 lost", "workers rollout: 2 ready, 0 lost"]
    rollouts = RayRollouts(cluster, config, fleet, ensure=lambda: 0)
    prompts = [Prompt(f"p:{n}", "freeze 1" if n == 3 else "q", "a", (1,)) for n in range(5)]
    groups = rollouts.generate(prompts, Sampling(1, 8, 1.0, 1.0), step=7)
    MARKER.unlink()
    assert [group.prompt.id for group in groups] == [f"p:{n}" for n in range(5)]
    assert [group.samples[0].text for group in groups] == [f"seed {request_seed(0, 7, n, f'p:{n}')}" for n in range(5)]
    assert [slot.state for slot in fleet.slots] == [State.HEALTHY, State.RESTARTING]
    fleet.gather(wait=True)
    assert [slot.state for slot in fleet.slots] == [State.HEALTHY, State.STALE]
    assert told[2:] == ["workers rollout: 1 ready, 1 lost"] * 2
    assert "engine 1 is frozen" in str(fleet.slots[1].lost)
    fleet.verified()
    assert [slot.state for slot in fleet.slots] == [State.HEALTHY] * 2
    assert told[4:] == ["recovered rollout", "workers rollout: 2 ready, 0 lost"]


class Ranks:
    """A session and its two ranks in one, which answer with None, or are lost in the verb `lost`."""

    headless = False
    lost = ""

    def create(self, _rank: int) -> "Ranks":
        return self

    def call(self, verb: str, *_: object) -> str:
        return verb

    def get(self, calls: list[str], *_: object, **_options: object) -> list[Any]:
        if self.lost in calls:
            raise TrainerLost(f"{self.lost}: rank 1 died")
        return [{"address": ("host", 1), "step": {}}.get(verb) for verb in calls]

    def started(self, *_: object) -> None:
        pass

    discard = started


def test_the_trainer_tells_of_its_ranks_and_of_the_step_that_they_are_at(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo.cluster.groups.ray.put", lambda batch: batch)
    told: list[str] = []
    ranks: Any = Ranks()
    config = make_config(run_dir, train={"ranks": 2})
    trainer = RayTrainer(ranks, config, ranks.create, RecoveryBudget(3), FakeRecorder(told))
    trainer.ready()
    trainer.step([], 1)
    assert told == [
        "trainer has 0",
        "workers trainer: 0 ready, 0 lost",
        "workers trainer: 2 ready, 0 lost",
        "trainer has 1",
    ]
    ranks.lost = "step"
    with pytest.raises(TrainerLost):
        trainer.step([], 2)
    trainer.rebuild()
    lost = "workers trainer: 0 ready, 2 lost"
    assert told[4:] == [lost, "trainer has 0", lost, "workers trainer: 2 ready, 0 lost"]
    assert trainer.lost is None


def test_the_arcs_of_an_engines_state() -> None:
    slot = Slot(0, ActorHandle("rollout", 0, None))
    for state in (State.RESTARTING, State.STALE, State.HEALTHY, State.DEAD):
        slot.to(state)
    with pytest.raises(AssertionError, match="cannot go from dead to healthy"):
        slot.to(State.HEALTHY)
    assert [state for state in State if State.HEALTHY in ARCS[state]] == [State.STALE]


def test_too_many_recoveries_without_a_checkpoint_end_the_run() -> None:
    recoveries = RecoveryBudget(2)
    for _ in range(3):
        recoveries.spend(EngineLost("engine 0 died"))
        recoveries.reset()
    recoveries.spend(EngineLost("engine 0 died"))
    recoveries.spend(EngineLost("engine 0 died"))
    with pytest.raises(ClusterError, match="^engine 1 died; .* replaced 2 times since the last checkpoint") as caught:
        recoveries.spend(EngineLost("engine 1 died"))
    assert not isinstance(caught.value, EngineLost)


def test_stacks_of_a_process_that_is_stopped() -> None:
    process = subprocess.Popen(["python3", "-c", "import time\ndef asleep():\n time.sleep(60)\nasleep()"])
    try:
        time.sleep(1)
        process.send_signal(signal.SIGSTOP)
        assert "asleep" in node.stacks([process.pid])
        assert "no stacks" in node.stacks([2**22 - 1])
    finally:
        process.kill()
        process.wait()


def test_ending_takes_children_and_stopped_ones_along() -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"])
    time.sleep(0.3)
    family = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children()]
    parent.send_signal(signal.SIGSTOP)
    assert len(family) == 3
    assert node.end([parent.pid, 2**22 - 1]) == []
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def test_request_seeds_differ_by_run_step_place_and_prompt_and_leave_room_for_samples() -> None:
    keys = itertools.product(range(3), range(20), range(2), ("a:1", "a:2"))
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == 3 * 20 * 2 * 2
    assert request_seed(1, 2, 3, "a:1") == request_seed(1, 2, 3, "a:1")
    assert all(0 <= seed < 2**31 - 2**16 for seed in seeds)


def test_lost_actors_have_errors_of_their_role() -> None:
    kinds: list[Any] = [EngineLost, TrainerLost]
    assert all(issubclass(kind, ClusterError) and kind.exit_code == 10 and not kind.fatal for kind in kinds)
    assert issubclass(ClusterError, GrpoError)
