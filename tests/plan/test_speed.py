"""The two-pool model against what was measured on two H200 (docs/pipeline.md, docs/performance.md)."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config import Config
from grpo.plan.gpus import GPUS, gpu_named
from grpo.plan.model_size import read_shape
from grpo.plan.speed import Rates, compose, near, rates_of, step_of, talk_seconds, train_flops, work_of
from tests.plan.planned import QWEN_1_5B, config

H200 = GPUS["H200"]
ROLLOUT = {"prompts_per_step": 64, "samples_per_prompt": 8, "max_tokens": 200}


def standard(folder: Path, staleness: int = 0, update: str = "between_batches", **more: Any) -> Config:
    rollout = ROLLOUT | {"max_staleness": staleness, "update": update}
    return config(folder, QWEN_1_5B, rollout=rollout, **more)


@pytest.mark.parametrize(
    ("staleness", "sampling", "training", "sync", "measured"),
    [
        (0, 4.4, 3.0, 0.75, 8.5),
        (0, 5.4, 4.0, 0.8, 10.1),
        (0, 12.0, 11.2, 0.9, 25.0),  # completions of 512 tokens
        (1, 4.7, 3.1, 0.75, 5.8),
    ],
)
def test_a_step_is_made_of_its_measured_parts_within_15_percent(
    tmp_path: Path, staleness: int, sampling: float, training: float, sync: float, measured: float
) -> None:
    rates = Rates(1.0, 1.0, sync, sync, receive=2.8, floor=0.0, link=1.0)
    step = compose(standard(tmp_path, staleness), sampling, 0.0, training, rates)
    assert step.seconds == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("tokens", "staleness", "address", "measured"),
    [
        (200, 0, "auto", 5.63),
        (512, 0, "auto", 12.64),
        (200, 2, "auto", 6.41),
        (512, 2, "auto", 9.01),
        (200, 2, None, 2.99),  # through the trainer's memory
    ],
)
def test_two_h200_with_three_engines_on_one_from_the_configuration_alone(
    tmp_path: Path, tokens: int, staleness: int, address: str | None, measured: float
) -> None:
    how = {"max_staleness": staleness, "update": "in_flight" if staleness else "between_batches"}
    rollout = ROLLOUT | how | {"max_tokens": tokens, "engines": 3, "engines_per_gpu": 3}
    run = config(tmp_path, QWEN_1_5B, rollout=rollout, cluster={"address": address})
    work, shape = work_of(run, prompt_tokens=118), read_shape(run)
    step = step_of(run, shape, work, rates_of(run, shape, H200, work, 3, 1), 3, 1, 1)
    assert step.seconds == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("sections", "through_memory"),
    [
        ({}, True),
        ({"cluster": {"address": "auto"}}, False),
        ({"cluster": {"address": "auto"}, "sync": {"transport": "ipc"}}, True),
        ({"sync": {"transport": "nccl"}}, False),
        ({"rollout": {"engines": 5}, "train": {"ranks": 3}}, True),
        ({"rollout": {"engines": 5}, "train": {"ranks": 4}}, False),
        ({"cluster": {"address": "auto", "colocate": True}}, True),
        ({"rollout": {"engines": 9}, "train": {"ranks": 9}, "cluster": {"colocate": True}}, False),
    ],
)
def test_weights_go_through_memory_on_one_machine(
    tmp_path: Path, sections: dict[str, Any], through_memory: bool
) -> None:
    assert near(config(tmp_path, QWEN_1_5B, **sections)) is through_memory


def test_engines_are_as_busy_as_was_measured(tmp_path: Path) -> None:
    step = compose(standard(tmp_path, 1), 4.7, 0.0, 3.1, Rates(1.0, 1.0, 0.75, 0.75, 2.8, 0.0, 1.0))
    assert step.seconds == pytest.approx(5.9) and 0.90 <= 1 - step.rollout_idle <= 0.96
    assert step.trainer_idle == pytest.approx(1 - 3.1 / 5.9)


@pytest.mark.parametrize(("staleness", "measured"), [(0, 8.5), (1, 5.8)])
def test_from_the_configuration_alone(tmp_path: Path, staleness: int, measured: float) -> None:
    run = standard(tmp_path, staleness, train={"compile": False}, cluster={"address": "auto"})
    work = work_of(run, prompt_tokens=118)
    assert (work.drawn, work.forwarded) == (102_400, 64 * (118 + 1600))
    shape = read_shape(run)
    step = step_of(run, shape, work, rates_of(run, shape, H200, work, 1, 1), 1, 1, 1)
    assert step.seconds == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("tokens", "rows", "compiled", "measured"),
    [(200, 512, True, 2.54), (512, 256, True, 3.01), (200, 512, False, 4.17)],
)
def test_training_as_measured_on_one_h200(
    tmp_path: Path, tokens: int, rows: int, compiled: bool, measured: float
) -> None:
    """One update by DeepSpeed at ZeRO stage 1; micro-batches of 16,384 tokens, not compiled 8,192."""
    rollout = {"prompts_per_step": rows // 8, "samples_per_prompt": 8, "max_tokens": tokens}
    run = config(tmp_path, QWEN_1_5B, rollout=rollout, train={"compile": compiled})
    shape, work = read_shape(run), work_of(run, prompt_tokens=118)
    seconds = step_of(run, shape, work, rates_of(run, shape, H200, work, 1, 1), 1, 1, 1).training
    assert seconds == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("several", "measured"), [(1, 26_000), (2, 36_300), (3, 42_400), (4, 40_000)])
def test_engines_on_one_h200_as_measured(tmp_path: Path, several: int, measured: float) -> None:
    run = config(tmp_path, QWEN_1_5B, rollout=ROLLOUT | {"engines": several, "engines_per_gpu": several})
    work = work_of(run, 118)
    together = several * rates_of(run, read_shape(run), H200, work, several, 1).engine_tokens
    assert together == pytest.approx(measured, rel=0.15)


def test_the_four_rules_of_composition(tmp_path: Path) -> None:
    rates = Rates(1.0, 1.0, sync=0.5, switch=0.25, receive=3.0, floor=0.0, link=1.0)

    def seconds(*how: Any, **more: Any) -> float:
        return compose(standard(tmp_path, *how, **more), 4.0, 2.0, 3.5, rates).seconds

    assert seconds(0) == 4.0 + 2.0 + 3.5 + 0.5
    assert seconds(1) == max(4.0 + 2.0 + 0.25, 3.5 + 3.0)
    assert seconds(2) == 4.0 + 2.0 + 0.25
    assert seconds(1, "in_flight") == 3.5 + 0.75 * 3.0  # slower while a version travels; the longest holds up nobody
    assert compose(standard(tmp_path, 1, "in_flight"), 8.0, 2.0, 3.5, rates).seconds == 8.0 + 0.25
    assert seconds(0, sync={"every": 5}, checkpoint={"every": 5}) == 4.0 + 2.0 + 3.5 + 0.1


def test_flops_count_each_prompt_once_and_every_pass(tmp_path: Path) -> None:
    run = standard(tmp_path)
    shape, work = read_shape(run), work_of(run, 118)
    once = train_flops(run, shape, work)
    assert once == pytest.approx(109_952 * 6 * (shape.parameters + 28 * 1536 * 318))
    more = {
        4 / 3: {"train": {"gradient_checkpointing": True}},
        2.0: {"train": {"epochs": 2}},
        4.0001 / 3: {"algorithm": {"kl_coef": 0.1}},
        3.9999 / 3: {"algorithm": {"correction": "tis"}, "train": {"minibatches": 2}},
    }
    for factor, sections in more.items():
        assert train_flops(standard(tmp_path, **sections), shape, work) == pytest.approx(factor * once, rel=1e-3)


def test_ranks_share_the_work_and_tell_each_other(tmp_path: Path) -> None:
    run = standard(tmp_path, train={"zero_stage": 3, "minibatches": 2})
    shape, work = read_shape(run), work_of(run, 118)
    rates = rates_of(run, shape, H200, work, 1, 1)
    assert talk_seconds(run, shape, work, rates, 1) == 0.0
    gradients, weights = 2 * 4 * shape.parameters * 2, 2 * 2 * shape.parameters * 7  # 110 thousand by 2 x 8192 tokens
    assert talk_seconds(run, shape, work, rates, 2) == pytest.approx((gradients + weights) / 2 / 225e9)
    one, four = (step_of(run, shape, work, rates, 1, 1, ranks) for ranks in (1, 4))
    assert one.training / 4 < four.training < one.training / 3


def test_a_slow_gpu_and_a_large_model_leave_the_host_behind(tmp_path: Path) -> None:
    run = standard(tmp_path)
    shape, work = read_shape(run), work_of(run, 118)
    assert rates_of(run, shape, H200, work, 1, 1).engine_tokens == 26_000
    large = config(tmp_path, QWEN_1_5B | {"L": 200}, rollout=ROLLOUT)
    slow = [rates_of(large, read_shape(large), GPUS["L40S"], work, 1, gpus).engine_tokens for gpus in (1, 2)]
    assert slow[0] < 26_000 and slow[1] == 2 * slow[0]
    assert rates_of(run, shape, GPUS["L40S"], work, 1, 1).rank_flops < rates_of(run, shape, H200, work, 1, 1).rank_flops


def test_engines_that_share_a_slow_gpu_share_its_speed(tmp_path: Path) -> None:
    shape = QWEN_1_5B | {"L": 200}
    rollout = ROLLOUT | {"engines": 2, "max_tokens": 200}
    apart, shared = (config(tmp_path, shape, rollout=rollout | {"engines_per_gpu": several}) for several in (1, 2))
    rates = [
        rates_of(each, read_shape(each), GPUS["L40S"], work_of(each, 118), 2, 1).engine_tokens
        for each in (apart, shared)
    ]
    assert rates[0] < 26_000 and rates[1] == rates[0] / 2


def test_types_are_found_however_they_are_written_and_others_are_refused() -> None:
    assert gpu_named(" h200 ") is H200
    with pytest.raises(Exception, match="--gpu must be one of A100-40, A100, L40S, H100, H200, B200, not 'TPU'"):
        gpu_named("TPU")


@settings(deadline=None, max_examples=40)
@given(
    sampling=st.floats(0.01, 1e4), tail=st.floats(0, 1e3), training=st.floats(0.01, 1e4), sync=st.floats(0, 1e3),
    receive=st.floats(0, 1e3), staleness=st.integers(0, 3), update=st.sampled_from(["between_batches", "in_flight"]),
)  # fmt: skip
def test_a_step_is_never_shorter_than_either_pool_and_never_longer_than_both(
    tmp_path_factory: pytest.TempPathFactory, sampling: float, tail: float, training: float, sync: float,
    receive: float, staleness: int, update: str,
) -> None:  # fmt: skip
    run = standard(tmp_path_factory.getbasetemp(), staleness, update)
    step = compose(run, sampling, tail, training, Rates(1.0, 1.0, sync, sync, receive, 0.0, 1.0))
    assert max(sampling, training) <= step.seconds <= sampling + tail + training + sync + receive + 1e-6
    assert 0 <= step.rollout_idle <= 1 and 0 <= step.trainer_idle <= 1
