"""Eight ways in which a weight sync goes wrong, against a real engine: each is found before a sample can be trained on.

And 200 clean syncs, which raise no alarm and leave the engine's memory as it was.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from grpo.errors import ClusterError, WeightSyncError
from grpo.types import Manifest
from tests.engines import token_logprobs
from tests.stack import PARITY, PROMPT, Stack, open_stack, prompt

UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
TOLERANCE = 0.2  # of the self-test, in nats
Tensors = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A tied Llama."""
    receiver = "tests.attacked_receiver.AttackedReceiver"
    with open_stack(tmp_path_factory.mktemp("llama"), "llama", receiver) as stack:
        yield stack


def verified_sync(
    stack: Stack, version: int, previous: Manifest | None = None, tensors: Tensors | None = None
) -> Manifest:
    """A sync as a run makes it after every training step."""
    from grpo.weights import verify

    sent, received = stack.exchange(version, tensors)
    verify(sent, received, previous, updated=True)
    stack.engine.call("commit_weights", version)
    return sent


def self_test(stack: Stack, order: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> float:
    """The test that every new engine must pass: it follows the trainer to other weights and back."""
    from grpo.weights import check_self_test

    compared = []
    true = [tensor.clone() for _, tensor in stack.tensors()]
    for step in ("perturbed", "true"):
        if step == "perturbed":
            stack.replace(seed=99)
        else:
            for (_, tensor), original in zip(stack.tensors(), true, strict=True):
                tensor.copy_(original)
        verified_sync(stack, version=0, tensors=order(stack.tensors()))
        compared.append((token_logprobs(stack.model, PROMPT), [stack.engine.call("prompt_logprobs", PROMPT)]))
    return check_self_test(*compared, tolerance=TOLERANCE)


def assert_it_samples_nothing(stack: Stack) -> None:
    with pytest.raises(WeightSyncError, match="only from committed weights"):
        stack.generate([prompt(0)])


def exchanged(tensors: Tensors) -> Tensors:
    """Two tensors of one shape, each under the other's name."""
    names = {UP: GATE, GATE: UP}
    return [(names.get(name, name), tensor) for name, tensor in tensors]


@pytest.mark.slow
def test_a_clean_start(stack: Stack) -> None:
    assert self_test(stack) < PARITY
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 0),)}


@pytest.mark.slow
def test_200_clean_syncs_raise_no_alarm_and_keep_no_memory(stack: Stack) -> None:
    core = psutil.Process(stack.engine.pids[0])
    sent, seconds, memory, handles = None, [], [], []
    for version in range(1, 201):
        stack.replace(seed=version)
        began = time.perf_counter()
        sent = verified_sync(stack, version, previous=sent)
        seconds.append(time.perf_counter() - began)
        if version % 50 == 0:
            memory.append(core.memory_info().rss / 2**20)
            handles.append((core.num_fds(), core.num_threads()))
    print(f"200 syncs: {1000 * sorted(seconds)[100]:.0f} ms each (median), MiB of the core {memory}, {handles[-1]}")
    assert memory[-1] - memory[0] < 8 and len(set(handles)) == 1
    assert stack.difference() < PARITY
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 200),)}


@pytest.mark.slow
def test_communicator_disabled(stack: Stack) -> None:
    """In the middle of a run: the worker's broadcasts return at once, with zeros, whatever the trainer does."""
    stack.engine.call("attack", "communicator disabled")
    with pytest.raises(WeightSyncError, match="model.embed_tokens.weight was announced and not sent"):
        stack.engine.call("receive_weights", 201, stack.records())
    assert_it_samples_nothing(stack)
    stack.join()


@pytest.mark.slow
def test_tensor_dropped(stack: Stack) -> None:
    with pytest.raises(WeightSyncError, match=f"{UP} was announced and not sent"):
        verified_sync(stack, 202, tensors=[pair for pair in stack.tensors() if pair[0] != UP])
    assert_it_samples_nothing(stack)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["tensor zeroed", "names swapped"])
def test_on_the_way(stack: Stack, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = stack.sender._buckets

    def faulty(tensors: Any) -> Iterator[Any]:
        for bucket in original(tensors):
            data = {record.name: held for record, held in bucket}
            if UP in data and fault == "tensor zeroed":
                data[UP].zero_()
            elif UP in data:
                data[UP], data[GATE] = data[GATE], data[UP]
            yield [(record, data[record.name]) for record, _ in bucket]

    with monkeypatch.context() as patch:
        patch.setattr(stack.sender, "_buckets", faulty)
        with pytest.raises(WeightSyncError, match=f"{UP} differs in digest"):
            verified_sync(stack, 203)
    assert_it_samples_nothing(stack)


@pytest.mark.slow
def test_names_swapped_before_they_are_sent(stack: Stack) -> None:
    """Both sides then write down the same digests; only the self-test can tell."""
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        self_test(stack, exchanged)


@pytest.mark.slow
def test_old_version_sent(stack: Stack) -> None:
    old = verified_sync(stack, 204)
    snapshot = [(name, tensor.clone()) for name, tensor in stack.tensors()]
    stack.replace(seed=204)
    with pytest.raises(WeightSyncError, match="has moved, but sent the weights of version 204 again"):
        verified_sync(stack, 205, previous=old, tensors=snapshot)
    assert_it_samples_nothing(stack)
    verified_sync(stack, 206, previous=old)
    assert stack.difference() < PARITY


@pytest.mark.slow
def test_kv_cache_kept(stack: Stack) -> None:
    """vLLM says that it has dropped the cache, and has not."""
    stack.engine.call("keep_cache", True)
    with pytest.raises(WeightSyncError, match="prefix cache kept 128 tokens over the sync of version 207"):
        verified_sync(stack, 207)
    assert_it_samples_nothing(stack)
    stack.engine.call("keep_cache", False)


@pytest.mark.slow
def test_tied_head_stale(stack: Stack) -> None:
    """The bytes arrive, and all digests are right: the engine computes with an old copy of the head."""
    assert self_test(stack) < PARITY
    stack.engine.call("attack", "tied head stale")
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        self_test(stack)


@pytest.mark.slow
def test_sync_cut_half_way(stack: Stack) -> None:
    """Last: the engine is stale from then on, whatever it is asked for."""
    tensors = stack.tensors()

    def cut() -> Iterator[tuple[str, Any]]:
        yield from tensors[: len(tensors) // 2]
        raise OSError("the trainer died")

    receiving = stack.engine.begin("receive_weights", 300, stack.records())
    began = time.monotonic()
    with pytest.raises(OSError, match="the trainer died"):
        stack.sender.send(300, cut())
    with pytest.raises(ClusterError, match="engine 0, receive_tensors: .* broke off"):
        receiving.result(30)
    assert time.monotonic() - began < stack.config.deadlines.sync
    stale = "engine 0 is stale: the transfer of version 300 broke off, and its model is in pieces; start a new engine"
    for verb, arguments in (
        ("generate", ([(prompt(0), 1)], None)),
        ("prompt_logprobs", (PROMPT,)),
        ("receive_weights", (301, stack.records())),
        ("commit_weights", (300,)),
    ):
        with pytest.raises(WeightSyncError, match=stale):
            stack.engine.call(verb, *arguments)
    assert stack.engine.call("health", 2) == "busy"  # it answers, but nothing may be generated
