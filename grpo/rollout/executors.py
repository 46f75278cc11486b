"""Executors for the engine core that end when the process that started it ends, however it ends.

vLLM's engine core is told to stop by its parent; a parent that is killed tells nothing, and the core stays behind, at
times busy. Linux can signal the death of a parent thread, but the thread that starts an engine may end long before its
process does, and a frozen core could not act on it, so a small process watches both: see `watchdog.py`.
"""

import os

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from grpo.rollout.environment import PARENT, SOCKETS
from grpo.run.watchdog import start_watchdog


class WatchedUniProcExecutor(UniProcExecutor):
    """The worker in the engine core's own process."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


class WatchedMultiprocExecutor(MultiprocExecutor):
    """One process for each worker (tensor parallel)."""

    def _init_executor(self) -> None:
        end_with_parent()
        super()._init_executor()


def end_with_parent() -> None:
    """Lets a watchdog end this process, and what it starts, with the process that is named in the environment."""
    start_watchdog(int(os.environ[PARENT]), os.environ[SOCKETS])
