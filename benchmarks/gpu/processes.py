"""Programs that are measured: started, watched within a deadline, ended with all that they have started."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl."""
LOOK_SECONDS = 0.2
END_SECONDS = 20.0
TAIL_LINES = 40


class Failed(Exception):
    """A program ended, was not ready in time, or said what it must not say."""


def adopt() -> None:
    """What loses its parent becomes a child of this process, so that nothing is left of a program that was ended."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


class Program:
    """One program and its log."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str], folder: Path | None = None
    ) -> None:
        self.log, self.name = log, log.stem
        self.began = time.monotonic()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )

    def wait(self, done: Callable[[], bool], until: float) -> None:
        """Until `done()`. Raises Failed if the program ends before, or at the time `until` (monotonic seconds)."""
        while not done():
            code = self.process.poll()
            if code is not None:
                if done():
                    return
                raise Failed(f"{self.name} ended with exit code {code}")
            if time.monotonic() > until:
                raise Failed(f"{self.name} was not ready after {time.monotonic() - self.began:.0f} s")
            time.sleep(LOOK_SECONDS)

    def end(self) -> None:
        """Kills it and all that it has started."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(children, timeout=END_SECONDS)

    def wait_for_end(self, until: float) -> None:
        """Raises Failed unless it ends by itself, and well."""
        self.wait(lambda: self.process.poll() == 0, until)


def end_all(spared: Sequence[int] = ()) -> None:
    """Kills all that this process and its children have started, but for those pids. See `adopt`."""
    began = time.monotonic()
    while time.monotonic() - began < END_SECONDS:
        children = [child for child in psutil.Process().children(recursive=True) if child.pid not in spared]
        if not children:
            return
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
        psutil.wait_procs(children, timeout=1.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that were adopted
                pass


def tail_of(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, none of them endless."""
    if not log.exists():
        return ""
    found = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(line[:400] for line in found[-lines:])
