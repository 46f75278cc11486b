"""What must be done on the node of a process: read its stacks, end it and all below it."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grpo.cluster.nodes import CONNECT_SECONDS, is_reachable
from grpo.run.memory import limit_in_words, oom_kills

STACK_SECONDS = 5.0
PATIENCE_SECONDS = 1.0
END_SECONDS = 5.0
REMOTE_SECONDS = 30.0  # a node may have to start a worker first

R = TypeVar("R")


def stacks(pids: Sequence[int]) -> str:
    """The Python stacks of processes of this machine, also of stopped ones; what went wrong where there are none."""
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    texts = []
    for pid in pids:
        command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
        try:
            dump = subprocess.run(command, capture_output=True, text=True, timeout=STACK_SECONDS)
            texts.append(dump.stdout if dump.returncode == 0 else f"pid {pid}: no stacks: {dump.stderr.strip()}")
        except (OSError, subprocess.TimeoutExpired) as error:
            texts.append(f"pid {pid}: no stacks: {error}")
    return "\n".join(texts)


def end(pids: Sequence[int]) -> list[int]:
    """Ends processes of this machine and all below them; the pids that are still there after a while.

    What goes by itself within a moment is left to: Ray calls a worker that it was told to end no accident.
    """
    doomed: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            doomed += [process, *process.children(recursive=True)]
    for process in psutil.wait_procs(doomed, timeout=PATIENCE_SECONDS)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return [process.pid for process in psutil.wait_procs(doomed, timeout=END_SECONDS)[1]]


def memory(pids: Sequence[int]) -> tuple[int, str]:
    """How many processes the kernel has killed here for want of memory, and the limit."""
    return oom_kills(), limit_in_words()


def on_node(node_id: str, function: Callable[[Sequence[int]], R], pids: Sequence[int]) -> R | None:
    """`function(pids)` on a node: in this process if it is ours, else as a task there. None if the node is gone."""
    if node_id == ray.get_runtime_context().get_node_id():
        return function(pids)
    if not is_reachable(node_id, CONNECT_SECONDS):
        return None
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=affinity)
    try:
        result: R = ray.get(task.remote(list(pids)), timeout=REMOTE_SECONDS)
        return result
    except RayError:
        return None
