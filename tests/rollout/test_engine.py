"""The rollout engine: real vLLM on the CPU, one engine for a tied Llama and one for an untied Qwen2, fp32."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.errors import DataError, EngineLost, WeightSyncError
from grpo.types import Group, Prompt, Sampling, TensorRecord
from tests.engines import EOS, EngineProcess, make_model, token_logprobs
from tests.rollout.watched import assert_gone, watchdogs
from tests.stack import PARITY, PROMPT, SAMPLING, Stack, make_config, mean_difference, open_stack, prompt


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with open_stack(tmp_path_factory.mktemp(request.param), request.param) as stack:
        yield stack


def test_the_face_of_the_engine_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, grpo.rollout.engine; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    old = token_logprobs(stack.model, PROMPT)
    stack.replace(seed=1)
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
    assert {sample.versions for sample in samples} == {((0, 11),)}
    assert len({sample.output_ids for sample in groups[0].samples}) == 8
    for sample in samples:
        assert len(sample.output_ids) == len(sample.logprobs) <= 24
        ended = sample.output_ids[-1] == EOS
        assert sample.finish_reason == ("stop" if ended else "length")
        assert EOS not in sample.output_ids[:-1] and (ended or len(sample.output_ids) == 24)
        assert sample.text == "".join(
            "<unk>" if token == 2 else chr(29 + token) for token in sample.output_ids if 1 < token < 98
        )
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
    original = stack.sender._buckets

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
        patch.setattr(stack.sender, "_buckets", faulty)
        sent, received = stack.exchange(40)
    with pytest.raises(WeightSyncError, match=f"{names[0]} differs in digest"):
        verify(sent, received)
    assert stack.difference() > 0.1
    stack.sync(version=41)
    assert stack.difference() < PARITY


@pytest.mark.slow
def test_a_version_is_not_committed_under_requests_that_run(stack: Stack) -> None:
    drawing = stack.engine.begin("generate", [(prompt(0), 1)], replace(SAMPLING, max_tokens=300))
    assert stack.engine.call("health", 30) == "ok"
    with pytest.raises(WeightSyncError, match="takes version 42 between batches, but [1-4] requests still run; wait"):
        stack.sync(version=42)
    drawing.result(60)
    stack.sync(version=42)
    assert stack.difference() < PARITY


@pytest.mark.slow
def test_a_busy_engine_is_healthy_and_its_samples_do_not_notice(stack: Stack) -> None:
    """More samples than places: the probe's own place is free all the same."""
    requests = [(prompt(row, PROMPT[row:]), 100 * row) for row in range(24)]
    quiet = stack.engine.call("generate", requests, SAMPLING)
    answers = []
    generating = stack.engine.begin("generate", requests, SAMPLING)
    while not generating.done():
        answers.append(stack.engine.call("health", 30))
    assert set(answers) == {"ok"} and len(answers) > 2
    assert generating.result() == quiet


@pytest.mark.slow
def test_an_engine_that_waits_for_weights_is_busy_until_it_is_frozen(stack: Stack) -> None:
    """During a transfer the core answers nobody; its processes tell."""
    receiving = stack.engine.begin("receive_weights", 45, stack.records())
    assert stack.engine.call("health", 0.5) == "busy"
    core = psutil.Process(stack.engine.pids[0])
    core.suspend()
    with pytest.raises(EngineLost, match=r"must answer within 0.5 s, but engine 0 made no token and took no call"):
        stack.engine.call("health", 0.5)
    core.resume()
    stack.sender.send(45, stack.tensors())
    receiving.result(20)
    assert stack.engine.call("health", 20) == "ok"  # not committed, but a token comes
    stack.engine.call("commit_weights", 45)


@pytest.mark.slow
def test_only_what_was_received_is_committed(stack: Stack) -> None:
    stack.sync(version=46)
    with pytest.raises(WeightSyncError, match=r"received last, version 46, but was asked for version 47; sync that"):
        stack.engine.call("commit_weights", 47)
    stack.engine.call("commit_weights", 46)  # again: nothing changes
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 46),)}


@pytest.mark.slow
def test_an_engine_that_rests_samples_nothing_until_weights_are_committed(stack: Stack) -> None:
    stack.sync(version=48)
    requests = [(prompt(0), 7)]
    before = stack.engine.call("generate", requests, SAMPLING)
    stack.engine.call("rest")
    stack.engine.call("rest")  # again: nothing changes
    assert stack.engine.call("health", 20) == "busy"
    with pytest.raises(WeightSyncError, match="samples only from committed weights"):
        stack.engine.call("generate", requests, SAMPLING)
    with pytest.raises(WeightSyncError, match=r"rests without weights, but was asked to commit version 48; sync it"):
        stack.engine.call("commit_weights", 48)
    stack.sync(version=49)
    assert stack.engine.call("health", 20) == "ok"
    after = stack.engine.call("generate", requests, SAMPLING)
    assert [sample.output_ids for sample in after[0].samples] == [sample.output_ids for sample in before[0].samples]
    assert {sample.versions for sample in after[0].samples} == {((0, 49),)}
    generating = stack.engine.begin("generate", [(prompt(row, PROMPT[row:]), row) for row in range(24)], SAMPLING)
    with pytest.raises(WeightSyncError, match="rests between batches, but [0-9]+ samples are being drawn"):
        stack.engine.call("rest")
    assert len(generating.result(60)) == 24
    stack.sync(version=46)


@pytest.mark.slow
def test_a_frozen_engine_core_is_found_and_an_error_within_the_deadline(stack: Stack) -> None:
    core = psutil.Process(stack.engine.pids[0])
    assert stack.engine.call("health", 20) == "ok"
    core.suspend()
    with pytest.raises(EngineLost, match=r"must answer within 1 s, but engine 0 made no token .* it is frozen"):
        stack.engine.call("health", 1)
    if stack.model.config.model_type == "llama":  # one wait is enough
        with pytest.raises(EngineLost, match=r"weight sync must end within 10 s .* but engine 0 has not answered"):
            stack.engine.call("commit_weights", 46)
    core.resume()
    assert stack.engine.call("health", 20) == "ok"
    stack.sync(version=51)
    assert {sample.versions for group in stack.generate([prompt(0)]) for sample in group.samples} == {((0, 51),)}


@pytest.mark.slow
def test_the_engine_core_ends_with_its_parent_and_its_death_is_an_error(stack: Stack) -> None:
    """Last, because it kills. Llama: the core dies in a transfer, and all calls say so. Qwen2: it is frozen when the
    parent is killed. Nothing is left, the sockets' folder included."""
    from grpo.rollout.environment import SOCKETS

    cores = [psutil.Process(pid) for pid in stack.engine.pids]
    folder = Path(stack.engine.call("environment", SOCKETS)[SOCKETS])
    [watchdog] = watchdogs(folder)
    assert cores and folder.exists()
    if stack.model.config.model_type == "llama":
        receiving = stack.engine.begin("receive_weights", 52, stack.records())
        assert stack.engine.call("health", 0.5) == "busy"
        cores[0].kill()
        with pytest.raises(EngineLost, match="engine 0 died during weight sync"):
            receiving.result(8)  # of 10 seconds that a transfer may take
        with pytest.raises(EngineLost, match="engine 0 died during a health check"):
            stack.engine.call("health", 1)
        with pytest.raises(EngineLost, match="engine 0 is stale: the transfer of version 52 broke off"):
            stack.generate([prompt(0)])
    else:
        cores[0].suspend()
        stack.engine.process.kill()
    assert_gone([*cores, watchdog])
    assert not folder.exists()


# --- exactness: what a resumed run rests on

LENGTHS = (20, 55, 90, 140, 290, 350, 33, 120, 125, 250, 126, 300)  # a block of the KV cache holds 128 tokens
EXACT = Sampling(samples_per_prompt=3, max_tokens=40, temperature=1.0, top_p=1.0)
Drawn = dict[str, list[tuple[Any, ...]]]


def exact_requests() -> list[tuple[Prompt, int]]:
    source = random.Random(1)
    start = tuple(source.randrange(5, 95) for _ in range(200))  # some prompts share their first tokens
    requests = []
    for row, length in enumerate(LENGTHS):
        ids = tuple(source.randrange(5, 95) for _ in range(length))
        requests.append((prompt(row, (start + ids)[:length] if row in (4, 5, 11) else ids), 1000 + 37 * row))
    return requests


def draw(engine: EngineProcess, requests: list[tuple[Prompt, int]]) -> Drawn:
    return drawn(engine.call("generate", requests, EXACT))


def drawn(groups: list[Group]) -> Drawn:
    return {group.prompt.id: [(item.output_ids, item.logprobs) for item in group.samples] for group in groups}


@pytest.mark.slow
def test_samples_are_the_same_to_the_bit_whatever_else_the_engine_does(tmp_path: Path) -> None:
    """bf16: batch order and size, a warm prefix cache, a core that was killed, an engine with less memory and threads,
    whose requests wait for KV memory and are preempted, whose health is then "busy", and which tells its metrics."""
    make_model(tmp_path, "qwen2", seed=0, dtype="bfloat16")
    config = make_config(str(tmp_path), "bfloat16")
    requests = exact_requests()
    engine = EngineProcess(config)
    try:
        engine.call("commit_weights", 0)
        expected = draw(engine, requests)
        assert draw(engine, requests) == expected  # from a warm cache
        assert draw(engine, requests[::-1]) == expected
        alone: Drawn = {}
        for request in requests[:6]:
            alone |= draw(engine, [request])
        assert alone == {name: expected[name] for name in alone}
        assert engine.call("counted") == {}
        engine.call("commit_weights", 0)
        engine.begin("generate", requests, EXACT)
        os.kill(engine.pids[0], signal.SIGKILL)  # in the middle of it
    finally:
        engine.close()
    small = config.rollout.model_copy(update={"kv_cache_gib": 0.0004, "engines": 2})
    engine = EngineProcess(config.model_copy(update={"rollout": small}), counted=True)
    try:
        engine.call("commit_weights", 0)
        answers: list[str] = []
        for _ in range(4):  # a machine that is busy itself may always ask when there is room
            generating = engine.begin("generate", requests, EXACT)
            while not generating.done():
                answers.append(engine.call("health", 0.2))
            assert drawn(generating.result()) == expected
            if "busy" in answers:
                break
        assert "busy" in answers
        told = engine.call("counted")
        samples = sum(len(samples) for samples in expected.values())
        assert told["vllm_generation_tokens"] >= sum(len(ids) for rows in expected.values() for ids, _ in rows)
        assert told["vllm_request_success"] == told["vllm_e2e_request_latency_seconds"] >= samples
        assert told["vllm_num_preemptions"] > 0
        assert told["vllm_num_requests_running"] == 0
        gaps, iterations = told["vllm_inter_token_latency_seconds"], told["vllm_iteration_tokens_total"]
        assert 0 < gaps <= 8 * iterations
        assert gaps < told["vllm_generation_tokens"] - told["vllm_request_success"]  # that would be all of them
    finally:
        engine.close()
