"""The Ray floor with small actors; the whole job is in test_end_to_end.py."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from grpo.cluster.adapters import RayRollouts, request_seed
from grpo.cluster.session import Session, session
from grpo.config import Config
from grpo.errors import ClusterError, ConfigError, DataError, DeadlineExceeded, Interrupted
from grpo.types import Group, Prompt, Sampling
from tests.fakes import sample

CONFIG = Config.model_validate({"model": {"path": "unused"}, "rollout": {"engines": 16}})  # room for every actor below


class Worker:
    """An actor with verbs that succeed, fail, hang and die."""

    def pid(self) -> int:
        return os.getpid()

    def child(self) -> int:
        """A process that ignores the end of its parent, as an engine core does."""
        return psutil.Popen(["sleep", "300"], start_new_session=True).pid

    def refuse(self) -> None:
        raise DataError("row 3: no answer")

    def fail(self) -> None:
        raise ValueError("two\nlines")

    def hang(self) -> None:
        time.sleep(60)

    def die(self) -> None:
        os._exit(3)

    def close(self) -> None:
        pass


class Echo(Worker):
    """An engine whose samples name the prompt, and which answers in the order of the requests."""

    async def generate(self, requests: list[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        return [Group(prompt, (sample(prompt, 0, version=0, text=f"seed {seed}"),)) for prompt, seed in requests]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Session]:
    with session(CONFIG) as current:
        yield current


@pytest.fixture
def worker(cluster: Session) -> Any:
    return cluster.create(Worker, "rollout", 0)


@pytest.mark.slow
def test_results_come_in_order(cluster: Session, worker: Any) -> None:
    other = cluster.create(Worker, "trainer", 0)
    pids = cluster.get([worker.pid.remote(), other.pid.remote(), worker.pid.remote()], 60, "start")
    assert pids[0] == pids[2] != pids[1]


@pytest.mark.slow
def test_an_actors_own_error_arrives_as_it_is(cluster: Session, worker: Any) -> None:
    with pytest.raises(DataError, match="^row 3: no answer$"):
        cluster.get([worker.refuse.remote()], 60, "rollout")


@pytest.mark.slow
def test_an_unexpected_error_names_the_phase_and_the_logs(cluster: Session, worker: Any) -> None:
    with pytest.raises(ClusterError, match=r"^train: an actor failed: .*lines; logs are in .*logs$"):
        cluster.get([worker.fail.remote()], 60, "train")


@pytest.mark.slow
def test_a_wait_ends_at_its_deadline(cluster: Session, worker: Any) -> None:
    cluster.get([worker.pid.remote()], 60, "start")
    with pytest.raises(DeadlineExceeded, match=r"^train must end within 0.5 s \(deadlines.\*\), but 1 of 1 actors"):
        cluster.get([worker.hang.remote()], 0.5, "train")


@pytest.mark.slow
def test_a_dead_actor_is_reported_while_its_sibling_still_works(cluster: Session, worker: Any) -> None:
    busy = cluster.create(Worker, "trainer", 0)
    cluster.get([busy.pid.remote()], 60, "start")
    began = time.monotonic()
    with pytest.raises(ClusterError, match="^train: an actor died: "):
        cluster.get([busy.hang.remote(), worker.die.remote()], 60, "train")
    assert time.monotonic() - began < 50, "it must not wait for the sibling"


@pytest.mark.slow
def test_engines_share_prompts_and_answers_keep_their_order(cluster: Session) -> None:
    engines = [cluster.create(Echo, "rollout", 0) for _ in range(2)]
    rollouts = RayRollouts(cluster, CONFIG, engines)
    prompts = [Prompt(f"p:{n}", "q", "a", (1,)) for n in range(5)]
    groups = rollouts.generate(prompts, Sampling(1, 8, 1.0, 1.0), step=7)
    assert [group.prompt.id for group in groups] == [f"p:{n}" for n in range(5)]
    assert [group.samples[0].text for group in groups] == [f"seed {request_seed(0, 7, n, f'p:{n}')}" for n in range(5)]


@pytest.mark.slow
def test_a_session_leaves_no_process_behind(cluster: Session, worker: Any) -> None:
    child = cluster.get([worker.child.remote()], 60, "start")[0]
    actor = cluster.get([worker.pid.remote()], 60, "start")[0]
    cluster.watch([actor])
    cluster.stop()
    assert not psutil.pid_exists(actor)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_cuda_without_a_gpu_is_refused() -> None:
    config = Config.model_validate({"model": {"path": "unused"}, "cluster": {"device": "cuda"}})
    with pytest.raises(ConfigError, match="^cluster.device is cuda, but Ray sees no GPU"), session(config):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_wait_ends_the_session_with_its_name(number: signal.Signals) -> None:
    began = time.monotonic()
    with pytest.raises(Interrupted, match=f"^stopped by {number.name}"), session(CONFIG) as current:
        worker = current.create(Worker, "rollout", 0)
        current.watch(current.get([worker.pid.remote()], 60, "start"))
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        current.get([worker.hang.remote()], 50, "train")
    assert time.monotonic() - began < 50


def test_request_seeds_differ_by_run_step_place_and_prompt_and_leave_room_for_samples() -> None:
    keys = itertools.product(range(3), range(20), range(2), ("a:1", "a:2"))
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == 3 * 20 * 2 * 2
    assert request_seed(1, 2, 3, "a:1") == request_seed(1, 2, 3, "a:1")
    assert all(0 <= seed < 2**31 - 2**16 for seed in seeds)
