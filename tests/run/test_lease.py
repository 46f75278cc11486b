import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from grpo.errors import CheckpointError, Fenced, Interrupted
from grpo.run import attempts as module
from grpo.run import lease as lease_module
from grpo.run.attempts import holder_here, is_gone, start_ticks
from grpo.run.lease import Lease
from grpo.run.stopping import StopRequest
from tests.checkpoints import checkpoints, save

HOLDER = """
import sys
from pathlib import Path
from grpo.errors import GrpoError
from grpo.run.lease import Lease

run_dir, seconds = Path(sys.argv[1]), float(sys.argv[2])
try:
    with Lease(run_dir, seconds) as lease:
        print(lease.attempt, flush=True)
        for line in sys.stdin:
            if line == "save\\n":
                from grpo.checkpoint import Checkpoints
                from tests.checkpoints import config, save
                save(Checkpoints(config(run_dir), run_dir, lease), 7)
                print("saved", flush=True)
except GrpoError as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(error.exit_code)
"""


@contextmanager
def holder(run_dir: Path, seconds: float):
    """A process that takes the lease, holds it until its input ends, and commits when told to."""
    command = [sys.executable, "-c", HOLDER, str(run_dir), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    with process.stdout, process.stdin:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def line(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def attempts(run_dir: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in sorted((run_dir / "attempts").iterdir())}


def test_attempts_are_counted_and_ended(tmp_path):
    for attempt in (1, 2, 3):
        with Lease(tmp_path, 30) as lease:
            assert lease.attempt == attempt
            lease.check()
            assert not attempts(tmp_path)[f"{attempt:06d}.json"]["ended"]
    assert [(entry["attempt"], entry["ended"]) for entry in attempts(tmp_path).values()] == [
        (1, True),
        (2, True),
        (3, True),
    ]


def test_an_error_ends_the_attempt_too(tmp_path):
    with pytest.raises(ValueError), Lease(tmp_path, 30):
        raise ValueError
    with Lease(tmp_path, 30) as lease:
        assert lease.attempt == 2


def test_no_thread_is_left(tmp_path):
    with Lease(tmp_path, 30) as lease:
        assert lease._thread.is_alive()
    assert not lease._thread.is_alive()


def test_of_20_starts_at_once_exactly_one_holds(tmp_path):
    with ExitStack() as stack:
        processes = [stack.enter_context(holder(tmp_path, 9)) for _ in range(20)]
        said = [line(process)[:6] for process in processes]
        assert sorted(said) == ["1"] + ["Fenced"] * 19
        holding = processes.pop(said.index("1"))
        assert [process.wait() for process in processes] == [13] * 19
        assert holding.poll() is None
        holding.stdin.close()
        assert holding.wait() == 0
    assert list(attempts(tmp_path)) == ["000001.json"]


def test_a_dead_holder_of_this_machine_is_followed_at_once(tmp_path):
    with holder(tmp_path, 3600) as process:
        assert line(process) == "1"
        process.kill()
        process.wait()
        with Lease(tmp_path, 3600) as lease:
            assert lease.attempt == 2


def test_a_zombie_process_is_dead(tmp_path):
    with holder(tmp_path, 3600) as process:
        assert line(process) == "1"
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with Lease(tmp_path, 3600) as lease:
            assert lease.attempt == 2


def test_a_pid_that_is_used_again_is_not_the_holder(tmp_path):
    with Lease(tmp_path, 3600) as lease:
        content = json.loads(lease._content())
    content |= {"pid": os.getppid(), "ticks": 1, "ended": False}
    (tmp_path / "attempts/000001.json").write_text(json.dumps(content))
    with Lease(tmp_path, 3600) as lease:
        assert lease.attempt == 2


@pytest.mark.parametrize("content", ['{"machine": "other", "pid": 1, "created": 1.0, "ended": false}', "", "[1]", "{"])
def test_a_silent_holder_elsewhere_is_followed_after_lease_seconds(tmp_path, content):
    """Also one that was killed before it could say who it is."""
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts/000001.json").write_text(content)
    os.utime(tmp_path / "attempts/000001.json", (0, 0))
    begin = time.monotonic()
    with Lease(tmp_path, 0.6) as lease:
        assert lease.attempt == 2
        assert time.monotonic() - begin >= 0.6


def test_a_living_holder_elsewhere_is_found_by_its_heartbeat_alone(tmp_path, monkeypatch):
    """Its clock, its pid and its times of files say nothing."""
    with Lease(tmp_path, 1.5):
        monkeypatch.setattr(module, "machine", lambda: "another")
        monkeypatch.setattr(time, "time", lambda: 0.0)
        with pytest.raises(Fenced, match=r"attempt 1 is alive \(process \d+ on host") as caught, Lease(tmp_path, 60):
            pass
        assert caught.value.exit_code == 13


def test_a_frozen_holder_is_followed_and_fenced_when_it_wakes(tmp_path):
    with holder(tmp_path, 1.2) as process:
        assert line(process) == "1"
        os.kill(process.pid, signal.SIGSTOP)
        with Lease(tmp_path, 1.2) as lease:
            assert lease.attempt == 2
            saved = save(checkpoints(tmp_path, attempt=2), 5)
            before = attempts(tmp_path)["000001.json"]
            process.stdin.write("save\n")
            os.kill(process.pid, signal.SIGCONT)
            assert "attempt 2 has taken over" in line(process)
            assert process.wait() == 13
            lease.check()
            assert attempts(tmp_path)["000001.json"] == before, "it wrote nothing any more, not even that it ended"
            assert checkpoints(tmp_path, attempt=2).newest() == saved


def test_a_frozen_holder_whom_nobody_followed_goes_on(tmp_path):
    with holder(tmp_path, 0.9) as process:
        assert line(process) == "1"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.2)
        process.stdin.write("save\n")
        os.kill(process.pid, signal.SIGCONT)
        assert line(process) == "saved"


def test_the_heartbeat_notices_by_itself_and_stops(tmp_path):
    with Lease(tmp_path, 0.3) as lease:
        content = json.loads((tmp_path / "attempts/000001.json").read_text())
        (tmp_path / "attempts/000002.json").write_text("{}")
        lease._thread.join(timeout=10)
        assert not lease._thread.is_alive()
        with pytest.raises(Fenced, match="attempt 2 has taken over"):
            lease.check()
    assert (tmp_path / "attempts/000002.json").read_text() == "{}"
    assert not json.loads((tmp_path / "attempts/000001.json").read_text())["ended"]
    assert content["attempt"] == 1


def test_the_folder_was_deleted_and_another_start_took_the_number(tmp_path):
    with Lease(tmp_path, 30) as old:
        (tmp_path / "attempts/000001.json").unlink()
        with pytest.raises(Fenced, match="gone"):
            old.check()
        with Lease(tmp_path, 30) as new:
            assert new.attempt == 1
            old._lost = None
            old._beat()
            with pytest.raises(Fenced, match="another start's"):
                old.check()
            new.check()


def test_a_heartbeat_that_cannot_be_written_is_fenced_after_lease_seconds(tmp_path, monkeypatch):
    with Lease(tmp_path, 0.6) as lease:
        writes = []

        def full(*_):
            writes.append(1)
            raise OSError("No space left")

        monkeypatch.setattr(os, "pwrite", full)
        lease.check()
        time.sleep(1.0)
        with pytest.raises(Fenced, match="heartbeat could not be written for 0.6 s"):
            lease.check()
        assert len(writes) >= 2, "it kept trying"


def test_a_disk_that_is_full_for_a_moment_is_forgiven(tmp_path, monkeypatch):
    with Lease(tmp_path, 0.6) as lease, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError("full")))
        time.sleep(0.3)
        patch.undo()
        time.sleep(0.5)
        lease.check()


def test_clocks_may_jump(tmp_path, monkeypatch):
    with Lease(tmp_path, 30) as lease:
        for offset in (-3600, 3600):
            monkeypatch.setattr(time, "time", lambda offset=offset: 1.7e9 + offset)
            lease._beat()
            lease.check()
        os.utime(tmp_path / "attempts/000001.json", (0, 0))
        lease.check()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError), Lease(tmp_path / "file", 30):
        pass


def test_a_holder_elsewhere_that_is_stopping_is_waited_for(tmp_path, monkeypatch, capsys):
    """Kubernetes starts the next pod while the one before still commits within its grace period."""
    with StopRequest(60) as stop, Lease(tmp_path, 0.9, stop) as old:
        os.kill(os.getpid(), signal.SIGTERM)
        old._beat()
        monkeypatch.setattr(module, "machine", lambda: "another")
        threading.Timer(3.0, old.__exit__, (None, None, None)).start()
        begin = time.monotonic()
        with Lease(tmp_path, 0.9) as new:
            assert new.attempt == 2
            assert time.monotonic() - begin >= 2.5, "it lived for more than lease_seconds after it was seen"
    assert capsys.readouterr().out.startswith("waiting for attempt 1 on host ")


def test_a_holder_that_outlives_its_grace_period_is_not_waited_for_any_longer(tmp_path, monkeypatch):
    with StopRequest(0.5) as stop, Lease(tmp_path, 0.6, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(module, "machine", lambda: "another")
        begin = time.monotonic()
        with pytest.raises(Fenced, match="attempt 1 is alive"), Lease(tmp_path, 0.6):
            pass
        assert time.monotonic() - begin >= 0.6


def test_a_stopping_holder_that_is_killed_is_followed_after_lease_seconds(tmp_path):
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts/000001.json").write_text('{"machine": "other", "pid": 1, "ended": false, "stopping": 3600}')
    begin = time.monotonic()
    with Lease(tmp_path, 0.6) as lease:
        assert lease.attempt == 2
    assert 0.6 <= time.monotonic() - begin < 60


def test_a_start_that_waits_can_be_stopped(tmp_path):
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts/000001.json").write_text('{"machine": "other", "pid": 1, "ended": false}')
    with StopRequest(30) as stop:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Interrupted, match="SIGTERM"), Lease(tmp_path, 60, stop):
            pass
    assert list(attempts(tmp_path)) == ["000001.json"]


def test_who_holds_the_folder_on_this_machine(tmp_path, monkeypatch):
    assert holder_here(tmp_path) is None
    with holder(tmp_path, 30) as process:
        assert line(process) == "1"
        found = holder_here(tmp_path)
        assert (found.attempt, found.process.pid, found.ended) == (1, process.pid, False)
        with monkeypatch.context() as patch:
            patch.setattr(module, "machine", lambda: "another")
            assert holder_here(tmp_path) is None, "the same pid elsewhere is another process"
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert found.ended, "a zombie has ended"
        assert holder_here(tmp_path) is None
    with Lease(tmp_path, 30):
        assert holder_here(tmp_path).process.pid == os.getpid()
    assert holder_here(tmp_path) is None


def set_clock(monkeypatch, seconds):
    """Everything that tells the time of day is off by `seconds`, as after a step of the machine's clock."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + seconds)
    monkeypatch.setattr(psutil, "boot_time", lambda: psutil._pslinux.boot_time() + seconds)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: self._proc.create_time() + seconds)


@pytest.mark.parametrize("seconds", [1.0, -1.0, 0.5, 86400.0, -3.2e7])
def test_a_step_of_the_clock_does_not_make_a_living_run_dead(tmp_path, monkeypatch, seconds):
    with Lease(tmp_path, 0.9) as lease:
        set_clock(monkeypatch, seconds)
        with pytest.raises(Fenced, match="attempt 1 is alive"), Lease(tmp_path, 0.9):
            pass
        assert holder_here(tmp_path).process.pid == os.getpid()
        lease.check()


def test_the_time_of_day_is_not_in_the_file_and_not_asked_for(tmp_path, monkeypatch):
    """Nor does anything of run/ but stopping's and faults' stamps name a clock that can be set."""
    with Lease(tmp_path, 30):
        content = attempts(tmp_path)["000001.json"]
    assert set(content) == {"attempt", "host", "machine", "pid", "ticks", "token", "beat", "ended"}
    assert content["ticks"] == start_ticks(os.getpid())
    for source in (module, lease_module):
        assert "create_time" not in Path(source.__file__).read_text()
        assert "time.time" not in Path(source.__file__).read_text()


def test_start_ticks_are_those_of_the_kernel():
    with subprocess.Popen(["sleep", "60"]) as child:
        ticks = start_ticks(child.pid)
        assert ticks == round(psutil.Process(child.pid)._proc.create_time(monotonic=True) * os.sysconf("SC_CLK_TCK"))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert start_ticks(child.pid) is None, "a zombie"
    assert start_ticks(child.pid) is None
    assert start_ticks(2**40) is None


def test_a_process_that_the_kernel_hides_is_not_gone(monkeypatch):
    """/proc may be mounted so that it shows only one's own processes."""
    holder = {"machine": module.machine(), "pid": os.getpid(), "ticks": start_ticks(os.getpid())}
    read = Path.read_text

    def hidden(self, *args, **kwargs):
        if self.name == "stat":
            raise FileNotFoundError(self)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", hidden)
    assert not is_gone(holder)
    assert is_gone(holder | {"pid": 2**22 + 1})


EXHAUSTED = """
import os, resource, sys, threading, time
from pathlib import Path
from prometheus_client import CollectorRegistry
from grpo.config import Config
from grpo.observe.health import Health
from grpo.observe.server import serving
from grpo.run.lease import Lease

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
health = Health(Config.model_validate({"model": {"path": "x"}}))
with Lease(Path(sys.argv[1]), 0.9) as lease, serving("127.0.0.1", 0, CollectorRegistry(), health) as port:
    print(port, flush=True)
    held, until = [], None
    for line in sys.stdin:
        if line.strip() == "use up":
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError as error:
                print(error.errno, flush=True)
        if line.strip() == "check":
            beat = lease._count
            time.sleep(0.7)
            lease.check()
            print("holds", lease._count > beat, flush=True)
"""


def test_no_descriptors_and_a_thousand_idle_connections_do_not_end_the_heartbeat(tmp_path):
    command = [sys.executable, "-c", EXHAUSTED, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    clients = []
    with process, ExitStack() as stack:
        stack.callback(process.kill)
        port = int(line(process))
        for _ in range(300):
            clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)))
        process.stdin.write("check\n")
        assert line(process) == "holds True"
        process.stdin.write("use up\n")
        assert line(process) == "24"
        for _ in range(2):  # for longer than lease_seconds
            process.stdin.write("check\n")
            assert line(process) == "holds True"
        with pytest.raises(Fenced), Lease(tmp_path, 0.9):
            pass
        process.stdin.close()
        assert process.wait(30) == 0
    assert attempts(tmp_path)["000001.json"]["ended"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_in_the_place_of_an_attempt_is_named(tmp_path, make):
    (tmp_path / "attempts").mkdir()
    make(tmp_path / "attempts/000001.json")
    with pytest.raises(CheckpointError, match="000001.json.*must be a regular file"), Lease(tmp_path, 0.6):
        pass
    with pytest.raises(CheckpointError, match="must be a regular file"):
        holder_here(tmp_path)


def test_a_disk_that_hangs_does_not_keep_the_check_waiting(tmp_path):
    lease = Lease(tmp_path, 0.4)
    with lease:
        lease._lock.acquire()  # as a heartbeat does that waits for the disk
        with pytest.raises(Fenced, match="waiting for the disk for 0.4 s"):
            lease.check()
        lease._lock.release()


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(1)])
def test_a_heartbeat_survives_whatever_is_raised(tmp_path, monkeypatch, error):
    with Lease(tmp_path, 1.5) as lease, monkeypatch.context() as patch:
        raised = threading.Event()

        def fail(self, ended=False):
            raised.set()
            raise error

        patch.setattr(Lease, "_content", fail)
        assert raised.wait(10)
        patch.undo()
        count, deadline = lease._count, time.monotonic() + 10
        while lease._count <= count + 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lease.check()


def test_nothing_is_committed_once_the_folder_is_given_back(tmp_path):
    with Lease(tmp_path, 5) as lease:
        lease.check()
    with pytest.raises(Fenced, match="attempt 1 does not: it has ended"):
        lease.check()
