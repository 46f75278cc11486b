import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_a_process_that_has_loaded_torch_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.rollout.environment import may_fork

    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not may_fork()
    monkeypatch.delitem(sys.modules, "torch")
    assert may_fork()


@pytest.mark.parametrize(
    ("answer", "why"),
    [(3, ""), (0, "used before"), (100, "its driver answers 100"), (None, "cannot be asked (libcuda.so.1)")],
)
def test_a_process_that_has_used_cuda_does_not_fork(
    monkeypatch: pytest.MonkeyPatch, answer: int | None, why: str
) -> None:
    """None: there is no driver."""
    from grpo.rollout import environment

    def load(name: str) -> SimpleNamespace:
        assert name == "libcuda.so.1"
        if answer is None:
            raise OSError(name)
        return SimpleNamespace(cuDeviceGetCount=lambda _: answer)

    monkeypatch.setattr(environment.ctypes, "CDLL", load)
    assert (why in environment.why_no_fork()) if why else not environment.why_no_fork()


def test_what_engines_compile_is_kept_beside_what_ranks_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.rollout import environment

    monkeypatch.setattr(environment.os, "environ", {"TORCHINDUCTOR_CACHE_DIR": "/kept", "TRITON_CACHE_DIR": "/mine"})
    environment.keep_what_is_compiled()
    assert environment.os.environ["VLLM_CACHE_ROOT"] == "/kept/vllm"
    assert environment.os.environ["TRITON_CACHE_DIR"] == "/mine"


def test_a_container_s_quota_limits_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from grpo.rollout import environment

    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(64)))
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(environment, "Path", lambda _: limit)
    assert environment.usable_cores() == 64
    for text, cores in (("max 100000\n", 64), ("250000 100000\n", 3), ("50000 100000\n", 1)):
        limit.write_text(text)
        assert environment.usable_cores() == cores


def test_an_engine_knows_whether_its_gpu_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.config import Config
    from grpo.rollout import environment

    monkeypatch.setattr(environment.os, "environ", {})
    monkeypatch.setattr(environment.tempfile, "mkdtemp", lambda **_: "/nowhere")
    for rollout, shares in (
        ({}, False),
        ({"gpus_per_engine": 1}, False),
        ({"gpus_per_engine": 0.5}, True),
        ({"engines_per_gpu": 2}, True),
    ):
        environment.os.environ.clear()
        config = Config.model_validate({"model": {"path": "m"}, "rollout": rollout})
        environment.prepare_environment(config, "cuda")
        assert (environment.SHARES_GPU in environment.os.environ) is shares


@pytest.mark.parametrize(("together", "threads"), [(1, "8"), (3, "2"), (20, "1")])
def test_engines_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, together: int, threads: str) -> None:
    from grpo.config import Config
    from grpo.rollout import environment

    monkeypatch.setattr(environment.os, "environ", {})
    monkeypatch.setattr(environment.tempfile, "mkdtemp", lambda **_: "/nowhere")
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    config = Config.model_validate({"model": {"path": "m"}, "rollout": {"engines": {"min": 1, "max": 20}}})
    environment.prepare_environment(config, "cpu", together)
    assert environment.os.environ["OMP_NUM_THREADS"] == threads
