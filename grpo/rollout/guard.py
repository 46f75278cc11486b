"""Executors for the engine core that end when the process that started it ends, however it ends.

vLLM's engine core is told to stop by its parent; a parent that is killed tells nothing, and the core stays behind, at
times busy. Linux can signal the death of a parent thread, but the thread that starts an engine may end long before its
process does, so a thread of the core looks at the parent's pid instead.
"""

import os
import signal
import threading
import time

import psutil
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from grpo.rollout.environment import PARENT

POLL_SECONDS = 0.2  # a forked core also keeps Ray's sockets open: Ray sees its actor's death when both are gone


class GuardedUniProcExecutor(UniProcExecutor):
    """The worker in the engine core's own process."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


class GuardedMultiprocExecutor(MultiprocExecutor):
    """One process for each worker (tensor parallel); vLLM's workers watch the engine core themselves."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


def end_with_parent() -> None:
    """Kills this process and its children within a second of the death of the process named in the environment."""
    parent = int(os.environ[PARENT])
    threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os.kill(os.getpid(), signal.SIGKILL)
