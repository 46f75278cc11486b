import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.cases import case_named
from benchmarks.gpu.devices import Look, parse, summary
from benchmarks.gpu.limits import flops_per_token, limits_of, shape_of
from benchmarks.gpu.ours import last_step, measure, settings_of
from benchmarks.gpu.record import covered, p90, record, rows_of
from benchmarks.gpu.report import compared, render
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.work import make_work
from grpo.plan.gpus import GPUS


def setting(tmp_path: Path, device: str = "cuda") -> Setting:
    return Setting(
        work=make_work("1.5b", 64, 8),
        shape_name="1.5b",
        gpu_name="H200",
        gpu=GPUS["H200"],
        gpus=4,
        device=device,
        python=tmp_path / "python",
        model=tmp_path / "model",
        prompts=tmp_path / "prompts.jsonl",
        out=tmp_path,
        warmup=2,
        steps=4,
        engines_per_gpu=3,
        base=("train.learning_rate=1e-5",),
    )


def test_limits_are_those_of_the_design() -> None:
    shape = shape_of("1.5b")
    assert shape.parameters == 1_543_714_304
    assert flops_per_token(shape, 400) == pytest.approx(9.36e9, rel=0.01)
    h100 = limits_of(shape, GPUS["H100"], 512, 150, 512, 1, 1)
    assert h100.sample_tokens == pytest.approx(190e3, rel=0.01), "weights 0.92 ms and contexts 1.78 ms a step"
    assert limits_of(shape, GPUS["H100"], 512, 100, 300, 1, 1).train_tokens == pytest.approx(105.6e3, rel=0.01)
    assert h100.sync == pytest.approx(6.9e-3, rel=0.01)
    assert h100.step == pytest.approx(512 * 662 / h100.train_tokens)


def test_twice_the_gpus_halve_the_limit_of_training() -> None:
    one, two = (limits_of(shape_of("1.5b"), GPUS["H200"], 512, 118, 200, n, n) for n in (1, 2))
    assert two.train_tokens == 2 * one.train_tokens
    assert one.sample_tokens < two.sample_tokens < 2 * one.sample_tokens, "each then reads all weights for half as many"


def test_a_record_has_rates_and_shares(tmp_path: Path) -> None:
    measured = {
        "steps": [5.0, 2.0, 2.0, 3.0],
        "completion_tokens": 102400.0,
        "update": 1.0,
        "generation": 2.0,
        "sync": 0.1,
    }
    found = record(measured, setting(tmp_path))
    assert (found["seconds"], found["mean"], found["completions_per_second"]) == (2.5, 3.0, 512 / 3)
    assert found["tokens_per_second"] == pytest.approx((512 * 118 + 102400) / 3)
    assert found["train_tokens_per_second"] == 512 * 118 + 102400
    assert found["sample_tokens_per_second"] == 51200
    flops = (512 * 118 + 102400) * flops_per_token(shape_of("1.5b"), 318)
    assert found["shares"]["train"] == pytest.approx(flops / (2 * 989e12))
    assert found["shares"]["mfu_step"] == pytest.approx(flops / 3 / (2 * 989e12))
    assert found["shares"]["step"] == pytest.approx(found["limits"]["step"] / 3)
    on_cpu = record({**measured, "update": None, "sync": None}, setting(tmp_path, "cpu"))
    assert on_cpu["limits"] is None and on_cpu["train_tokens_per_second"] is None


def test_p90_and_covered_time() -> None:
    assert p90([1.0]) == 1.0
    assert p90([float(value) for value in range(11)]) == 9.0
    assert covered([(0, 2), (1, 3), (5, 9), (8, 8.5)], 1, 7) == 4


def test_steps_are_measured_from_the_rows_of_the_run() -> None:
    def row(step: int, end: float) -> dict[str, Any]:
        parts = {"phase/train": 1.0, "phase/weight_sync": 0.01, "rollout/completion_tokens": 100.0, "step/seconds": 2.0}
        return {"event": "step", "step": step, "time": end, **parts}

    steps = [row(3, 12.0), row(4, 14.0)]
    syncs = [
        {"event": "weight_sync", "time": at, "sync/switch_seconds": seconds} for at, seconds in ((9, 5.0), (13, 0.04))
    ]
    spans = [
        {"lane": "rollout", "what": "sample", "start": 9.0, "end": 11.0},
        {"lane": "rollout", "what": "sample", "start": 10.5, "end": 12.0},
        {"lane": "rollout", "what": "receive", "start": 12.0, "end": 14.0},
        {"lane": "trainer", "what": "train", "start": 13.0, "end": 15.0},
    ]
    found = measure(steps, [*steps, *syncs], spans)
    assert found["window"] == (10.0, 14.0) and found["steps"] == [2.0, 2.0]
    assert found["generation"] == 1.0 and found["update"] == 1.0
    assert found["sync"] == pytest.approx(0.05), "what the trainer waited, and what engines stood still in that time"
    assert found["idle"] == {"engines": 0.5, "trainer": 0.75}


def test_a_row_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert (rows_of(file), last_step(file)) == ([], 0)
    file.write_text(json.dumps({"event": "step", "step": 4}) + '\n{"event": "st')
    assert last_step(file) == 4


def test_half_of_the_gpus_sample_and_the_case_has_the_last_word(tmp_path: Path) -> None:
    found = settings_of(case_named("s1+e2+train.learning_rate=1e-4"), ["200", "512"], setting(tmp_path), tmp_path)
    last = dict(one.partition("=")[::2] for one in found)
    assert (last["rollout.engines"], last["rollout.engines_per_gpu"], last["train.ranks"]) == ("4", "2", "2")
    assert (last["rollout.max_tokens"], last["model.max_length"]) == ("512", str(512 + 237))
    assert (last["train.learning_rate"], last["rollout.max_staleness"]) == ("1e-4", "1")


def test_in_turns_each_gpu_samples_and_trains(tmp_path: Path) -> None:
    found = settings_of(case_named("s0+turns"), ["200"], setting(tmp_path), tmp_path)
    last = dict(one.partition("=")[::2] for one in found)
    assert (last["rollout.engines"], last["train.ranks"], last["cluster.colocate"]) == ("12", "4", "true")
    measured = {"steps": [2.0], "completion_tokens": 102400.0, "update": 1.0, "generation": 0.5, "sync": None}
    halves, turns = record(measured, setting(tmp_path)), record(measured, setting(tmp_path), turns=True)
    assert turns["shares"]["train"] == halves["shares"]["train"] / 2, "twice as many GPUs train"
    limits = turns["limits"]
    sampling, training = (
        102400 / limits["sample_tokens_per_second"],
        (512 * 118.0 + 102400) / limits["train_tokens_per_second"],
    )
    assert limits["step"] == pytest.approx(sampling + training, rel=0.01)


def test_gpus_are_read_from_nvidia_smi() -> None:
    assert parse("1, 2048, 143771, 50\n", 7.0) == Look(7.0, 1, 2**31, 143771 * 2**20, 0.5)
    assert parse("No devices were found", 7.0) is None and parse("0, [N/A], 1, 2", 7.0) is None
    looks = [
        Look(at, 0, used * 2**30, 100 * 2**30, busy) for at, used, busy in ((1, 90, 1.0), (2, 10, 0.5), (3, 30, 0.7))
    ]
    assert summary(looks, 2, 9) == [{"gpu": 0, "peak_gib": 30, "total_gib": 100, "busy": pytest.approx(0.6)}]
    assert summary(looks, 8, 9) == []


def result(tmp_path: Path) -> dict[str, Any]:
    measured = {"steps": [2.0], "completion_tokens": 102400.0, "update": 1.0, "generation": 1.5, "sync": None}
    gpus = [{"gpu": 0, "peak_gib": 70.0, "total_gib": 140.0, "busy": 0.5}]
    told = {"seconds": 2.2, "error": 0.1, "idle": {"engines": 0.25, "trainer": 0.5}}
    ours = {
        **record(measured, setting(tmp_path)),
        "case": "s1",
        "tokens": "200",
        "gpus": gpus,
        "idle": {"engines": 0.2, "trainer": None},
        "plan": {"config": told, "from": None},
        "wanted_tokens": 102400,
    }
    theirs = {**ours, "case": "trl", "plan": None, "mean": 9.0, "completion_tokens": 90000.0}
    about = {"gpus": 2, "gpu": "H200", "shape": "1.5b", "prompts": 64, "samples": 8, "prompt_tokens": 118.0}
    failure = {"case": "trl-async", "tokens": ["200"], "why": "the server died", "log": "out of luck"}
    return {**about, "warmup": 2, "steps": 4, "records": [ours, theirs], "failures": [failure]}


def test_the_table_says_all_there_is(tmp_path: Path) -> None:
    text = render(result(tmp_path))
    lines = [line for line in text.splitlines() if line.startswith("| s1")]
    assert lines[0].startswith("| s1 | 200 | **2.00** (2.00, 2.00) | 256 | 81.4k | 162.8k, 77% | 68.3k, ")
    assert " | 20%, – | 50% | 70 (50%) | " in lines[0]
    assert lines[1] == "| s1 | 200 | 2.00 | 2.20 | +10% |  |  | 25%, 50% |"
    assert "- 200 tokens: trl takes **4.5 times** as long as s1" in text
    assert "**trl, 200: 90000 completion tokens a step, but 102400 were to be forced**" in text
    assert "**trl-async (200): the server died**" in text and "out of luck" in text


def test_nothing_is_compared_without_one_of_ours(tmp_path: Path) -> None:
    records = [one for one in result(tmp_path)["records"] if one["case"] == "trl"]
    assert compared(records) == []
