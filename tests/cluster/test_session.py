"""A session of Ray as a whole: its start, its end, its head. Each test starts Ray anew."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from grpo.cluster import session as module
from grpo.cluster.session import Session, session
from grpo.errors import ClusterError, ConfigError, Interrupted
from grpo.run.stopping import StopRequest
from tests.cluster.actors import SECONDS, make, make_config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.slow
def test_a_frozen_head_of_ray_is_a_typed_error(run_dir: Path) -> None:
    with (
        StopRequest(30) as stop,
        pytest.raises(ClusterError, match="^Ray's head must answer within deadlines.health = 4 s"),
        session(make_config(run_dir), stop) as current,
    ):
        handle = make(current)
        head = next(p for p in psutil.Process().children(recursive=True) if p.name() == "gcs_server")
        head.suspend()
        current.workers.get([handle.does("hang")], 60, "train")
    assert not head.is_running()


@pytest.mark.slow
def test_a_session_leaves_no_process_behind(run_dir: Path) -> None:
    before = set(psutil.Process().children(recursive=True))  # servers of other tests
    with StopRequest(30) as stop, session(make_config(run_dir), stop) as current:
        handle = make(current)
        child = current.workers.get([handle.child()], SECONDS, "start")[0]
        started = set(psutil.Process().children(recursive=True)) - before
    assert handle.pids[0] in {process.pid for process in started}
    gone = psutil.wait_procs([*started, *([psutil.Process(child)] if psutil.pid_exists(child) else [])], timeout=10)
    assert gone[1] == []


@pytest.mark.slow
def test_cuda_without_a_gpu_is_refused(run_dir: Path) -> None:
    config = make_config(run_dir, cluster={"device": "cuda"})
    with (
        StopRequest(30) as stop,
        pytest.raises(ConfigError, match="^cluster.device is cuda, but Ray sees no GPU"),
        session(config, stop),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_wait_ends_the_session_with_its_name(run_dir: Path, number: signal.Signals) -> None:
    began = time.monotonic()
    with (
        StopRequest(30) as stop,
        pytest.raises(Interrupted, match=f"^stopped by {number.name}"),
        session(make_config(run_dir), stop) as current,
    ):
        handle = make(current)
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        current.workers.get([handle.does("hang")], 50, "train")
    assert time.monotonic() - began < 50


class BusyRay:
    """ray.init on a machine that is too busy `failures` times; then it is as if there were a cluster."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def init(self, **_: object) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise Exception("The current node timed out during startup.\nIt may be busy")


@pytest.mark.parametrize(("failures", "seconds"), [(2, 900), (99, 0.01)])
def test_a_local_ray_that_does_not_come_up_is_started_again_within_the_deadline(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, failures: int, seconds: float
) -> None:
    busy, said = BusyRay(failures), list[str]()
    monkeypatch.setattr(module.ray, "init", busy.init)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.02)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_worker_niceness"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.ray_private, "read_settings", lambda: None)
    starting = Session(make_config(run_dir, deadlines={"start": seconds}), StopRequest(30), said.append)
    if failures > 9:
        with pytest.raises(ClusterError, match="deadlines.start = 0.01 s, but: The .* busy; the machine"):
            starting._start_here()
        return
    starting._start_here()
    why = "The current node timed out during startup. It may be busy"
    assert said == [f"Ray did not come up on this machine ({why}); once more"] * 2 and busy.calls == 3


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ValueError("num_cpus must not be provided"), ClusterError, "unset RAY_ADDRESS .* or set cluster.address"),
        (SystemExit(15), Interrupted, "^stopped by SIGTERM$"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, raised: BaseException, kind: type[Exception], message: str
) -> None:
    tries = []

    def init(**_: object) -> None:
        tries.append(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does
        raise raised

    monkeypatch.setattr(module.ray, "init", init)
    monkeypatch.setattr(module.ray_private, "read_settings", lambda: None)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_worker_niceness"):
        monkeypatch.delenv(name, raising=False)
    with StopRequest(30) as stop, pytest.raises(kind, match=message):
        Session(make_config(run_dir), stop)._start_here()
    assert len(tries) == 1


def test_a_stop_while_ray_is_started_again_is_heard(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does
        raise Exception("timed out")

    monkeypatch.setattr(module.ray, "init", init)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(module.ray_private, "read_settings", lambda: None)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_worker_niceness"):
        monkeypatch.delenv(name, raising=False)
    with StopRequest(30) as stop, pytest.raises(Interrupted, match="SIGTERM"):
        Session(make_config(run_dir), stop, lambda _: os.kill(os.getpid(), signal.SIGTERM))._start_here()
