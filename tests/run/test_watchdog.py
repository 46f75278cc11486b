import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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
