"""Eight ways in which a weight sync goes wrong, against a real engine: each is found before a sample can be trained on.

In three ways of taking weights: streamed into the model; beside sampling into a copy, which the engine switches to when
nothing runs; the same in the middle of requests. And 200 clean syncs of each, which raise no alarm and leave the
engine's memory as it was. What only the copy makes possible is attacked too.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from grpo.errors import ClusterError, EngineLost, WeightSyncError
from grpo.types import Manifest, Sampling
from tests.engines import token_logprobs
from tests.stack import PARITY, PROMPT, Stack, open_stack, prompt

UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
TOLERANCE = 0.2  # of the self-test, in nats
Tensors = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A tied Llama."""
    receiver = "tests.attacked_receiver.AttackedReceiver"
    with open_stack(tmp_path_factory.mktemp("llama"), "llama", receiver) as stack:
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Stack:
    return renewed(shared)


def renewed(shared: Stack) -> Stack:
    """The engine as it is after a good sync, whatever was done to it before."""
    shared.engine.call("renew")
    shared.engine.call("attack", "none")
    shared.join()
    verified_sync(shared, 100)
    return shared


STREAMED, BETWEEN, IN_FLIGHT = WAYS = ("streamed", "between batches", "in flight")
every_way = pytest.mark.parametrize("way", WAYS)


def verified_sync(
    stack: Stack,
    version: int,
    previous: Manifest | None = None,
    tensors: Tensors | None = None,
    way: str = STREAMED,
) -> Manifest:
    """A sync as a run makes it after every training step."""
    from grpo.weights import verify

    sent, received = stack.exchange(version, tensors, ahead=way != STREAMED)
    verify(sent, received, previous, updated=True)
    stack.engine.call("commit_weights", version, way == IN_FLIGHT)
    return sent


def self_test(
    stack: Stack, order: Callable[[Tensors], Tensors] = lambda tensors: tensors, way: str = STREAMED
) -> float:
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
        verified_sync(stack, version=0, tensors=order(stack.tensors()), way=way)
        compared.append((token_logprobs(stack.model, PROMPT), [stack.engine.call("prompt_logprobs", PROMPT)]))
    return check_self_test(*compared, tolerance=TOLERANCE)


def assert_it_samples_nothing_of_it(stack: Stack, way: str, version: int) -> None:
    """What was streamed is in the model, so nothing is sampled at all; a copy beside it changes nothing."""
    if way == STREAMED:
        with pytest.raises(WeightSyncError, match="only from committed weights"):
            stack.generate([prompt(0)])
    else:
        versions = {sample.versions for sample in stack.generate([prompt(0)])[0].samples}
        assert len(versions) == 1 and versions != {((0, version),)}


def exchanged(tensors: Tensors) -> Tensors:
    """Two tensors of one shape, each under the other's name."""
    names = {UP: GATE, GATE: UP}
    return [(names.get(name, name), tensor) for name, tensor in tensors]


@pytest.mark.slow
@every_way
def test_a_clean_start(stack: Stack, way: str) -> None:
    assert self_test(stack, way=way) < PARITY
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 0),)}


@pytest.mark.slow
@every_way
def test_200_clean_syncs_raise_no_alarm_and_keep_no_memory(stack: Stack, way: str) -> None:
    core = psutil.Process(stack.engine.pids[0])
    sent, seconds, memory, handles = None, [], [], []
    for version in range(1, 201):
        stack.replace(seed=version)
        began = time.perf_counter()
        sent = verified_sync(stack, version, previous=sent, way=way)
        seconds.append(time.perf_counter() - began)
        if version % 50 == 0:
            memory.append(core.memory_info().rss / 2**20)
            handles.append((core.num_fds(), core.num_threads()))
    print(f"200 syncs: {1000 * sorted(seconds)[100]:.0f} ms each (median), MiB of the core {memory}, {handles[-1]}")
    assert memory[-1] - memory[0] < 8 and len(set(handles)) == 1
    assert stack.difference() < PARITY
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 200),)}


@pytest.mark.slow
@every_way
def test_communicator_disabled(stack: Stack, way: str) -> None:
    """In the middle of a run: the worker's broadcasts return at once, with zeros, whatever the trainer does."""
    stack.engine.call("attack", "communicator disabled")
    with pytest.raises(WeightSyncError, match="model.embed_tokens.weight was announced and not sent"):
        stack.engine.call("receive_weights", 201, stack.records(), way != STREAMED)
    assert_it_samples_nothing_of_it(stack, way, 201)


@pytest.mark.slow
@every_way
def test_tensor_dropped(stack: Stack, way: str) -> None:
    with pytest.raises(WeightSyncError, match=f"{UP} was announced and not sent"):
        verified_sync(stack, 202, tensors=[pair for pair in stack.tensors() if pair[0] != UP], way=way)
    assert_it_samples_nothing_of_it(stack, way, 202)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["tensor zeroed", "names swapped"])
@every_way
def test_on_the_way(stack: Stack, way: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
            verified_sync(stack, 203, way=way)
    assert_it_samples_nothing_of_it(stack, way, 203)


@pytest.mark.slow
@every_way
def test_names_swapped_before_they_are_sent(stack: Stack, way: str) -> None:
    """Both sides then write down the same digests; only the self-test can tell."""
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        self_test(stack, exchanged, way)


@pytest.mark.slow
@every_way
def test_old_version_sent(stack: Stack, way: str) -> None:
    old = verified_sync(stack, 204, way=way)
    snapshot = [(name, tensor.clone()) for name, tensor in stack.tensors()]
    stack.replace(seed=204 + WAYS.index(way))
    with pytest.raises(WeightSyncError, match="has moved, but sent the weights of version 204 again"):
        verified_sync(stack, 205, previous=old, tensors=snapshot, way=way)
    assert_it_samples_nothing_of_it(stack, way, 205)
    verified_sync(stack, 206, previous=old, way=way)
    assert stack.difference() < PARITY


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["salts ignored", "one salt"])
@every_way
def test_kv_cache_kept(stack: Stack, way: str, fault: str) -> None:
    """What keeps versions apart in the prefix cache does nothing: blocks of the older weights would be found."""
    if fault == "one salt":
        stack.engine.call("unsalted")
    else:
        stack.engine.call("attack", fault)
    with pytest.raises(WeightSyncError, match="prefix cache kept 128 tokens over the sync of version 20[78]"):
        for version in (207, 208):
            verified_sync(stack, version, way=way)
    with pytest.raises((WeightSyncError, EngineLost), match="only from committed weights|is stale"):
        stack.generate([prompt(0)])


@pytest.mark.slow
def test_kv_cache_kept_of_a_prompt(stack: Stack) -> None:
    """A block that a sample has left under a salt that comes again."""
    long = tuple(5 + number % 90 for number in range(140))
    stack.engine.call("unsalted")
    verified_sync(stack, 207)
    stack.generate([prompt(0, long)])
    with pytest.raises(WeightSyncError, match="prefix cache kept 256 tokens over the sync of version 208"):
        verified_sync(stack, 208)


@pytest.mark.slow
@every_way
def test_tied_head_stale(stack: Stack, way: str) -> None:
    """The bytes arrive, and all digests are right: the engine computes with an old copy of the head."""
    assert self_test(stack, way=way) < PARITY
    stack.engine.call("attack", "tied head stale")
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        self_test(stack, way=way)


@pytest.mark.slow
@pytest.mark.parametrize("way", [BETWEEN, IN_FLIGHT])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("copy altered", f"{UP} has changed since it was received"),
        ("copy lost", "there is no copy of version 210"),
        ("copy of another version", "the copy is of version 209 and not a whole version 210"),
        ("copy half loaded", "layer model.layers.0.mlp.gate_up_proj got"),
    ],
)
def test_a_copy_that_is_not_what_was_verified(stack: Stack, way: str, fault: str, said: str) -> None:
    """After both sides have compared their digests."""
    from grpo.weights import verify

    stack.replace(seed=210)
    verify(*stack.exchange(210, ahead=True))
    stack.engine.call("attack", fault)
    with pytest.raises(WeightSyncError, match=said):
        stack.engine.call("commit_weights", 210, way == IN_FLIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["copy lost", "copy half loaded"])
def test_a_switch_that_fails_in_the_middle_of_requests_ends_them(stack: Stack, fault: str) -> None:
    """They do not wait in a paused core: who draws them learns that the engine is lost."""
    from grpo.weights import verify

    stack.replace(seed=210)
    verify(*stack.exchange(210, ahead=True))
    stack.engine.call("attack", fault)
    drawing = stack.engine.begin("generate", [(prompt(0, PROMPT[:20]), 1)], Sampling(70, 360, 1.0, 1.0))
    assert stack.engine.call("health", 30) == "ok"
    with pytest.raises(WeightSyncError):
        stack.engine.call("commit_weights", 210, True)
    stale = "engine 0 is stale: the switch to version 210 broke off, and its model is in pieces; start a new engine"
    with pytest.raises(EngineLost, match=stale):
        drawing.result(20)
    with pytest.raises(EngineLost, match=stale):
        stack.generate([prompt(0)])


@pytest.mark.slow
def test_a_transfer_that_breaks_off_beside_sampling_leaves_the_engine_at_work(stack: Stack) -> None:
    tensors = stack.tensors()

    def cut() -> Iterator[tuple[str, Any]]:
        yield from tensors[: len(tensors) // 2]
        raise OSError("the trainer died")

    receiving = stack.engine.begin("receive_weights", 221, stack.records(), True)
    with pytest.raises(OSError, match="the trainer died"):
        stack.sender.send(221, cut())
    with pytest.raises(ClusterError, match="broke off"):
        receiving.result(30)
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 100),)}
    with pytest.raises(WeightSyncError, match="commits only what it received last, version 100"):
        stack.engine.call("commit_weights", 221)
    stack.join()
    verified_sync(stack, 222, way=BETWEEN)


@pytest.mark.slow
def test_sync_cut_half_way(stack: Stack) -> None:
    """Last: the engine is stale from then on, whatever it is asked for."""
    stack.cut_half_way(300)
    stale = "engine 0 is stale: the transfer of version 300 broke off, and its model is in pieces; start a new engine"
    for verb, arguments in (
        ("generate", ([(prompt(0), 1)], None)),
        ("prompt_logprobs", (PROMPT,)),
        ("receive_weights", (301, stack.records())),
        ("commit_weights", (300,)),
    ):
        with pytest.raises(EngineLost, match=stale):
            stack.engine.call(verb, *arguments)
    assert stack.engine.call("health", 2) == "busy"  # it answers, but nothing may be generated
