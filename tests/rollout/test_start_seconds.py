"""What a worker of vLLM notes of its start: the real wrapper around a worker that only takes time."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


class Worker:
    """Each verb takes so many seconds of the clock; compiled code is counted as vLLM counts it."""

    def __init__(self, clock: list[float], counted: SimpleNamespace) -> None:
        self.clock, self.counted = clock, counted

    def takes(self, seconds: float) -> None:
        self.clock[0] += seconds

    def init_device(self) -> None:
        self.model_runner = SimpleNamespace(capture_model=lambda: self.takes(20) or 5)
        self.takes(1)

    def load_model(self) -> None:
        self.takes(2)

    def determine_available_memory(self) -> int:
        self.counted.compilation_time += 30.0
        self.takes(30 + 4)
        return 7

    def initialize_from_config(self, config: str) -> None:
        assert config == "a"
        self.takes(0.5)

    def compile_or_warm_up_model(self) -> int:
        self.takes(8)
        return int(self.model_runner.capture_model())


@pytest.mark.slow
def test_compiled_code_and_graphs_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import worker_base

    from grpo.rollout import vllm_private

    clock, counted = [0.0], SimpleNamespace(compilation_time=0.0)
    monkeypatch.setattr("grpo.rollout.vllm_private.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(worker_base, "set_current_vllm_config", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(vllm_private, "START_SECONDS", {})
    wrapper: Any = worker_base.WorkerWrapperBase()
    wrapper.worker, wrapper.vllm_config = Worker(clock, counted), SimpleNamespace(compilation_config=counted)
    wrapper.init_device()
    wrapper.load_model()
    assert wrapper.determine_available_memory() == 7
    wrapper.initialize_from_config(["a"])
    assert wrapper.compile_or_warm_up_model() == 5
    seconds = {"device": 1.0, "weights": 2.0, "memory": 4.5, "compile": 30.0, "graphs": 20.0, "warm_up": 8.0}
    assert seconds == vllm_private.START_SECONDS and sum(seconds.values()) == clock[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "fork", "untouched", "method"),
    [
        ("cuda", True, True, "fork"),
        ("cuda", True, False, "theirs"),
        ("cuda", False, True, "theirs"),
        ("cpu", True, False, "fork"),
    ],
)
def test_a_core_is_a_fork_where_nothing_forbids_it(
    device: str, fork: bool, untouched: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked when the core starts, and not before: reading the configuration may use CUDA."""
    from grpo.rollout import vllm_private

    theirs = SimpleNamespace(get_start_method=lambda: "theirs")
    monkeypatch.setattr(vllm_private.engine_utils, "get_mp_context", lambda: theirs)
    asked = [True]
    monkeypatch.setattr(vllm_private, "why_no_fork", lambda: "" if asked[0] else "used")
    with vllm_private.start_shortcuts(device, fork):
        asked[0] = untouched
        assert vllm_private.engine_utils.get_mp_context().get_start_method() == method
        assert ["used"] * (fork and not untouched and device == "cuda") == vllm_private.SPAWNED
        vllm_private.SPAWNED.clear()
    assert vllm_private.engine_utils.get_mp_context() is theirs


@pytest.mark.slow
def test_vllm_looks_at_a_models_class_in_a_fork(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU; a process of its own would load vLLM once more."""
    from vllm.model_executor.models import registry

    from grpo.rollout import vllm_private

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: pytest.fail("a new process was started"))
    registered: Any = registry.ModelRegistry.models["Qwen2ForCausalLM"]
    loaded = registered.module_name in sys.modules
    with vllm_private.start_shortcuts("cuda", True):
        assert registered.inspect_model_cls().architecture == "Qwen2ForCausalLM"
    assert (registered.module_name in sys.modules) is loaded
