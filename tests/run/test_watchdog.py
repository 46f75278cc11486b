import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from grpo.run.watchdog import WatchedProcesses, was_left
from tests.rollout.watched import assert_gone, watchdogs

CORE = """
import os, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
from grpo.run.watchdog import start_watchdog
start_watchdog(int(sys.argv[1]), sys.argv[2])
memory = SharedMemory(create=True, size=1 << 20)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), worker.pid, memory.name, flush=True)
time.sleep(600)
"""

PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
"""


@pytest.mark.parametrize("fault", ["core frozen, parent killed", "core killed", "core ends"])
def test_a_watcher_leaves_nothing_of_an_engine(fault: str, tmp_path: Path) -> None:
    """Here the core is a plain process with a child and shared memory; the parent runs it and waits."""
    folder = tmp_path / "sockets"
    folder.mkdir()
    (folder / "socket").touch()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CORE, str(folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    core_pid, worker_pid, memory = parent.stdout.readline().split()
    core, worker = psutil.Process(int(core_pid)), psutil.Process(int(worker_pid))
    [watchdog] = watchdogs(folder)
    assert Path("/dev/shm", memory).exists()
    assert watchdog.ppid() not in (parent.pid, core.pid) and os.getsid(watchdog.pid) not in (0, os.getsid(core.pid))
    assert watchdog.memory_info().rss < 16 * 2**20 and not watchdog.net_connections()
    time.sleep(1)  # for its first looks: a core that is gone cannot be asked for its children
    if fault == "core frozen, parent killed":
        core.suspend()
        parent.kill()
    elif fault == "core killed":
        core.kill()
    else:
        core.terminate()
    assert_gone([core, worker, watchdog])
    parent.wait(timeout=60)
    parent.stdout.close()
    assert not Path("/dev/shm", memory).exists() and not folder.exists()


def test_a_watchdog_without_descriptors_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not was_left(os.getpid(), os.getppid())
    assert was_left(os.getpid(), os.getppid() + 1) and was_left(2**22 + 1, 1)

    def exhausted(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", exhausted)
    monkeypatch.setattr(os, "listdir", exhausted)
    assert not was_left(os.getpid(), 1), "nothing is known"
    engine = WatchedProcesses(os.getpid(), set())
    engine.try_to_look()
    os.close(engine.held[os.getpid()])


def test_a_watchdog_lets_go_of_processes_that_have_ended() -> None:
    engine = WatchedProcesses(os.getpid(), set())
    with subprocess.Popen(["sleep", "60"]) as child:
        engine.look()
        assert child.pid in engine.held
        child.kill()
    engine.look()
    assert child.pid not in engine.held and os.getpid() in engine.held
    for descriptor in engine.held.values():
        os.close(descriptor)
