"""The rollout engine: real vLLM on the CPU, one engine for a tied Llama and one for an untied Qwen2, fp32."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.errors import DataError, EngineLost, WeightSyncError
from grpo.rollout.samples import check_prompt
from grpo.types import Sampling, TensorRecord
from tests.engines import EOS, token_logprobs
from tests.stack import PARITY, PROMPT, Stack, mean_difference, open_stack, prompt


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with open_stack(tmp_path_factory.mktemp(request.param), request.param) as stack:
        yield stack


# --- without vLLM


def test_a_prompt_that_would_end_the_engine_core_is_refused_by_name() -> None:
    check_prompt("p:1", [0, 99] * 188, longest=376, vocab_size=100)
    with pytest.raises(DataError, match=r"vocabulary of 100, but prompt p:2 has 100; use the tokenizer"):
        check_prompt("p:2", [5, 100], 376, 100)
    with pytest.raises(DataError, match=r"prompt p:3 has -1"):
        check_prompt("p:3", [-1], 376, 100)
    with pytest.raises(DataError, match=r"1 to 376 tokens .* prompt p:4 has 377"):
        check_prompt("p:4", [5] * 377, 376, 100)
    with pytest.raises(DataError, match=r"prompt p:5 has 0"):
        check_prompt("p:5", [], 376, 100)


def test_the_face_of_the_engine_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, grpo.rollout.engine; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_has_loaded_torch_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.rollout.environment import may_fork

    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not may_fork("cpu")
    monkeypatch.delitem(sys.modules, "torch")
    assert may_fork("cpu") and not may_fork("cuda")


def test_a_container_s_quota_limits_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from grpo.rollout import environment

    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(64)))
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(environment, "Path", lambda _: limit)
    assert environment.usable_cores() == 64
    for text, cores in (("max 100000\n", 64), ("250000 100000\n", 3), ("50000 100000\n", 1)):
        limit.write_text(text)
        assert environment.usable_cores() == cores


# --- with vLLM, in this order: each engine starts once, and the last test kills it


@pytest.mark.slow
def test_nothing_is_sampled_before_weights_are_committed(stack: Stack) -> None:
    with pytest.raises(WeightSyncError, match="only from committed weights"):
        stack.generate([prompt(0)])
    assert stack.difference() < PARITY  # the weights of model.path are there, and the same


@pytest.mark.slow
def test_weights_travel_there_and_back(stack: Stack) -> None:
    """A -> B -> A: the engine follows transformers every time, the head included, and ends where it began."""
    start = [tensor.clone() for _, tensor in stack.tensors()]
    first = stack.engine.call("prompt_logprobs", PROMPT)
    old = stack.replace(seed=1)
    assert mean_difference(old, token_logprobs(stack.model, PROMPT)) > 1.0
    assert stack.difference() > 1.0  # the trainer has moved, the engine has not
    stack.sync(version=1)
    assert stack.difference() < PARITY
    for (_, tensor), original in zip(stack.tensors(), start, strict=True):
        tensor.copy_(original)
    stack.sync(version=2)
    assert stack.difference() < PARITY
    assert mean_difference(first, stack.engine.call("prompt_logprobs", PROMPT)) < PARITY


@pytest.mark.slow
def test_the_output_head_follows_alone(stack: Stack) -> None:
    """Only the head's tensor changes (tied: the embedding's). A packed copy that stays behind would show here."""
    import torch

    name = "lm_head.weight" if "lm_head.weight" in dict(stack.tensors()) else "model.embed_tokens.weight"
    generator = torch.Generator().manual_seed(5)
    dict(stack.tensors())[name].add_(torch.randn(100, 64, generator=generator), alpha=0.3)
    assert stack.difference() > 0.5
    stack.sync(version=3)
    assert stack.difference() < PARITY


@pytest.mark.slow
def test_samples_carry_ids_logprobs_and_version(stack: Stack) -> None:
    stack.sync(version=11)
    prompts = [prompt(row, PROMPT[row:]) for row in range(6)]
    groups = stack.generate(prompts, Sampling(8, 24, 1.0, 1.0))
    assert [group.prompt for group in groups] == prompts
    samples = [sample for group in groups for sample in group.samples]
    assert [sample.index for sample in groups[0].samples] == list(range(8))
    assert {sample.version for sample in samples} == {11}
    assert len({sample.output_ids for sample in groups[0].samples}) == 8
    for sample in samples:
        assert len(sample.output_ids) == len(sample.logprobs) <= 24
        ended = sample.output_ids[-1] == EOS
        assert sample.finish_reason == ("stop" if ended else "length")
        assert EOS not in sample.output_ids[:-1] and (ended or len(sample.output_ids) == 24)
        assert sample.text == "".join(chr(29 + token) for token in sample.output_ids if 2 < token < 98)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sample_logprobs_are_those_of_the_trainer(stack: Stack, temperature: float) -> None:
    [group] = stack.generate([prompt(0)], Sampling(4, 24, temperature, 1.0))
    for sample in group.samples:
        expected = token_logprobs(stack.model, sample.prompt_ids + sample.output_ids, temperature)
        assert mean_difference(expected[-len(sample.output_ids) :], list(sample.logprobs)) < PARITY


@pytest.mark.slow
def test_seeds_decide_the_samples(stack: Stack) -> None:
    def ids(seed: int) -> list[tuple[int, ...]]:
        groups = stack.generate([prompt(0), prompt(1, PROMPT[3:])], seed=seed)
        return [sample.output_ids for group in groups for sample in group.samples]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)


@pytest.mark.slow
def test_greedy_samples_are_the_likeliest_tokens(stack: Stack) -> None:
    import torch

    [group] = stack.generate([prompt(0)], Sampling(3, 6, 0.0, 1.0))
    first, *others = group.samples
    assert [sample.index for sample in group.samples] == [0, 1, 2]
    assert {sample.output_ids for sample in others} == {first.output_ids}
    with torch.no_grad():
        logits = stack.model(torch.tensor([PROMPT + first.output_ids])).logits[0]
    expected = tuple(logits.argmax(-1)[len(PROMPT) - 1 : -1].tolist())
    assert first.output_ids == expected


@pytest.mark.slow
def test_a_bad_prompt_is_refused_and_the_engine_lives_on(stack: Stack) -> None:
    with pytest.raises(DataError, match="prompt test:1 has 100;"):
        stack.generate([prompt(0), prompt(1, (5, 100))])
    with pytest.raises(DataError, match="1 to 376 tokens .* prompt test:2 has 377"):
        stack.generate([prompt(2, (5,) * 377)])
    assert len(stack.generate([prompt(3, (5,) * 376)])[0].samples) == 4


@pytest.mark.slow
def test_a_sync_leaves_nothing_of_the_old_weights_in_the_prefix_cache(stack: Stack) -> None:
    long_prompt = tuple(5 + number % 90 for number in range(300))
    stack.engine.call("cached_tokens", long_prompt)
    assert stack.engine.call("cached_tokens", long_prompt) > 0
    stack.sync(version=12)
    assert stack.engine.call("cached_tokens", long_prompt) == 0


@pytest.mark.slow
def test_a_tensor_that_is_not_sent_stops_the_engine_until_a_whole_sync(stack: Stack) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    without = [(other, tensor) for other, tensor in stack.tensors() if other != name]
    with pytest.raises(WeightSyncError, match=f"{name} was announced and not sent"):
        stack.exchange(20, without)
    with pytest.raises(WeightSyncError, match="only from committed weights"):
        stack.generate([prompt(0)])
    announced = tuple(record for record in stack.records() if record.name != name)
    with pytest.raises(WeightSyncError, match="layer model.layers.1.self_attn.qkv_proj got [0-9]+ of [0-9]+ elements"):
        stack.exchange(21, without, announced)  # a trainer that has forgotten a tensor altogether
    stack.sync(version=22)
    assert stack.difference() < PARITY


@pytest.mark.slow
def test_a_tensor_that_the_model_does_not_know_is_refused(stack: Stack) -> None:
    name, tensor = stack.tensors()[-1]
    extra = [*stack.tensors(), ("model.layers.9.mlp.up_proj.weight", tensor)]
    with pytest.raises(WeightSyncError, match=r"model.layers.9.mlp.up_proj.weight .* was not announced"):
        stack.exchange(30, extra)
    announced = (*stack.records(), TensorRecord("model.layers.9.mlp.up_proj.weight", tuple(tensor.shape), "float32"))
    with pytest.raises(WeightSyncError, match=r"model.layers.9.mlp.up_proj.weight (is not claimed|cannot be loaded)"):
        stack.exchange(31, extra, announced)
    wrong = [(other, tensor.half() if other == name else tensor) for other, tensor in stack.tensors()]
    with pytest.raises(WeightSyncError, match=f"{name} .* float16 was not announced"):
        stack.exchange(32, wrong)
    stack.sync(version=33)
    assert stack.difference() < PARITY


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["zeroed", "swapped"])
def test_tensors_that_change_on_the_way_are_found(stack: Stack, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.weights import verify

    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight")
    original = stack.sender.transport._buckets

    def faulty(tensors: Any) -> Iterator[Any]:
        for bucket in original(tensors):
            data = dict((record.name, held) for record, held in bucket)
            if names[0] not in data:  # the first bucket holds one tensor
                yield bucket
                continue
            if fault == "zeroed":
                data[names[0]].zero_()
            else:
                data[names[0]], data[names[1]] = data[names[1]], data[names[0]]
            yield [(record, data[record.name]) for record, _ in bucket]

    with monkeypatch.context() as patch:
        patch.setattr(stack.sender.transport, "_buckets", faulty)
        sent, received = stack.exchange(40)
    with pytest.raises(WeightSyncError, match=f"{names[0]} differs in digest"):
        verify(sent, received)
    assert stack.difference() > 0.1
    stack.sync(version=41)
    assert stack.difference() < PARITY


@pytest.mark.slow
def test_a_frozen_engine_core_is_an_error_within_the_deadline(stack: Stack) -> None:
    if stack.model.config.model_type == "llama":
        pytest.skip("one wait is enough")
    core = psutil.Process(stack.engine.pids[0])
    core.suspend()
    with pytest.raises(EngineLost, match=r"weight sync must end within 10 s .* but engine 0 has not answered"):
        stack.engine.call("commit_weights", 41)
    core.resume()
    stack.sync(version=51)
    assert {sample.version for group in stack.generate([prompt(0)]) for sample in group.samples} == {51}


@pytest.mark.slow
def test_the_engine_core_ends_with_its_parent_and_its_death_is_an_error(stack: Stack) -> None:
    """Last, because it kills. Llama: the core dies, and the next call says so. Qwen2: the parent is killed."""
    cores = [psutil.Process(pid) for pid in stack.engine.pids]
    assert cores
    if stack.model.config.model_type == "llama":
        os.kill(stack.engine.pids[0], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineLost, match="engine 0 died during rollout"):
            stack.generate([prompt(0)])
        assert time.monotonic() - began < 10
    else:
        stack.engine.process.kill()
    gone, alive = psutil.wait_procs(cores, timeout=10)
    for process in alive:
        process.kill()
    assert len(gone) == len(cores) and not alive
