"""A screen that goes away: what is printed then is dropped, in every way in which it can go."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TELL = """
import sys, os
from grpo.run import screen
out, err = screen.install()
from rich.console import Console
for number in range(3000):
    print("line", number, "\\u00d7")
    Console().print("rich")
    print("error", file=sys.stderr)
    sys.stderr.flush()
sys.stdout.flush()
os.write(1, b"native")
open(sys.argv[1], "w").write(f"{out.lost and out.lost.strerror} {err.lost and err.lost.strerror}")
"""


def told(tmp_path: Path, **streams: object) -> tuple[int, str]:
    """Exit code, and how the streams were lost."""
    result = tmp_path / "told"
    process = subprocess.Popen([sys.executable, "-c", TELL, str(result)], cwd=ROOT, **streams)  # type: ignore[call-overload]
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.read(10)
            stream.close()
    return process.wait(timeout=120), result.read_text() if result.exists() else "died"


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    assert told(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) == (0, "Broken pipe Broken pipe")


def test_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert told(tmp_path, stdout=full, stderr=subprocess.DEVNULL) == (0, "No space left on device None")


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TELL, str(tmp_path / "t")], cwd=ROOT, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "t").read_text() == "Input/output error Input/output error"


def test_a_reader_that_is_slow_gets_everything(tmp_path: Path) -> None:
    """Also where somebody has made the pipe one that does not wait."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    process = subprocess.Popen([sys.executable, "-c", TELL, str(tmp_path / "t")], cwd=ROOT, stdout=write, stderr=2)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        text = stream.read().decode()
    assert process.wait(timeout=120) == 0 and text.count("\u00d7") == 3000 and text.endswith("native")


GRPO = [sys.executable, "-m", "grpo"]


@pytest.mark.parametrize("verb", [["config", "schema"], ["--help"], ["train", "--help"]])
def test_a_verb_ends_quietly_when_its_reader_does(verb: list[str]) -> None:
    process = subprocess.Popen([*GRPO, *verb], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=120)) == (b"", 0)


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">/dev/full", 1, "error: standard output: No space left on device; what was printed is not whole\n"),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_what_is_printed_for_its_own_sake_and_lost_is_an_error(redirection: str, code: int, error: str) -> None:
    line = f'"{sys.executable}" -m grpo config schema {redirection}'
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, error)


def test_a_file_is_never_opened_as_the_screen(tmp_path: Path) -> None:
    """With the standard streams closed, the next file would get their numbers, and what is printed."""
    program = (
        "from grpo.__main__ import keep_screen_numbers as keep; keep(); import os, sys; f = open(sys.argv[1], 'w')"
    )
    program += "; f.write(str(f.fileno()))"
    line = f'"{sys.executable}" -c "{program}" "{tmp_path}/file" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", line], cwd=ROOT, check=True, timeout=60)
    assert int((tmp_path / "file").read_text()) > 2
