"""What offloading takes off a GPU, puts into the host's memory, and costs."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.plan.gpus import CPU_ADAM, GPUS, HOST_LINK
from grpo.plan.memory import GIB, make_plan
from grpo.plan.model_size import read_shape
from grpo.plan.offload import pinned
from grpo.plan.speed import rates_of, step_of, work_of
from grpo.plan.table import tables
from tests.plan.planned import QWEN_1_5B, config

N = 1_543_714_304
ON_GPU = {"cluster": {"device": "cuda"}}


def planned(folder: Path, gpu_gib: float = 80.0, **train: Any) -> Any:
    return make_plan(config(folder, QWEN_1_5B, train=train, **ON_GPU), gpu_gib)


@given(size=st.integers(1, 2**45))
def test_pinned_memory_is_the_next_power_of_two(size: int) -> None:
    found = pinned(size)
    assert math.log2(found).is_integer() and size <= found < 2 * size


def test_nothing_is_pinned_of_nothing() -> None:
    assert pinned(0) == 0


def test_optimizer_states_of_a_1_5b_model_leave_the_gpu(tmp_path: Path) -> None:
    plain = planned(tmp_path, tokens_per_micro_batch=8192)
    made = planned(tmp_path, tokens_per_micro_batch=8192, offload_optimizer="cpu", zero_stage=2)
    assert plain.parameters == N and plain.host == 0
    assert plain.rank_bytes - made.rank_bytes == 12 * N
    assert (made.optimizer, made.gradients, made.weights) == (0, 4 * N, 2 * N)
    assert made.host == 8 * N + 2 * 8 * GIB + 4 * GIB
    assert made.pods["trainer"].memory - plain.pods["trainer"].memory == made.host
    assert made.checkpoint == plain.checkpoint


def test_two_ranks_share_what_the_host_holds(tmp_path: Path) -> None:
    made = planned(tmp_path, offload_optimizer="cpu", zero_stage=2, ranks=2)
    share = N // 2
    assert made.gradients == 2 * N and made.host == 8 * share + 2 * 4 * GIB + 2 * GIB


def test_at_stage_3_gradients_and_weights_leave_too(tmp_path: Path) -> None:
    optimizer = planned(tmp_path, offload_optimizer="cpu", zero_stage=3)
    both = planned(tmp_path, offload_optimizer="cpu", offload_param="cpu", zero_stage=3)
    assert (optimizer.gradients, optimizer.weights) == (2 * 5 * 10**8, 2 * N)
    assert optimizer.host == 12 * N + 2 * 8 * GIB
    assert (both.weights, both.host) == (2 * 10**9, optimizer.host + 4 * GIB)


def test_an_adapter_s_frozen_weights_leave_with_its_states(tmp_path: Path) -> None:
    made = planned(tmp_path, lora={}, offload_optimizer="cpu", offload_param="cpu", zero_stage=3)
    states = 12 * made.trained + 2 * pinned(4 * made.trained)
    assert made.weights == 2 * 10**9 and made.host == pinned(2 * (N + made.trained)) + states
    assert pinned(2 * (N + made.trained)) == 4 * GIB and made.optimizer == 0


def test_a_gpu_of_24_gib_trains_1_5b_with_its_optimizer_on_the_host(tmp_path: Path) -> None:
    more = {"tokens_per_micro_batch": 4096, "gradient_checkpointing": True}
    assert planned(tmp_path, 24.0, **more).rank_bytes > 24 * GIB
    assert planned(tmp_path, 24.0, offload_optimizer="cpu", zero_stage=2, **more).rank_bytes < 24 * GIB


def test_a_rank_loads_the_whole_model_whatever_it_keeps(tmp_path: Path) -> None:
    made = planned(tmp_path, 2.5, offload_optimizer="cpu", offload_param="cpu", zero_stage=3, ranks=64)
    assert made.rank_bytes >= 2 * N and made.warnings


@pytest.mark.parametrize(
    ("train", "moved"),
    [
        ({"offload_optimizer": "cpu", "zero_stage": 2}, 6),
        ({"offload_optimizer": "cpu", "zero_stage": 2, "minibatches": 2}, 12),
        ({"offload_optimizer": "cpu", "zero_stage": 3}, 6 + 4 * (2 * 25 - 1)),
        ({"offload_optimizer": "cpu", "offload_param": "cpu", "zero_stage": 3}, 6 + 4 * (2 * 25 - 1) + 4 * 25),
    ],
)
def test_a_step_is_longer_by_the_cpu_s_updates_and_the_bytes_that_travel(
    tmp_path: Path, train: dict[str, Any], moved: int
) -> None:
    """512 completions of 200 tokens to 64 prompts: 110 thousand tokens in 25 micro-batches of 4,400."""
    rollout = {"prompts_per_step": 64, "samples_per_prompt": 8, "max_tokens": 200}

    def training(**keys: Any) -> float:
        made = config(tmp_path, QWEN_1_5B, rollout=rollout, train={"tokens_per_micro_batch": 4400, **keys}, **ON_GPU)
        work, shape = work_of(made, prompt_tokens=118), read_shape(made)
        return step_of(made, shape, work, rates_of(made, shape, GPUS["H100"], work, 1, 1), 1, 1, 1).training

    plain = {key: value for key, value in train.items() if not key.startswith("offload")}
    updates = train.get("minibatches", 1)
    expected = updates * N / CPU_ADAM + moved * N / HOST_LINK
    assert training(**train) - training(**plain) == pytest.approx(expected, rel=1e-6)


def test_the_table_says_where_the_optimizer_lies(tmp_path: Path) -> None:
    made = config(tmp_path, QWEN_1_5B, train={"offload_optimizer": "cpu", "zero_stage": 2}, **ON_GPU)
    columns = tables(make_plan(made), made)[1].columns
    rows = dict(zip(columns[0].cells, columns[2].cells, strict=True))
    assert rows["optimizer"] == "in host memory"
