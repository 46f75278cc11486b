"""A session of Ray as a whole: its start, its end, its head. Each test starts Ray anew."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from grpo.cluster.session import session
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
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"cluster": {"device": "cuda"}}, "^cluster.device is cuda, but Ray sees no GPU"),
        (
            {"train": {"offload_optimizer": "cpu", "zero_stage": 2}},
            "train.offload_optimizer is cpu, but Ray sees no GPU; remove it",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_where_there_is_none(run_dir: Path, sections: dict[str, object], said: str) -> None:
    config = make_config(run_dir, **sections)
    with (
        StopRequest(30) as stop,
        pytest.raises(ConfigError, match=said),
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
