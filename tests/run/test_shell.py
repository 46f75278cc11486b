"""What reaches a local Ray of the shell's variables, and what a process does about its limits."""

import os
import resource
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.run import shell

WITHHELD = """RAY_ADDRESS RAY_TMPDIR RAY_NAMESPACE RAY_worker_niceness RAY_BACKEND_LOG_LEVEL PYTHONPATH PYTHONOPTIMIZE
PYTHONHASHSEED PYTHONSTARTUP PYTHONIOENCODING PYTHONWARNINGS OMP_NUM_THREADS OMP_PROC_BIND GOMP_CPU_AFFINITY
KMP_AFFINITY MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS VLLM_USE_V1 VLLM_ATTENTION_BACKEND
PYTORCH_CUDA_ALLOC_CONF TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_NCCL_BLOCKING_WAIT TORCHDYNAMO_DISABLE
CUBLAS_WORKSPACE_CONFIG NVIDIA_TF32_OVERRIDE DS_ACCELERATOR ACCELERATE_USE_FSDP TRANSFORMERS_ATTN_IMPLEMENTATION
USE_TORCH RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMPI_COMM_WORLD_SIZE TORCHELASTIC_RUN_ID"""
PASSED = """PATH HOME LANG LC_ALL HF_HOME HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE HF_HUB_CACHE TRANSFORMERS_OFFLINE
CUDA_VISIBLE_DEVICES CUDA_HOME NCCL_SOCKET_IFNAME NCCL_DEBUG GLOO_SOCKET_IFNAME LD_LIBRARY_PATH LD_PRELOAD
https_proxy WANDB_API_KEY AWS_ACCESS_KEY_ID PYTHONNOUSERSITE PYTHONDONTWRITEBYTECODE VLLM_CACHE_ROOT TORCH_HOME
TORCH_CUDA_ARCH_LIST TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR XDG_CACHE_HOME GRPO_FAULTS TERM RANKING MY_RAY_ADDRESS"""


def test_what_changes_a_computation_ends_at_the_driver_and_what_describes_the_machine_does_not() -> None:
    environ = dict.fromkeys([*WITHHELD.split(), *PASSED.split()], "x")
    assert shell.withheld(environ) == sorted(WITHHELD.split())
    assert {name for name, value in shell.environment(environ).items() if value == "x"} == set(PASSED.split())


@given(st.sets(st.sampled_from(WITHHELD.split())), st.sets(st.sampled_from(WITHHELD.split())))
def test_the_configuration_lets_through_what_it_names(present: set[str], named: set[str]) -> None:
    environ = dict.fromkeys(present, "x")
    assert set(shell.withheld(environ, sorted(named))) == present - named
    assert {
        name for name, value in shell.environment(environ, sorted(named)).items() if value == "x"
    } == present & named


@given(st.text(string.ascii_uppercase + "_", min_size=1, max_size=30))
def test_every_name_is_withheld_or_passed(name: str) -> None:
    given_to_ray = shell.environment({name: "x"}).get(name) == "x"
    assert given_to_ray != bool(shell.withheld({name: "x"})) or name == "NO_PROXY"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": "a, b", "NO_PROXY": "b,c"}, "a,b,c,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "localhost"}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*,localhost,127.0.0.1,::1"),
    ],
)
def test_this_machine_is_reached_without_a_proxy(environ: dict[str, str], expected: str) -> None:
    assert shell.without_proxy(environ) == {"no_proxy": expected, "NO_PROXY": expected}


PREPARED = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {size}))
os.umask({mask})
from grpo.run import shell
shell.prepare()
print(oct(os.umask(0)), resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_FSIZE)[0])
print(*shell.obstacles(), sep="|")
"""


@pytest.mark.parametrize(
    ("hard", "size", "mask", "said", "problems"),
    [
        (5000, -1, 0o777, "0o77 5000 -1", ""),
        (4096, -1, 0o002, "0o2 4096 -1", ""),
        (200, -1, 0o022, "0o22 200 -1", "ulimit -n allows 200 open files, and Ray needs 4096"),
        (5000, 9999, 0, "0o0 5000 9999", "ulimit -f allows 9999 bytes of a file; a checkpoint's may be larger"),
    ],
)
def test_limits_are_raised_and_those_that_cannot_be_are_named(
    hard: int, size: int, mask: int, said: str, problems: str
) -> None:
    program = PREPARED.format(hard=hard, size=size, mask=mask)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    if done.returncode and "not permitted" in done.stderr:
        pytest.skip("limits of this machine are lower")
    assert done.stdout.splitlines() == [said, *([problems] if problems else [""])], done.stderr


def test_the_limits_of_this_very_process_are_looked_at() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert any("ulimit -n" in text for text in shell.obstacles()) == (0 <= files < shell.FEWEST_FILES)


def test_rays_variables_are_forgotten_but_those_that_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "a", "RAY_TMPDIR": "b", "RAY_PASSED": "c", "ARRAY_X": "d"})
    monkeypatch.setattr(shell, "forgotten", set())
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    shell.forget_ray(["RAY_PASSED"])
    assert os.environ == {"RAY_PASSED": "c", "ARRAY_X": "d"}
    assert shell.ignored(["RAY_PASSED"]) == ["RAY_ADDRESS", "RAY_TMPDIR"]
