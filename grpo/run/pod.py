"""What a RayJob runs in the head's pod: fetch, preflight, train, with their lines in every place where somebody looks.

Lines go to standard output (Ray's file of the job), to the container's own standard output (`kubectl logs`) and to
logs/attempt-N.log of the run's folder, which outlives the pod.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from grpo import errors
from grpo.errors import BugError, CheckpointError, GrpoError
from grpo.run.attempts import FOLDER, newest_attempt
from grpo.run.layout import LOGS
from grpo.store.files import open_append

CONTAINER = "/proc/1/fd/1"
"""Standard output of the container's first process."""
BLOCK, KEPT = 1 << 16, 4000
PATIENT_SECONDS = 1.0
"""How long a reader of the container's output may let us wait; what it does not take then is left out there."""
QUIET_SECONDS, LAST_SECONDS = 0.5, 5.0
"""A child that has ended has said all once nothing has come for so long, or then: what it left may hold the pipe."""

Argv = Sequence[str]
Step = tuple[str, Path]
"""A verb, and the file that it takes."""
ONLINE = {"HF_HUB_OFFLINE": "0"}
"""What fetches asks the hub, whatever the pod's other processes may."""


def final(code: int, verb: str) -> bool:
    """Whether a retry would end alike. What preflight did not foresee may have been the moment."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GrpoError)]
    codes = {kind.exit_code for kind in kinds if kind.fatal}
    return code in codes and (verb == "train" or code != BugError.exit_code)


def run_verbs(steps: Sequence[Step], run_dir: Path | None, stop: Callable[[str], object] | None) -> int:
    """Runs `grpo VERB FILE` one after another, until one fails; the exit code of the last.

    An end that would come again is told to `stop`, with the last lines. Signals are left to the children, which get
    their own: whoever stops this process has to hear what they say until they end.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave_to_children)  # not SIG_IGN, which children would inherit
    code = 0
    with Outlets.opened(run_dir) as outlets:
        for verb, file in steps:
            more = ONLINE if verb == "fetch" else {}
            code = follow([sys.executable, "-P", "-m", "grpo", verb, str(file)], outlets, more)
            if code:
                break
        if stop and final(code, verb):
            rule = f"exit code {code}: a retry would end alike, so there is none. The last lines:"
            _tell(outlets, stop, f"{rule}\n{outlets.tail.decode(errors='replace')}")
    return code


def _leave_to_children(_number: int, _frame: object) -> None:
    pass


def _tell(outlets: "Outlets", stop: Callable[[str], object], text: str) -> None:
    try:
        stop(text)
    except Exception as error:  # of Ray's, and whatever it is: the job's own end is what counts
        lost = f"grpo: Ray could not be told to end the job for good ({error}); it may be tried again\n"
        outlets.write(lost.encode())


def follow(argv: Argv, outlets: "Outlets", more: Mapping[str, str] = {}) -> int:
    """Runs a program until it ends, and hands on what it prints; its exit code, 128 + the signal that ended it."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(argv, env={**os.environ, **more}, **streams) as child:  # type: ignore[call-overload]
        assert child.stdout is not None
        pipe, until = child.stdout.fileno(), 0.0
        while not until or time.monotonic() < until:
            if child.poll() is not None:
                until = until or time.monotonic() + LAST_SECONDS
            if select.select([pipe], [], [], QUIET_SECONDS)[0]:
                block = os.read(pipe, BLOCK)
                if not block:
                    break
                outlets.write(block)
            elif until:
                break
        code: int = child.wait()
    return 128 - code if code < 0 else code


class Outlets:
    """Where lines go. One that fails is left out from then on."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = list(descriptors)
        self.tail = b""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, run_dir: Path | None) -> Iterator["Outlets"]:
        """Standard output, the container's, and the file of the run's next attempt; what cannot be opened is said."""
        own = [found for found in (_container(),) if found is not None]
        lost = ""
        if run_dir:
            try:
                own.append(_log_file(run_dir))
            except (OSError, CheckpointError) as error:
                lost = f"grpo: no file of this log in {run_dir / LOGS}: {error}\n"
        outlets = cls([1, *own])
        outlets.write(lost.encode())
        try:
            yield outlets
        finally:
            for descriptor in own:
                os.close(descriptor)

    def write(self, block: bytes) -> None:
        """Hands a block to all."""
        self.tail = (self.tail + block)[-KEPT:]
        for descriptor in list(self._descriptors):
            try:
                _offer(descriptor, block)
            except OSError as error:
                self._descriptors.remove(descriptor)
                self.write(f"grpo: one copy of this log ends here: {error}\n".encode())


def _container() -> int | None:
    """The container's standard output, unless there is none, or it is ours already."""
    try:
        found = os.open(CONTAINER, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.path.sameopenfile(found, 1):
        os.close(found)
        return None
    return found


def _log_file(run_dir: Path) -> int:
    folder = run_dir / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    attempt = newest_attempt(run_dir / FOLDER) + 1  # that which `train` is about to be
    return open_append(folder / f"attempt-{attempt}.log")


def _offer(descriptor: int, block: bytes) -> None:
    """Writes all of it; to a pipe that nobody empties only what it takes in time."""
    end, left = time.monotonic() + PATIENT_SECONDS, memoryview(block)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            wait = end - time.monotonic()
            if wait <= 0 or not select.select([], [descriptor], [], wait)[1]:
                return
