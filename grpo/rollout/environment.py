"""Environment variables that torch, OpenMP and vLLM read when they load: set before, or not at all."""

import ctypes
import math
import os
import sys
import tempfile
from pathlib import Path

from grpo.config import Config

PARENT = "GRPO_ENGINE_PARENT"
"""Pid of the process whose death ends the engine core."""

SOCKETS = "VLLM_RPC_BASE_PATH"
"""Folder of the sockets between an engine's processes; they keep their names when nobody closes them."""

SHARES_GPU = "GRPO_ENGINE_SHARES_GPU"
"""Set where the engine has a GPU not for itself."""

FORBIDDEN = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE")
"""Of vLLM's variables those that let others run code in an engine, by pickle or by routes for developers. Whatever the
user's environment says, an engine here starts without them."""

NOT_INITIALIZED = 3
"""What CUDA's driver answers before its first use in a process (CUDA_ERROR_NOT_INITIALIZED)."""

SPIN_COUNT = "10000"
"""Turns that an OpenMP thread waits awake. Engines and trainer take turns on the same cores, so one that spins for long
takes them from the other; one that sleeps at once is woken late for the next of many small operations."""

COMPILED_SHAPES = "256"
"""Shapes whose compiled code oneDNN keeps. Its 1024 take over 0.5 GB, and most never come again; a step has fewer."""


def prepare_environment(config: Config, device: str, together: int = 1) -> None:
    """Makes vLLM quiet; on the CPU also takes one process less, no compiler, and threads that soon sleep when idle.

    `together` engines share the cores.
    """
    os.environ[PARENT] = str(os.getpid())
    os.environ[SOCKETS] = tempfile.mkdtemp(prefix="grpo-")  # removed by the engine's watchdog
    for opens_a_door in FORBIDDEN:
        os.environ.pop(opens_a_door, None)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_PLUGINS"] = ""  # nothing that happens to be installed may change the engine
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if device != "cpu":
        keep_what_is_compiled()
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # before torch looks for GPUs: else it uses CUDA
        # It cannot tell logprobs of what was sampled, and is compiled anew where a start finds no cache.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        shares = config.rollout.engines_per_gpu > 1 or (config.rollout.gpus_per_engine or 1.0) < 1.0
        if shares or config.cluster.colocate:
            os.environ[SHARES_GPU] = "1"
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the CPU build moves its worker into a third process
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # the CPU build compiles even when told to run eagerly
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # binding would keep a core free for every worker
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", COMPILED_SHAPES)
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"  # its threads spin at a barrier; a batch gives them enough to do anyway
    os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // together))


def keep_what_is_compiled() -> None:
    """Beside what torch compiles, where the user says that it stays: vLLM's own cache and Triton's kernels."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ.setdefault("VLLM_CACHE_ROOT", os.path.join(folder, "vllm"))
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(folder, "triton"))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, within the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))


def may_fork() -> bool:
    """Whether the engine core may be a fork of this process, which spares it the import of vLLM (12 s of one core).

    Never when torch is loaded already: its OpenMP threads do not survive a fork.
    """
    return "torch" not in sys.modules


def why_no_fork() -> str:
    """What in this process forbids a fork that uses CUDA: something has asked CUDA's driver for anything; or ""."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"CUDA's driver cannot be asked ({error})"
    answer = int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())))
    return "" if answer == NOT_INITIALIZED else f"CUDA was used before (its driver answers {answer})"
