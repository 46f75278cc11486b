"""What a RayJob runs: its lines reach every place where somebody looks, and an end that would come again is told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.run import pod
from grpo.run.pod import Outlets, final, follow, run_verbs

ROOT = Path(__file__).parents[2]
SAY = 'import sys; print("out"); print("err", file=sys.stderr); sys.exit(int(sys.argv[1]))'


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The reading end of a pipe that stands for the container's output."""
    reading, writing = os.pipe()
    monkeypatch.setattr(pod, "CONTAINER", f"/proc/self/fd/{writing}")
    os.set_blocking(reading, False)
    yield reading
    os.close(reading)
    os.close(writing)


@pytest.fixture
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`python -m grpo VERB` is a program that says its verb and ends with the code in the file named so."""
    real = pod.follow
    program = [sys.executable, "-c", PROGRAM]
    monkeypatch.setattr(pod, "follow", lambda argv, outlets, more: real([*program, *argv[4:]], outlets, more))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # as they are after the test
        monkeypatch.setattr(signal, "signal", lambda number, handler: handled.append(number))
    handled: list[int] = []
    return tmp_path


def steps(folder: Path, *verbs: str) -> list[tuple[str, Path]]:
    return [(verb, folder / "run.yaml") for verb in verbs]


PROGRAM = """
import os, sys, pathlib
verb, run_file = sys.argv[1:]
print(verb, "runs", *[os.environ.get("HF_HUB_OFFLINE")] * (verb == "fetch"))
code = pathlib.Path(run_file).with_name(verb)
sys.exit(int(code.read_text()) if code.exists() else 0)
"""


def drained(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return b""


def test_lines_go_to_the_screen_the_container_and_the_runs_folder(
    tmp_path: Path, container: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with Outlets.opened(tmp_path / "run") as outlets:
        assert follow([sys.executable, "-u", "-c", SAY, "3"], outlets) == 3
    said = "out\nerr\n"
    assert capfd.readouterr().out == said == drained(container).decode()
    assert (tmp_path / "run/logs/attempt-1.log").read_text() == said == outlets.tail.decode()


def test_the_file_is_of_the_next_attempt_and_starts_that_ended_before_it_are_kept(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts/000004.json").write_text("{}")
    for code in ("2", "0"):
        with Outlets.opened(tmp_path) as outlets:
            follow([sys.executable, "-u", "-c", SAY, code], outlets)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["attempt-5.log"]
    assert (tmp_path / "logs/attempt-5.log").read_text() == "out\nerr\n" * 2


def test_a_container_whose_output_nobody_reads_holds_nothing_up(
    tmp_path: Path, container: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pod, "PATIENT_SECONDS", 0.01)
    with Outlets.opened(tmp_path) as outlets:
        assert follow([sys.executable, "-c", "print('x' * 999_999)"], outlets) == 0
    assert len(capfd.readouterr().out) == 1_000_000 == (tmp_path / "logs/attempt-1.log").stat().st_size


def test_what_cannot_be_written_is_said_and_the_rest_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod, "CONTAINER", str(tmp_path / "none"))
    (tmp_path / "logs").write_text("no folder")
    with Outlets.opened(tmp_path) as outlets:
        assert follow([sys.executable, "-u", "-c", SAY, "0"], outlets) == 0
    first, *others = capfd.readouterr().out.splitlines()
    assert first.startswith(f"grpo: no file of this log in {tmp_path / 'logs'}:") and others == ["out", "err"]
    with open("/dev/full", "wb", buffering=0) as full:
        outlets = Outlets([full.fileno(), 1])
        outlets.write(b"kept\n")
        outlets.write(b"more\n")
    said = capfd.readouterr().out
    assert "one copy of this log ends here" in said and said.endswith("more\n") and "kept\n" in said


def test_a_process_that_holds_the_pipe_open_is_not_waited_for(tmp_path: Path) -> None:
    left = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    began = time.monotonic()
    outlets = Outlets([])
    assert follow([sys.executable, "-c", left], outlets) == 0
    os.kill(int(outlets.tail), signal.SIGKILL)
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("code, told", [(0, False), (2, True), (5, True), (10, False), (11, False), (13, False)])
def test_an_end_that_would_come_again_is_told_once(verbs: Path, code: int, told: bool) -> None:
    (verbs / "train").write_text(str(code))
    stopped: list[str] = []
    assert run_verbs(steps(verbs, "preflight", "train"), verbs, stopped.append) == code
    assert (verbs / "logs/attempt-1.log").read_text() == "preflight runs\ntrain runs\n"
    assert bool(stopped) == told
    assert not told or (f"exit code {code}: " in stopped[0] and stopped[0].endswith("train runs\n"))


def test_what_is_fetched_comes_first_and_asks_the_hub(verbs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_verbs(steps(verbs, "fetch", "train"), verbs, None) == 0
    assert (verbs / "logs/attempt-1.log").read_text() == "fetch runs 0\ntrain runs\n"


def test_a_failed_preflight_starts_no_training(verbs: Path) -> None:
    (verbs / "preflight").write_text("2")
    stopped: list[str] = []
    assert run_verbs(steps(verbs, "preflight", "train"), verbs, stopped.append) == 2
    assert (verbs / "logs/attempt-1.log").read_text() == "preflight runs\n" and len(stopped) == 1


def test_a_ray_that_cannot_be_told_changes_no_exit_code(verbs: Path) -> None:
    (verbs / "train").write_text("4")

    def lost(_: str) -> None:
        raise RuntimeError("no head")

    assert run_verbs(steps(verbs, "train"), verbs, lost) == 4
    assert "could not be told to end the job for good (no head)" in (verbs / "logs/attempt-1.log").read_text()
    assert run_verbs(steps(verbs, "train"), None, None) == 4


def test_which_ends_are_final() -> None:
    assert [code for code in range(20) if final(code, "train")] == [1, 2, 3, 4, 5, 6, 7, 8, 14, 15]
    assert [code for code in range(20) if final(code, "preflight")] == [2, 3, 4, 5, 6, 7, 8, 14, 15]
    assert not final(137, "train")


def test_a_signal_is_left_to_the_child_whose_last_words_are_heard(tmp_path: Path) -> None:
    child = """
import signal, sys, time
def end(*_):
    print("committed", flush=True)
    sys.exit(11)
signal.signal(signal.SIGTERM, end)
print("runs", flush=True)
time.sleep(60)
"""
    program = f"""
import sys
from pathlib import Path
from grpo.run import pod
real = pod.follow
pod.follow = lambda argv, outlets, more: real([sys.executable, "-c", {child!r}], outlets)
sys.exit(pod.run_verbs([("train", Path("run.yaml"))], Path(sys.argv[1]), None))
"""
    argv = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "runs\n"
        os.killpg(process.pid, signal.SIGTERM)  # as Ray does, to each process of the job
        assert process.stdout.read() == "committed\n"
    assert process.returncode == 11
    assert (tmp_path / "logs/attempt-1.log").read_text() == "runs\ncommitted\n"
