"""Environment variables that torch, OpenMP and vLLM read when they load: set before, or not at all."""

import os
import sys

from grpo.config import Config

PARENT = "GRPO_ENGINE_PARENT"
"""Pid of the process whose death ends the engine core."""


def prepare_environment(config: Config, device: str) -> None:
    """Makes vLLM quiet; on the CPU also takes one process less, no compiler, and threads that sleep when idle."""
    os.environ[PARENT] = str(os.getpid())
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_PLUGINS"] = ""  # nothing that happens to be installed may change the engine
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if device != "cpu":
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the CPU build moves its worker into a third process
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # the CPU build compiles even when told to run eagerly
    # Engines and trainer take turns on the same cores: an idle thread that spins would take them from the other.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // config.rollout.engines))


def may_fork(device: str) -> bool:
    """Whether the engine core may be a fork of this process, which spares it the import of vLLM (12 s of one core).

    Never on CUDA. Never when torch is loaded already: its OpenMP threads do not survive a fork.
    """
    return device == "cpu" and "torch" not in sys.modules
