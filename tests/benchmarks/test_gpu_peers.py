import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.cases import case_named
from benchmarks.gpu.devices import Watch
from benchmarks.gpu.peers import Failed, measured, micro_batch, steps_of, surroundings, trainer_work
from benchmarks.gpu.trl_attention import check, dense
from benchmarks.gpu.trl_trainer import Clock
from benchmarks.rewards import shares_of_e
from tests.benchmarks.test_gpu_record import setting


def test_a_micro_batch_is_what_fits_with_the_padding_that_there_is(tmp_path: Path) -> None:
    one = setting(tmp_path)  # two GPUs train
    assert [micro_batch(one, name, 2, padded=True) for name in ("200", "512", "tail")] == [32, 16, 8]
    assert [micro_batch(one, name, 2, padded=False) for name in ("200", "512", "tail")] == [64, 32, 64]
    assert micro_batch(one, "2", 2, padded=False) == 256, "half of the rows for each"


def test_the_trainer_gets_the_whole_step_and_the_settings_of_the_case(tmp_path: Path) -> None:
    case = case_named("trl+gradient_checkpointing=true+learning_rate=0.5")
    work = trainer_work(case, "512", setting(tmp_path), tmp_path / "steps.json", 81)
    assert (work["kind"], work["micro_batch"] * work["accumulation"] * 2) == ("trl", 512)
    assert (work["max_tokens"], work["steps"], work["server"]) == (512, 6, "http://127.0.0.1:81")
    assert work["settings"] == {"gradient_checkpointing": True, "learning_rate": 0.5}
    turns = trainer_work(case_named("trl-turns"), "512", setting(tmp_path), tmp_path / "steps.json", 0)
    assert (turns["kind"], turns["micro_batch"] * turns["accumulation"] * 4) == ("trl-turns", 512)
    assert turns["longest"] == 512 + 237
    with pytest.raises(Failed, match="3 GPUs cannot share 512 rows evenly"):
        trainer_work(case_named("trl-turns"), "200", replace(setting(tmp_path), gpus=3), tmp_path / "steps.json", 0)


def test_each_half_sees_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = surroundings(setting(tmp_path), range(2, 4), MORE="1")
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3" and found["MORE"] == "1" and "PYTHONPATH" not in found


def step(at: float, seconds: float, **more: Any) -> dict[str, Any]:
    return {"time": at, "seconds": seconds, "update": 2.0, "sync": 0.5, "completion_tokens": 102400, **more}


def test_a_synchronous_trainer_is_measured_by_its_phases(tmp_path: Path) -> None:
    phases = {"generation": 1.0, "scoring": 0.25}
    steps = [step(10.0 + 4 * at, 4.0, **phases) for at in range(6)]
    steps[0]["seconds"] = 7.0  # before the steps that count
    found = measured(case_named("trl"), "200", steps, setting(tmp_path), Watch(), 1.0)
    assert (found["start"], found["window"], found["seconds"]) == (2.0, (14.0, 30.0), 4.0)
    assert (found["generation"], found["update"], found["scoring"], found["sync"]) == (1.0, 2.0, 0.25, 0.5)
    assert found["idle"] == {"engines": pytest.approx(0.625), "trainer": pytest.approx(0.3125)}
    assert found["completion_tokens"] == found["wanted_tokens"] == 102400


def test_of_an_asynchronous_one_only_the_trainer_is_seen(tmp_path: Path) -> None:
    steps = [step(10.0 + 4 * at, 4.0, generation=None, scoring=None) for at in range(6)]
    found = measured(case_named("trl-async"), "200", steps, setting(tmp_path), Watch(), 1.0)
    assert found["generation"] is None and found["sample_tokens_per_second"] is None
    assert found["idle"] == {"engines": None, "trainer": pytest.approx(0.375)}


def test_the_clock_writes_each_step_with_the_time_of_its_phases(tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    assert steps_of(file) == []
    clock = Clock(file)
    clock.last = time.time() - 5
    slow = clock.timed("generation", lambda value: time.sleep(0.02) or value)
    assert slow(3) == 3 and slow(4) == 4
    spent = clock.seconds["generation"]
    clock.step(generation=spent)
    (found,) = steps_of(file)
    assert found["generation"] == spent >= 0.04 and found["seconds"] >= 5
    assert clock.seconds == {}
    clock.step()
    assert len(json.loads(file.read_text())["steps"]) == 2


def test_attention_whose_queries_are_not_the_last_ones_is_found_out() -> None:
    def by_sequence(shift: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value, cu_q, cu_k = args[:5]
        parts = []
        for number in range(len(cu_q) - 1):
            mine, theirs = slice(*cu_q[number : number + 2]), slice(*cu_k[number : number + 2])
            seen = theirs.stop - shift * (len(key[theirs]) - len(query[mine]))  # 1: as if queries were the first
            whole = slice(theirs.start, seen)
            parts.append(dense(query[mine], key[whole], value[whole], kwargs["softmax_scale"]))
        return torch.cat(parts).to(torch.bfloat16)

    check(lambda *args, **kwargs: by_sequence(0, *args, **kwargs), torch.device("cpu"))
    with pytest.raises(AssertionError, match="off by"):
        check(lambda *args, **kwargs: by_sequence(1, *args, **kwargs), torch.device("cpu"))


def test_rewards_of_messages_are_those_of_their_text() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in ("eeaa", "", "b")]
    assert shares_of_e(prompts=[], completions=completions, more=1) == [0.5, 0.0, 0.0]
