"""What a user is told of a failure: the phase, the cause, the numbers, the key that helps; and what is tried again."""

import errno
import re
from dataclasses import replace

import pytest

from grpo.config import Config
from grpo.errors import (
    BugError,
    ClusterError,
    ConfigError,
    DataError,
    DiskError,
    EngineLost,
    GrpoError,
    OutOfMemory,
    TrainerLost,
)
from grpo.run.advice import Where, typed
from grpo.run.failures import Kind, look
from tests.run.test_failures import CUDA, OutOfMemoryError

KV = (
    "To serve at least one request with the model's max seq len (2048), (4.0 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (1.5 GiB). Based on the available memory, the estimated maximum model length "
    "is 768. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend)."
)
TAKEN = (
    "Free memory on device cuda:0 (9.5/79.1 GiB) on startup is less than desired GPU memory utilization (0.9, 71.2 "
    "GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 99"
)


def where(role: str, verb: str, device: str = "cuda", **sections: object) -> Where:
    return Where(Config.model_validate({"model": {"path": "/model"}} | sections), role, 1, verb, device)


def told(error: BaseException, at: Where) -> GrpoError:
    return typed(look(error), at, "run/errors/x.txt")


@pytest.mark.parametrize(
    ("error", "at", "words"),
    [
        (
            OutOfMemoryError(CUDA),
            where("trainer", "step"),
            "train: trainer rank 1 is out of memory on its GPU: .*Tried to allocate 2.00 GiB.*capacity of 79.10 GiB .*"
            "1.20 GiB is free.*; traceback: run/errors/x.txt; lower train.tokens_per_micro_batch .now auto: give a "
            r"number below the one that the start told.*, set train.gradient_checkpointing: true, "
            r"raise train.zero_stage \(now 1\) or train.ranks$",
        ),
        (
            OutOfMemoryError(CUDA),
            where(
                "trainer",
                "step",
                train={
                    "gradient_checkpointing": True,
                    "zero_stage": 3,
                    "gpus_per_rank": 0.5,
                    "tokens_per_micro_batch": 2048,
                },
            ),
            r"; lower model.max_length \(now 2048\) and train.tokens_per_micro_batch \(now 2048\), lower "
            r"rollout.memory_utilization \(now 0.9\), whose engine shares the GPU$",
        ),
        (OutOfMemoryError(CUDA), where("trainer", "start"), "; raise train.zero_stage .*bfloat16.*as a number"),
        (OutOfMemoryError(CUDA), where("trainer", "save"), "^save: trainer rank 1 is out of memory on its GPU"),
        (
            OutOfMemoryError(CUDA),
            where("rollout", "generate"),
            r"^rollout: engine 1 .*; lower rollout.memory_utilization",
        ),
        (OutOfMemoryError(CUDA), where("rollout", "receive_weights"), r"^weight sync: engine 1 is out of memory"),
        (OutOfMemoryError(CUDA), where("rollout", "start"), r"^start: .*memory_utilization.*rollout.tensor_parallel$"),
        (
            OutOfMemoryError(CUDA),
            where("rollout", "start", rollout={"engines_per_gpu": 3}),
            r"memory_utilization \(now 0.9\) or model.max_length .*, or lower rollout.engines_per_gpu \(now 3\)$",
        ),
        (
            ValueError(KV),
            where("rollout", "start", rollout={"engines_per_gpu": 3}),
            r"; raise rollout.memory_utilization .*, or lower model.max_length .*, or lower rollout.engines_per_gpu",
        ),
        (ValueError(KV), where("rollout", "start"), r"4.0 GiB KV.*1.5 GiB.* 768\..*; raise rollout.memory_utilization"),
        (
            ValueError(KV),
            where("rollout", "start", "cpu"),
            r"; raise rollout.kv_cache_gib \(now 1\), or lower model.max_len",
        ),
        (
            ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when"),
            where("rollout", "start"),
            r"on its GPU: .*for the cache blocks\.; .*; raise rollout.memory_utilization \(now 0.9\), or lower",
        ),
        (
            ValueError(TAKEN),
            where("rollout", "start"),
            r"9.5/79.1 GiB.*71.2 GiB\)\..*; lower rollout.memory_util.* or end",
        ),
        (
            RuntimeError(CPU),
            where("trainer", "step", "cpu"),
            r"^train: trainer rank 1 is out of memory: .*to allocate 99 \(this process holds \d+\.\d GiB, .* free, the "
            r"limit is \d+\.\d GiB\); .*tokens_per_micro_batch",
        ),
        (MemoryError(), where("rollout", "start", "cpu"), r"lower rollout.kv_cache_gib \(now 1\) or model.max_length"),
        (MemoryError(), where("driver", "run"), r"^run: the controller is out of memory: .*; give it more memory"),
    ],
)
def test_out_of_memory_names_the_phase_the_numbers_and_the_key(error: BaseException, at: Where, words: str) -> None:
    found = told(error, at)
    assert type(found) is OutOfMemory and re.search(words, str(found)), str(found)
    assert "gpu_memory_utilization" not in str(found) and "PYTORCH" not in str(found)


def test_only_memory_that_others_hold_may_be_there_at_another_start() -> None:
    assert not told(ValueError(TAKEN), where("rollout", "start")).fatal
    assert told(ValueError(KV), where("rollout", "start")).fatal


@pytest.mark.parametrize(
    ("error", "at", "kind", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            where("trainer", "save"),
            DiskError,
            "^save: trainer rank 1 must be able to use its disk, but: .*'/data/x'.*; free space there",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/c"),
            where("rollout", "start"),
            DiskError,
            "'/root/c'",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/opt"), where("trainer", "start"), DiskError, "'/opt'"),
        (OSError(errno.EMFILE, "Too many open files"), where("rollout", "generate"), ConfigError, "ulimit -n"),
        (ValueError("Unrecognized thing"), where("rollout", "start"), ConfigError, "model.path = '/model' must be"),
        (
            ImportError("needs mamba-ssm"),
            where("trainer", "start"),
            ConfigError,
            "must be able to import what it and model.path = '/model' need, but: .*needs mamba-ssm.*; install the",
        ),
        (
            ModuleNotFoundError("No module named 'flashinfer'"),
            where("rollout", "start"),
            ConfigError,
            "^start: engine 1 must be able to import .*'flashinfer'.*cluster.environment$",
        ),
        (
            ValueError("GenerationConfig is invalid: temperature\nFix these issues to save the configuration."),
            where("trainer", "save"),
            ConfigError,
            "^save: trainer rank 1: model.path = '/model' must be .* saved, but: .*Config is invalid: temperature",
        ),
        (
            RuntimeError("Duplicate GPU detected : rank 1"),
            where("trainer", "start"),
            ConfigError,
            "train.gpus_per_rank",
        ),
        (
            AttributeError("no attribute 'model'"),
            where("trainer", "start"),
            BugError,
            "^start: .* and would fail again",
        ),
        (ValueError("shapes"), where("trainer", "step"), BugError, "^train: .* a bug .*ValueError: shapes.*report"),
        (RuntimeError("CUDA error: device-side assert triggered"), where("trainer", "step"), BugError, "device-side"),
        (RuntimeError("CUDA error: uncorrectable ECC error"), where("trainer", "step"), TrainerLost, "lost its GPU"),
        (RuntimeError("CUDA error: uncorrectable ECC error"), where("rollout", "generate"), EngineLost, "lost its GPU"),
        (
            RuntimeError("gloo: Connection closed by peer"),
            where("trainer", "step"),
            ClusterError,
            "lost its connection",
        ),
        (DataError("row 3: no answer"), where("rollout", "generate"), DataError, "^row 3: no answer$"),
    ],
)
def test_what_is_told_and_tried_again(error: BaseException, at: Where, kind: type[GrpoError], words: str) -> None:
    found = told(error, at)
    assert type(found) is kind and re.search(words, str(found)), str(found)
    assert isinstance(found, ClusterError) == look(error).lost
    assert "\n" not in str(found)


def test_the_traceback_goes_along_for_a_file() -> None:
    found = told(ValueError("shapes"), where("trainer", "step"))
    assert found.traceback == "ValueError: shapes\n" and found.traceback_file == "run/errors/x.txt"


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.OURS])
def test_every_kind_has_words_for_every_role(kind: Kind) -> None:
    for role, verb in (("rollout", "generate"), ("trainer", "step"), ("driver", "run")):
        found = typed(replace(look(KeyError("x")), kind=kind), where(role, verb))
        assert "KeyError: 'x'" in str(found) and str(found).startswith(where(role, verb).phase)
