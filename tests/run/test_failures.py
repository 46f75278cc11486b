"""What exceptions of libraries mean. The texts are those of torch 2.13, vLLM 0.32, transformers 5.19, safetensors."""

import errno
import json
import os
import pickle

import pytest

from grpo.errors import BugError, ClusterError, DataError, EngineLost, WeightSyncError
from grpo.run.failures import ElsewhereError, Failure, Kind, look

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free."
    " Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 60.00 GiB is "
    "allocated by PyTorch, and 3.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, "


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


class SafetensorError(Exception):
    pass


class DistBackendError(RuntimeError):
    pass


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Kind.MEMORY, OutOfMemoryError(CUDA)),
        (Kind.MEMORY, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")),
        (Kind.MEMORY, MemoryError("Unable to allocate 8.00 PiB for an array with shape (9,)")),
        (Kind.MEMORY, MemoryError()),
        (Kind.MEMORY, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
        (Kind.MEMORY, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        (Kind.MEMORY, ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")),
        (Kind.MEMORY, ValueError("... which is larger than the available KV cache memory (0.1 GiB).")),
        (Kind.MEMORY, ValueError("Free memory on device cuda:0 (9/80 GiB) on startup is less than desired GPU memory")),
        (Kind.MEMORY, DistBackendError(NCCL + "unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'")),
        (Kind.DISK, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")),
        (Kind.DISK, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/home/x")),
        (Kind.DISK, OSError(errno.EROFS, os.strerror(errno.EROFS), "/cache")),
        (Kind.DISK, PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/x")),
        (Kind.DISK, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        (Kind.DISK, Exception("Permission denied (os error 13)")),
        (
            Kind.DISK,
            DistBackendError(
                NCCL
                + "unhandled system error\nncclSystemError: System call failed.\nLast error:\nError while creating "
                "shared memory segment /dev/shm/nccl-x (size 9637888), error: No space left on device (28)"
            ),
        ),
        (Kind.LIMIT, OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
        (Kind.LIMIT, RuntimeError("can't start new thread")),
        (
            Kind.LAYOUT,
            DistBackendError(NCCL + "invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on 17000"),
        ),
        (
            Kind.MODEL,
            ValueError(
                "GenerationConfig is invalid: \n- `temperature`: ...\n\nFix these issues to save the configuration."
            ),
        ),
        (Kind.MODEL, RuntimeError("Error(s) in loading state_dict for LlamaForCausalLM:\n\tsize mismatch for lm_head")),
        (Kind.MODEL, SafetensorError("Error while deserializing header: header too large")),
        (Kind.GPU, RuntimeError("CUDA error: uncorrectable ECC error encountered")),
        (Kind.GPU, RuntimeError("CUDA error: GPU has fallen off the bus")),
        (
            Kind.GPU,
            DistBackendError(NCCL + "unhandled cuda error\nCuda failure 214 'uncorrectable ECC error encountered'"),
        ),
        (Kind.GPU, RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")),
        (Kind.BUG, RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be")),
        (Kind.BUG, RuntimeError("CUDA error: an illegal memory access was encountered")),
        (Kind.BUG, DistBackendError(NCCL + "unhandled cuda error\nCuda failure 700 'an illegal memory access was'")),
        (Kind.BUG, RecursionError("maximum recursion depth exceeded")),
        (Kind.BUG, KeyError("layers.0")),
        (Kind.BUG, FileNotFoundError(errno.ENOENT, "No such file", "/x")),
        (Kind.BUG, SystemExit(3)),
        (Kind.BUG, Unspeakable()),
        (Kind.CONNECTION, RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4221")),
        (Kind.CONNECTION, RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9ms for recv")),
        (Kind.CONNECTION, DistBackendError(NCCL + "remote process exited or there was a network error")),
        (Kind.CONNECTION, DistBackendError("NCCL communicator was aborted on rank 1.")),
        (Kind.CONNECTION, DistBackendError("[Rank 1] is setting up NCCL communicator, but something else happened")),
        (Kind.CONNECTION, RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)")),
        (Kind.CONNECTION, RuntimeError("The client socket has timed out after 1000ms while trying to connect")),
        (Kind.CONNECTION, ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        (Kind.CONNECTION, OSError(errno.EADDRINUSE, "Address already in use")),
        (Kind.CONNECTION, BrokenPipeError(errno.EPIPE, "Broken pipe")),
        (Kind.CONNECTION, TimeoutError()),
        (Kind.CONNECTION, OSError(errno.EHOSTUNREACH, "No route to host")),
        (Kind.CONNECTION, OSError("We couldn't connect to 'https://huggingface.co' to load the files")),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else repr(value)[:60] if not isinstance(value, Unspeakable) else ""
    ),
)
def test_what_libraries_raise(kind: Kind, error: BaseException) -> None:
    failure = look(error)
    assert failure.kind is kind
    assert failure.lost == (kind in (Kind.GPU, Kind.CONNECTION))
    assert "\n" not in failure.text
    assert Failure(**json.loads(json.dumps(failure.plain()))) == failure


def raised(error: BaseException, cause: BaseException | None = None, context: BaseException | None = None):
    """As it is after it was raised."""
    try:
        if context is not None:
            try:
                raise context
            except BaseException:
                raise error  # noqa: B904
        raise error from cause
    except BaseException as caught:
        return caught


def test_the_cause_decides_wherever_it_stands_in_the_chain() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    for error in (
        raised(RuntimeError("cannot save"), cause=full),
        raised(RuntimeError("cannot save"), context=full),
        raised(RuntimeError("cannot save"), cause=raised(ValueError("inner"), cause=full)),
        ExceptionGroup("two tasks failed", [ValueError("a"), ExceptionGroup("inner", [KeyError("b"), full])]),
    ):
        failure = look(error)
        assert failure.kind is Kind.DISK
        assert "'/data/x'" in failure.text and failure.text.startswith(type(error).__name__)


def test_what_was_hidden_on_purpose_is_not_looked_at() -> None:
    try:
        try:
            raise ConnectionError("first try")
        except ConnectionError:
            raise ValueError("no such key") from None
    except ValueError as error:
        assert look(error).kind is Kind.BUG and look(error).text == "ValueError: no such key"


def test_what_would_come_again_is_told_before_the_connection_that_broke_by_it() -> None:
    broken = raised(RuntimeError("Connection closed by peer"), context=OutOfMemoryError(CUDA))
    assert look(broken).kind is Kind.MEMORY
    assert look(ExceptionGroup("", [ConnectionResetError(), OSError(errno.ENOSPC, "full")])).kind is Kind.DISK


def test_the_cause_is_shown_and_not_the_last_line() -> None:
    text = look(
        ValueError(
            "GenerationConfig is invalid: \n- `temperature`: `do_sample` is not set to `True`. However, `temperature` "
            "is set to `0.6`\nIf you're using a pretrained model, see its `generation_config.json`.\n\nFix these "
            "issues to save the configuration."
        )
    ).text
    assert "`temperature` is set to `0.6`" in text and "generation_config.json" in text
    assert look(OutOfMemoryError(CUDA)).text.endswith("3.00 GiB is reserved by PyTorch but unallocated.")


def test_a_long_text_keeps_its_head_and_its_end() -> None:
    text = look(ValueError("head " + "x" * 5000 + " end")).text
    assert text.startswith("ValueError: head ") and text.endswith(" end") and len(text) < 720


def test_foreign_text_steers_no_terminal_and_a_cpp_stack_is_left_out() -> None:
    error = RuntimeError(
        "bad\x1b[31m\u202e value\nException raised from check at /torch/x.cpp:9 (most recent call first):\nframe"
    )
    assert look(error).text == "RuntimeError: bad\\x1b[31m\\u202e value"


def test_an_error_of_ours_stays_what_it_is() -> None:
    failure = look(raised(ValueError("around"), cause=DataError("row 3: no answer")))
    assert (failure.kind, failure.error, failure.text, failure.lost) == (
        Kind.OURS,
        "DataError",
        "row 3: no answer",
        False,
    )
    assert look(EngineLost("died")).lost and look(ClusterError("broke")).lost and not look(WeightSyncError("x")).lost


def test_what_failed_elsewhere_comes_as_it_was_there() -> None:
    there = Failure(Kind.MEMORY, "no room", "OutOfMemoryError", "core.py:3 in step", "Traceback of the core")
    assert look(raised(RuntimeError("See root cause above"), cause=ElsewhereError(there))) == there


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert look(first).text == "ValueError: a, because of KeyError: 'b'"


def test_the_place_is_in_our_code_where_there_is_one() -> None:
    try:
        pickle.loads(b"no pickle")
    except pickle.UnpicklingError as error:
        assert look(error).place.startswith("test_failures.py:")
    assert look(BugError("x")).place == ""
