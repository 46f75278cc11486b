"""The parent's side of the killable process that runs the user's reward functions; `worker.py` is the child."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError, DeadlineExceeded, RewardError

LONGEST_REPLY = 65_536
"""Longest line that is read from the child, in characters."""


class RewardProcess:
    """One child that imports `functions` ("module:function") and calls them one at a time.

    Every use happens inside `deadline`, which kills the child and all it started: then nothing is left to wait for.
    """

    def __init__(self, functions: Sequence[str], seconds: float) -> None:
        """Raises ConfigError if a function cannot be used, DeadlineExceeded if the import takes over `seconds`."""
        self.functions = tuple(functions)
        self.seconds = seconds
        self.expired = self.killed = False
        path = [entry or os.getcwd() for entry in sys.path]  # the child finds the same modules as this process
        self.child = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )
        try:
            with self.deadline():
                error = self._ask({"functions": self.functions}).get("error")
            if error:
                raise ConfigError(f"rewards: {error}")
        except BaseException:
            self.close()
            raise

    def call(self, function: int, prompt: str, completion: str, answer: str) -> float:
        """Raises RewardError with what the function did instead of returning a finite number."""
        request = {"function": function, "prompt": prompt, "completion": completion, "answer": answer}
        reply = self._ask(request)
        reward = reply.get("reward")
        if not isinstance(reward, float):
            raise RewardError(str(reply.get("error", "sent no reward")))
        return reward

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Kills the child when the body takes over `seconds`; raises DeadlineExceeded in place of what that caused."""
        timer = threading.Timer(self.seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RewardError:
            if not self.expired:
                raise
        finally:
            timer.cancel()
        if self.expired:
            raise DeadlineExceeded(
                f"rewards must be done within deadlines.reward = {self.seconds:g} s, but {', '.join(self.functions)} "
                "took longer and was killed; make it faster or raise deadlines.reward"
            )

    def close(self) -> None:
        """Ends the child and everything that it started."""
        self._kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            with suppress(BrokenPipeError):  # an unsent request is of no use to a dead child
                if pipe:
                    pipe.close()

    @property
    def alive(self) -> bool:
        return not self.killed and self.child.poll() is None

    def _expire(self) -> None:
        self.expired = True
        self._kill()

    def _kill(self) -> None:
        self.killed = True
        with suppress(ProcessLookupError):  # it has ended by itself, and nothing of its group is left
            os.killpg(self.child.pid, signal.SIGKILL)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.child.stdin and self.child.stdout
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline(LONGEST_REPLY)
        except BrokenPipeError:
            line = ""
        if not line:
            raise RewardError(f"ended the reward process (exit code {self.child.wait()})")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            self._kill()  # what else is in the pipe must not pass for the next reward
            raise RewardError("wrote into the pipe of the reward process")
        return reply
