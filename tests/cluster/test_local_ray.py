"""A Ray on this machine: it comes up whatever the shell says, belongs to its user alone, and leaves nothing."""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from grpo.cluster import local_ray as module
from grpo.cluster.local_ray import LocalRay, processes_below_us
from grpo.cluster.session import Session, session
from grpo.errors import ClusterError, ConfigError, DataError, Interrupted
from grpo.interfaces import Call
from grpo.run.stopping import StopRequest
from tests.cluster.actors import SECONDS, make, make_config

HOSTILE = "raise SystemExit('code of the working folder runs in an actor')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with modules that are named as Python's, Ray's and torch's are; its own name is long."""
    made = tmp_path_factory.mktemp("working" + "-folder" * 12)
    for name in ("statistics", "typing_extensions", "torch", "ray", "secrets", "psutil", "attr"):
        (made / f"{name}.py").write_text(HOSTILE)
    (made / "numpy").mkdir()
    (made / "numpy" / "__init__.py").write_text(HOSTILE)
    return made


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[tuple[Session, list[psutil.Process]]]:
    """A session under a hostile shell, and the processes that it started."""
    before = set(processes_below_us())
    with pytest.MonkeyPatch.context() as patch, StopRequest(30) as stop:
        patch.chdir(folder)
        for name, value in {
            "RAY_ADDRESS": "192.0.2.1:6379",
            "RAY_TMPDIR": "/nonexistent",
            "RAY_NAMESPACE": "other",
            "RAY_JOB_CONFIG_JSON_ENV_VAR": "{",
            "TMPDIR": str(folder),
            "PYTHONPATH": f"{folder}:.:",
            "PYTHONOPTIMIZE": "2",
            "OMP_NUM_THREADS": "3",
            "VLLM_USE_V1": "0",
            "RANK": "7",
            "http_proxy": "http://192.0.2.1:9",
            "NO_PROXY": "internal",
            "HF_HUB_OFFLINE": "1",
        }.items():
            patch.setenv(name, value)
        with session(make_config(folder / "run", train={"ranks": 2}), stop) as current:
            make(current)
            yield current, [process for process in processes_below_us() if process not in before]


@pytest.mark.slow
def test_a_local_ray_starts_whatever_the_shell_says(started: tuple[Session, list[psutil.Process]]) -> None:
    current, _ = started
    rank = make(current, 1)
    call: Call[dict[str, object]] = Call(rank, rank._begin("shell"))
    seen = current.workers.get([call], SECONDS, "look")[0]
    environ, path = seen["environ"], seen["path"]
    assert isinstance(environ, dict) and isinstance(path, list)
    assert current.local and not {"RAY_ADDRESS", "PYTHONOPTIMIZE", "VLLM_USE_V1", "RANK"} & set(environ)
    assert environ["OMP_NUM_THREADS"] == "1"  # Ray's, by the CPUs of an actor
    assert environ["HF_HUB_OFFLINE"] == "1" and environ["no_proxy"] == "internal,localhost,127.0.0.1,::1"
    assert environ["TMPDIR"] == current.local.folder.temporary and len(environ["TMPDIR"]) < 32
    assert seen["optimize"] == 0 and seen["encoding"] == "utf-8" and seen["statistics"] == 2.0
    assert os.getcwd() not in path and "" not in path
    assert os.path.realpath(environ["TMPDIR"]) == os.getcwd()  # where the shell wants temporary files, by a short name


@pytest.mark.slow
def test_only_its_user_can_reach_its_sockets(started: tuple[Session, list[psutil.Process]]) -> None:
    current, processes = started
    assert current.local
    home = Path(current.local.folder.path)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700 and home.stat().st_uid == os.getuid()
    sockets = {path for path in home.rglob("*") if path.is_socket()}
    assert {path.name for path in sockets} >= {"raylet", "plasma_store"}
    assert max(len(str(path)) for path in sockets) <= 107
    unix = {c.laddr for process in processes for c in process.net_connections("unix") if c.laddr}
    assert {address for address in unix if "plasma" in address} and all(
        address.startswith((str(home), "\0", "@")) for address in unix
    )


@pytest.mark.slow
def test_it_listens_on_loopback_alone(started: tuple[Session, list[psutil.Process]]) -> None:
    """Of the binaries and the workers; what would serve metrics without a token does not run."""
    tcp = [c.laddr.ip for process in started[1] for c in process.net_connections("tcp") if c.status == "LISTEN"]
    assert len(tcp) > 4 and set(tcp) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_of_its_python_programs_only_workers_start(started: tuple[Session, list[psutil.Process]]) -> None:
    """No dashboard, no monitors, and what the raylet takes for its agents does nothing."""
    _, processes = started
    named = [(process.name(), *map(os.path.basename, process.cmdline()[1:4])) for process in processes]
    others = [rest for name, *rest in named if name not in ("gcs_server", "raylet") and not name.startswith("ray::")]
    assert others == [["-I", "-S", "idle_agent.py"]] * 2


@pytest.mark.slow
def test_its_processes_are_in_no_group_of_ours(started: tuple[Session, list[psutil.Process]]) -> None:
    """A signal to our group is a signal to us alone."""
    _, processes = started
    assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
    assert os.getpgrp() not in {os.getpgid(process.pid) for process in processes}
    assert os.getsid(0) not in {os.getsid(process.pid) for process in processes}


@pytest.mark.slow
def test_the_logs_of_a_session_that_failed_are_kept_and_its_folder_is_not(tmp_path: Path) -> None:
    with StopRequest(30) as stop, pytest.raises(DataError), session(make_config(tmp_path), stop) as current:
        assert current.local
        path = current.local.folder.path
        raise DataError("row 3")
    assert not os.path.exists(path)
    assert len(list(tmp_path.glob("logs/session_*/raylet.out"))) == 1


class BusyRay:
    """ray.init on a machine that is too busy `failures` times; then it is as if there were a cluster."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def init(self, **_: object) -> None:
        self.calls += 1
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does
        if self.calls <= self.failures:
            raise Exception("The current node timed out during startup.\nIt may be busy")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(module.ray_private, "read_settings", lambda: None)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("failures", "seconds"), [(2, 900), (99, 0.01)])
def test_one_that_does_not_come_up_is_started_again_within_the_deadline(
    quick: pytest.MonkeyPatch, tmp_path: Path, failures: int, seconds: float
) -> None:
    busy, said = BusyRay(failures), list[str]()
    quick.setattr(module.ray, "init", busy.init)
    with StopRequest(30) as stop:
        local = LocalRay(make_config(tmp_path, deadlines={"start": seconds}), stop, said.append)
        if failures > 9:
            with pytest.raises(ClusterError, match="deadlines.start = 0.01 s, but: The .* busy; the machine"):
                local.start()
        else:
            local.start()
            why = "The current node timed out during startup. It may be busy"
            assert said == [f"Ray did not come up on this machine ({why}); once more"] * 2 and busy.calls == 3
        path = local.folder.path
        local.end(failed=False)
    assert not os.path.exists(path)


def test_packages_that_ray_cannot_import_are_told_at_once(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its daemons would end without a word, and it would be started again until the deadline."""
    (tmp_path / "google.py").write_text("raise ImportError('an older release lies in front')")
    quick.setattr(module.ray, "init", BusyRay(99).init)
    quick.setattr(module.shell, "environment", lambda *_: {**os.environ, "PYTHONSAFEPATH": "1"})
    quick.setattr(module.PrivateFolder, "modules", str(tmp_path), raising=False)
    with StopRequest(30) as stop:
        local = LocalRay(make_config(tmp_path / "run", deadlines={"start": 900}), stop, lambda _: None)
        with pytest.raises(ConfigError, match="Ray's own .* ImportError: an older release lies in front; install"):
            local.start()
        local.end(failed=False)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "raise TypeError('Descriptors cannot be created.\\nMore: https://x')",
            "TypeError: Descriptors cannot be created.",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ""),  # no memory
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)", ""),  # Ctrl-C for all
        ("raise MemoryError()", ""),
        ("raise OSError(24, 'Too many open files')", ""),
        ("pass", ""),
    ],
)
def test_only_what_would_come_again_is_a_broken_import(
    code: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "daemon.py").write_text(code)
    monkeypatch.setattr(module.ray_private, "PROGRAMS", ("daemon",))
    assert module.broken_imports(os.environ | {"PYTHONPATH": str(tmp_path)}) == told


def test_a_stop_while_imports_are_tried_is_heard(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "daemon.py").write_text(
        "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(50)"
    )
    quick.setattr(module.ray_private, "PROGRAMS", ("daemon",))
    quick.setattr(module.ray, "init", BusyRay(99).init)
    quick.setattr(module.PrivateFolder, "modules", str(tmp_path), raising=False)
    with StopRequest(30) as stop:
        local = LocalRay(make_config(tmp_path / "run"), stop, lambda _: None)
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            local.start()
        local.end(failed=False)
    assert not [process for process in processes_below_us() if "import daemon" in process.cmdline()]


def test_no_room_for_a_process_is_no_broken_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.broken_imports({}) == ""


def test_a_stop_while_ray_starts_is_heard(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def init(**_: object) -> None:
        raise SystemExit(15)

    quick.setattr(module.ray, "init", init)
    with StopRequest(30) as stop, pytest.raises(Interrupted, match="^stopped by SIGTERM$"):
        LocalRay(make_config(tmp_path), stop).start()


def test_a_stop_between_two_starts_is_heard(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick.setattr(module.ray, "init", BusyRay(99).init)
    with StopRequest(30) as stop, pytest.raises(Interrupted, match="SIGHUP"):
        LocalRay(make_config(tmp_path), stop, lambda _: os.kill(os.getpid(), signal.SIGHUP)).start()
