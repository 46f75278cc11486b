"""The parent's side of one worker process, which runs the user's reward functions; `sandbox/` is the other side."""

import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import RewardCode
from grpo.rewards.messages import LONGEST, Messages, wait_for
from grpo.rewards.sandbox.landlock import SCRATCH
from grpo.rewards.sandbox.supervisor import DONE, READY
from grpo.rewards.sandbox.usage import remove
from grpo.rewards.sandbox.worker import FENCES

KINDS = ("exception", "timeout", "exited", "memory", "bad_value", "bad_reply", "processes", "disk")
SERVICE_KINDS = ("connection", "status")
"""Of failed calls; the latter of services alone. The first, memory and bad_value are what the worker itself reports."""
LONGEST_REASON = 500
GRACE_SECONDS = 5.0
SETTLE_SECONDS = 30.0
"""For the keeper to say that a call has left nothing; it has the time of a busy machine."""
BOOT = """import sys
from importlib.util import module_from_spec, spec_from_file_location
root = sys.argv[1]
spec = spec_from_file_location("grpo", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["grpo"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["grpo"])
from grpo.rewards.sandbox.landlock import SCRATCH
from grpo.rewards.sandbox.supervisor import main
main()"""
"""Runs the other half of this very package, wherever it lies, and looks for all else only where Python's own lies."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call without a reward. `outside`: something else than the function may be the cause, so it is worth a retry."""

    kind: str
    what: str
    outside: bool = False


FORGED = Failure("bad_reply", "wrote into the pipe of the reward process", outside=True)


class Broken(Exception):
    """The worker cannot be used any more."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.what)
        self.failure = failure


class RewardProcess:
    """One worker that imports `functions` ("module:function") and calls them one at a time.

    After a failure that `alive` does not survive, close it and start another. All waits end at the given time of the
    monotonic clock.
    """

    def __init__(self, functions: Sequence[str], reward_code: RewardCode) -> None:
        """Starts the process; `wait` for its imports."""
        self.functions = tuple(functions)
        self.seconds = reward_code.seconds
        self.alive = True
        self.ready = False
        self.isolation = reward_code.isolation
        self.pid: int | None = None
        self.missing: tuple[str, ...] = ()
        self.scratch = tempfile.mkdtemp(prefix=SCRATCH)
        requests, self._requests = os.pipe()
        answers, replies = os.pipe()
        self._answers = Messages(answers)
        os.set_blocking(self._requests, False)
        named = filter(None, (reward_code.folder, *reward_code.readable))
        readable = [str(Path(path).expanduser().resolve()) for path in named]
        settings = {
            "functions": self.functions,
            "path": module_path(),
            "folder": readable[0] if reward_code.folder else None,
            "readable": readable,
            "scratch": self.scratch,
            "memory_bytes": int(reward_code.memory_gib * 2**30),
            "environment": {name: os.environ[name] for name in reward_code.environment if name in os.environ},
            "isolation": reward_code.isolation,
            "network": reward_code.network,
            "requests": requests,
            "replies": replies,
        }
        self._supervisor = subprocess.Popen(
            [sys.executable, "-P", "-c", BOOT, str(Path(__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(self.scratch),
            pass_fds=(requests, replies),
            start_new_session=True,
        )
        os.close(requests)
        os.close(replies)
        assert self._supervisor.stdin and self._supervisor.stdout
        self._status = Messages(self._supervisor.stdout.fileno())
        with suppress(BrokenPipeError):
            self._supervisor.stdin.write(json.dumps(settings).encode() + b"\n")
            self._supervisor.stdin.flush()

    def wait(self, end: float) -> str | None:
        """Until the functions are imported; what is wrong with one of them, or None.

        Raises TimeoutError, or Broken if the process has ended; close it then.
        """
        self.pid = self._status.read(end).get("pid")
        self.missing = tuple(map(str, self._read(end).get("missing", ())))
        if self.missing and self.isolation != "none":
            lacking = "; ".join(FENCES.get(name, name) for name in self.missing)
            return (
                f"reward code runs behind the whole fence or not at all, but this system lacks {lacking}; run it on "
                "one that has it, or set reward_code.isolation: none to let it read and change whatever this run may"
            )
        error = self._read(end).get("error")
        if error:
            return printable(str(error), 4 * LONGEST_REASON)
        if not self._settled(READY):
            raise Broken(Failure("exited", "ended the reward process", outside=True))
        self.ready = True
        return None

    def call(self, function: int, prompt: str, completion: str, answer: str, end: float) -> float | Failure:
        """The finite number that the function returns, or how it failed."""
        if not self.alive:
            return Failure("exited", "was closed")
        number = secrets.token_hex(8)  # user code that writes into the pipe cannot know it in advance
        request = {"id": number, "function": function, "prompt": prompt, "completion": completion, "answer": answer}
        try:
            if self._answers.waiting():
                raise Broken(FORGED)
            self._write(json.dumps(request).encode() + b"\n", end)
            outcome = judged(self._read(end), number)
            self._settled(DONE)
            return outcome
        except TimeoutError:
            frozen = self._state() in ("T", "t")
            self.close()
            return Failure("timeout", f"took longer than reward_code.seconds = {self.seconds:g} s", outside=frozen)
        except Broken as broken:
            self.close()
            return broken.failure

    def kill(self) -> None:
        """Ends the processes, from any thread; whoever waits for a reply learns it."""
        assert self._supervisor.stdin
        with suppress(BrokenPipeError):
            self._supervisor.stdin.close()  # the supervisor then kills the worker's whole group, and ends

    def close(self) -> None:
        """Ends the worker and everything that it started; for the thread that uses it."""
        if not self.alive:
            return
        self.alive = self.ready = False
        self.kill()
        assert self._supervisor.stdout
        try:
            self._supervisor.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        with suppress(ProcessLookupError):  # only if the supervisor was killed or frozen
            if self.pid and self._supervisor.returncode != 0:
                os.killpg(self.pid, signal.SIGKILL)
        self._supervisor.stdout.close()
        os.close(self._requests)
        os.close(self._answers.fd)
        if os.path.lexists(self.scratch) and not remove(self.scratch):
            print(f"warning: {self.scratch} of reward code cannot be removed", file=sys.stderr)

    def _read(self, end: float) -> dict[str, Any]:
        try:
            return self._answers.read(end)
        except EOFError:
            raise Broken(self._how_it_ended()) from None
        except ValueError:
            raise Broken(FORGED) from None

    def _write(self, data: bytes, end: float) -> None:
        while data:
            wait_for(self._requests, select.POLLOUT, end)
            try:
                data = data[os.write(self._requests, data[:LONGEST]) :]
            except BrokenPipeError:
                raise Broken(self._how_it_ended()) from None
            except BlockingIOError:
                continue

    def _how_it_ended(self) -> Failure:
        """What the supervisor says of a worker whose pipe has ended."""
        with suppress(TimeoutError, EOFError):
            ended = self._status.read(time.monotonic() + GRACE_SECONDS)
            return Failure(ended["ended"], ended["what"], outside=ended["ended"] == "exited")
        return Failure("exited", "ended the reward process", outside=True)

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def _settled(self, letter: bytes) -> bool:
        """Whether the keeper finds the worker as the imports left it; one that is not is closed and replaced."""
        assert self._supervisor.stdin
        fine = False
        with suppress(BrokenPipeError, ValueError, EOFError, TimeoutError):  # ended, or closed by `kill`
            self._supervisor.stdin.write(letter)
            self._supervisor.stdin.flush()
            fine = self._status.read(time.monotonic() + SETTLE_SECONDS).get("clean") is True
        if not fine:
            self.close()
        return fine


def judged(reply: dict[str, Any], number: str) -> float | Failure:
    """Takes nothing that is not exactly a reply to this request. Raises Broken."""
    reward, kind = reply.get("reward"), reply.get("kind")
    if reply.get("id") == number:
        if type(reward) is float and math.isfinite(reward):
            return reward
        if kind in ("exception", "memory", "bad_value"):
            return Failure(kind, printable(str(reply.get("error")), LONGEST_REASON))
    raise Broken(FORGED)


def clean_environment(scratch: str) -> dict[str, str]:
    """All that the keeper gets; the worker adds `reward_code.environment`. The seed makes all go through sets alike."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {"HOME": scratch, "TMPDIR": scratch, "PYTHONHASHSEED": "0"}


def module_path() -> list[str]:
    """Where the worker looks for modules: as this process, and in PYTHONPATH, which this one may not heed."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(entry) for entry in [*sys.path, *filter(None, named)]]


def printable(text: str, longest: int) -> str:
    """One line without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)[:longest]
