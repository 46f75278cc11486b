"""Engines change their weights in the middle of completions: real vLLM on the CPU, an untied Qwen2 in fp32."""

from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from grpo.errors import EngineLost, WeightSyncError
from grpo.types import Group, Sample, Sampling
from tests.engines import token_logprobs
from tests.stack import PARITY, SAMPLING, Stack, mean_difference, open_stack, prompt

LONG = Sampling(samples_per_prompt=8, max_tokens=360, temperature=1.0, top_p=1.0)
START = tuple(range(5, 25))
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with open_stack(tmp_path_factory.mktemp("qwen2"), "qwen2") as stack:
        yield stack


def received_ahead(stack: Stack, version: int) -> None:
    from grpo.weights import verify

    verify(*stack.exchange(version, ahead=True))


def drawn(stack: Stack, switch_to: int | None = None) -> list[Sample]:
    """Long samples; the engine switches in the middle of them."""
    drawing = stack.engine.begin("generate", [(prompt(row, START[row:]), 100 * row) for row in range(2)], LONG)
    assert stack.engine.call("health", 30) == "ok"  # a token later
    if switch_to is not None:
        assert stack.engine.call("commit_weights", switch_to, True) > 0
    groups: list[Group] = drawing.result(60)
    return [sample for group in groups for sample in group.samples]


def spanning(samples: list[Sample], *versions: int) -> list[Sample]:
    return [sample for sample in samples if tuple(version for _, version in sample.versions) == versions]


@pytest.mark.slow
def test_equal_weights_under_another_version_change_nothing_but_the_spans(stack: Stack) -> None:
    """Seeds, caches and logprobs outlive the switch, to the bit."""
    stack.sync(1)
    quiet = drawn(stack)
    received_ahead(stack, 2)
    switched = drawn(stack, switch_to=2)
    assert [(item.output_ids, item.logprobs) for item in switched] == [(i.output_ids, i.logprobs) for i in quiet]
    assert len(spanning(switched, 1, 2)) > 1
    assert {sample.versions for sample in drawn(stack)} == {((0, 2),)}


@pytest.mark.slow
def test_every_token_carries_the_version_that_made_it(stack: Stack) -> None:
    """Only the head changes, which the caches of older tokens do not depend on: so both versions can be recomputed."""
    import torch

    head: Any = dict(stack.tensors())[HEAD]
    old = head.clone()
    head.mul_(torch.linspace(0.4, 1.6, len(head)).unsqueeze(1))
    new = head.clone()
    received_ahead(stack, 3)
    both = spanning(drawn(stack, switch_to=3), 2, 3)
    assert len(both) > 1
    for sample in both:
        [_, (start, _)] = sample.versions
        assert 0 < start < len(sample.output_ids)
        told = torch.tensor(sample.logprobs)
        for weights, ours, others in ((old, told[:start], told[start:]), (new, told[start:], told[:start])):
            head.copy_(weights)
            made = torch.tensor(token_logprobs(stack.model, sample.prompt_ids + sample.output_ids))
            made = made[-len(told) :]
            mine, foreign = (made[:start], made[start:]) if weights is old else (made[start:], made[:start])
            assert (mine - ours).abs().max() < 10 * PARITY
            assert ((foreign - others).abs() > 10 * PARITY).float().mean() > 0.9  # it can be told apart
    head.copy_(new)


@pytest.mark.slow
def test_between_batches_weights_are_not_loaded_under_samples_that_are_being_drawn(stack: Stack) -> None:
    received_ahead(stack, 4)
    drawing = stack.engine.begin("generate", [(prompt(0, START), 1)], LONG)
    assert stack.engine.call("health", 30) == "ok"
    with pytest.raises(WeightSyncError, match="takes version 4 between batches, but 8 samples are being drawn; wait"):
        stack.engine.call("commit_weights", 4)
    assert {sample.versions for sample in drawing.result(60)[0].samples} == {((0, 3),)}
    stack.engine.call("commit_weights", 4)  # the copy is still there
    assert {sample.versions for sample in drawn(stack)} == {((0, 4),)}


@pytest.mark.slow
def test_a_request_that_waits_in_the_queue_over_a_switch_finds_nothing_of_older_weights(stack: Stack) -> None:
    """The prompt's blocks lie in the cache, and the requests have come before the new weights."""
    ids = tuple(5 + number % 90 for number in range(300))
    requests = [(prompt(0, ids), 1)]
    old = stack.engine.call("generate", requests, SAMPLING)
    stack.replace(seed=5)
    received_ahead(stack, 5)
    stack.engine.call("pause")
    waiting = stack.engine.begin("generate", requests, SAMPLING)
    stack.engine.call("commit_weights", 5, True)
    [group] = waiting.result(60)
    assert {sample.versions for sample in group.samples} == {((0, 5),)}
    for sample in group.samples:
        made = token_logprobs(stack.model, sample.prompt_ids + sample.output_ids)[-len(sample.output_ids) :]
        assert mean_difference(made, list(sample.logprobs)) < PARITY
    assert group != old[0]
    assert stack.engine.call("generate", requests, SAMPLING) == [group]


@pytest.mark.slow
def test_a_core_that_dies_while_weights_come_in_beside_sampling_is_a_lost_engine(stack: Stack) -> None:
    """Last. Until then a transfer that stands still stops neither health nor samples."""
    receiving = stack.engine.begin("receive_weights", 6, stack.records(), True)
    assert {sample.versions for sample in drawn(stack)} == {((0, 5),)}
    psutil.Process(stack.engine.pids[0]).kill()
    with pytest.raises(EngineLost, match="engine 0 died during weight sync"):
        receiving.result(30)
