"""Where tensors lie in a model: learned from a load, proved, and filled directly from then on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from grpo.errors import WeightSyncError
from grpo.rollout.places import Places, Watch
from grpo.weights.digest import record
from tests.stack import PARITY, Stack, open_stack, prompt
from tests.weights.test_attacks import (
    BETWEEN,
    GATE,
    IN_FLIGHT,
    UP,
    every_way,
    exchanged,
    renewed,
    self_test,
    verified_sync,
)

SHAPES = {"q": (4, 6), "k": (2, 6), "norm": (6,), "embed": (7, 6)}


class Model(torch.nn.Module):
    """q and k in one weight, the rows of the embedding padded."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.zeros(6, 6), requires_grad=False)
        self.norm = torch.nn.Parameter(torch.zeros(6), requires_grad=False)
        self.embed = torch.nn.Parameter(torch.full((8, 6), 9.0), requires_grad=False)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """As they arrive: parts of one piece of memory."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    piece = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
    parts = zip(SHAPES.items(), piece.split(sizes), strict=True)
    return {name: part.view(shape) for (name, shape), part in parts}


Step = Callable[[torch.Tensor], torch.Tensor]


def load(model: Model, tensors: dict[str, torch.Tensor], prepared: Step = lambda made: made) -> Watch:
    """As vLLM's reload does it: into layers that are made anew, and from there into the model's own memory."""
    watch, records = Watch(), {name: record(name, tensor) for name, tensor in tensors.items()}
    goals = {"q": (model.qk, 0), "k": (model.qk, 4), "norm": (model.norm, 0), "embed": (model.embed, 0)}
    with watch, torch.no_grad():
        for goal in (model.qk, model.norm, model.embed):
            layer = torch.empty_strided(goal.shape, goal.stride())
            for name, tensor in tensors.items():
                if goals[name][0] is goal:
                    watch.expect(records[name], tensor)
                    start = goals[name][1]
                    layer.narrow(0, start, len(tensor)).copy_(prepared(tensor))
                    layer[start + len(tensor) :].fill_(0)
            goal.data.copy_(layer)
            del layer  # the next one may take its memory
    return watch


def test_places_are_learned_from_one_load_and_take_the_next_version() -> None:
    model = Model()
    watch = load(model, weights(1))
    places = watch.places(model)
    assert places is not None and not watch.reason
    assert {name: tuple(view.shape) for name, view in places.views.items()} == SHAPES
    new = weights(2)
    before = model.qk.data_ptr()
    assert places.fill([(record(name, tensor), tensor) for name, tensor in new.items()]) == []
    assert torch.equal(model.qk, torch.cat([new["q"], new["k"]])) and model.qk.data_ptr() == before
    assert torch.equal(model.embed, torch.cat([new["embed"], torch.zeros(1, 6)]))
    loaded = Model()
    load(loaded, new)
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("prepared", "said"),
    [
        (lambda tensor: tensor * 1, "mul makes something else of it"),
        (lambda tensor: tensor.clone(), "clone makes something else of it"),
        (lambda tensor: tensor.to(torch.float64), "_to_copy makes something else of it"),
        (lambda tensor: tensor.flip(0), "flip makes something else of it"),
        (lambda tensor: tensor if tensor.any() else tensor, "any makes something else of it"),
        (
            lambda tensor: tensor.t().t() if tensor.dim() == 1 else tensor.t().reshape(tensor.shape),
            "something else of it",
        ),
    ],
)
def test_weights_that_are_computed_with_have_no_places(prepared: Step, said: str) -> None:
    watch = load(model := Model(), weights(1), prepared)
    assert watch.places(model) is None and said in watch.reason


def test_a_part_or_another_layout_has_no_place() -> None:
    model, tensor = Model(), torch.randn(4, 6)
    for goal, source, said in (
        (model.qk[:4], tensor[:2].repeat(1, 1), "something else"),
        (model.qk[:2], tensor[:2], "only a part of it, or in another form"),
        (model.qk.t()[:, :4], tensor.t(), "only a part of it, or in another form"),
    ):
        watch = Watch()
        watch.expect(record("q", tensor), tensor)
        with watch, torch.no_grad():
            if said == "something else":
                source = tensor[:2].repeat(2, 1)
            goal.copy_(source)
        assert watch.places(model) is None and said in watch.reason


def test_a_tensor_that_is_put_to_two_places_has_none() -> None:
    model, tensor = Model(), torch.randn(6)
    watch = Watch()
    watch.expect(record("norm", tensor), tensor)
    with watch, torch.no_grad():
        model.norm.copy_(tensor)
        model.embed[0].copy_(tensor)
    assert watch.places(model) is None and watch.reason == "norm: to two places"


def test_what_lies_there_is_looked_at() -> None:
    """A load that changes a weight in its place, or leaves it out of the model."""
    tensor = torch.randn(6)
    for wrong, said in (
        (True, "norm is another in the model"),
        (False, "norm does not lie in the model as it is sent"),
    ):
        watch, model = Watch(), Model()
        watch.expect(record("norm", tensor), tensor)
        with watch, torch.no_grad():
            goal = model.norm if wrong else torch.zeros(6)
            goal.copy_(tensor)
            goal.add_(1)
        assert watch.places(model) is None and watch.reason == said


def test_a_version_that_is_not_whole_is_told_before_anything_is_put() -> None:
    places = Places({"a": torch.zeros(3), "b": torch.zeros(2)})
    one = [(record("a", torch.ones(3)), torch.ones(3))]
    assert places.fill(one) == ["b is not in the copy"]
    other = [*one, (record("b", torch.ones(4)), torch.ones(4))]
    assert places.fill(other) == ["b has no place in the model"]
    assert not places.views["a"].any()
    altered = [*one, (record("b", torch.ones(2)), torch.zeros(2))]
    assert places.fill(altered) == ["b has changed since it was received"]


# A real engine, on a CPU that does not pack its weights


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    receiver = "tests.unpacked_receiver.UnpackedReceiver"
    with open_stack(tmp_path_factory.mktemp("llama"), "llama", receiver) as stack:
        verified_sync(stack, 1)
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Stack:
    return renewed(shared)


@pytest.mark.slow
@every_way
def test_an_engine_follows_through_its_places(stack: Stack, way: str) -> None:
    [(count, reason)] = stack.engine.call("attack", "places")
    assert (count, reason) == (len(stack.tensors()), "")
    assert self_test(stack, way=way) < PARITY
    for version in range(1, 11):
        stack.replace(seed=version)
        verified_sync(stack, version, way=way)
    assert stack.difference() < PARITY
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 10),)}


@pytest.mark.slow
@every_way
def test_what_goes_wrong_on_the_way_to_the_places_is_found(
    stack: Stack, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stack.sender._buckets

    def faulty(tensors: Any) -> Iterator[Any]:
        for bucket in original(tensors):
            data = {each.name: held for each, held in bucket}
            if UP in data:
                data[UP], data[GATE] = data[GATE], data[UP].zero_()
            yield [(each, data[each.name]) for each, _ in bucket]

    with pytest.raises(WeightSyncError, match=f"{UP} was announced and not sent"):
        verified_sync(stack, 202, tensors=[pair for pair in stack.tensors() if pair[0] != UP], way=way)
    with monkeypatch.context() as patch:
        patch.setattr(stack.sender, "_buckets", faulty)
        with pytest.raises(WeightSyncError, match=f"{UP} differs in digest"):
            verified_sync(stack, 203, way=way)
    old = verified_sync(stack, 204, way=way)
    with pytest.raises(WeightSyncError, match="has moved, but sent the weights of version 204 again"):
        verified_sync(stack, 205, previous=old, way=way)
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        self_test(stack, exchanged, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", [BETWEEN, IN_FLIGHT])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("copy altered", f"{UP} has changed since it was received"),
        ("copy lost", "there is no copy of version 210"),
        ("copy of another version", "the copy is of version 209 and not a whole version 210"),
        ("copy half loaded", f"{UP.replace('0', '[01]')} is not in the copy"),
    ],
)
def test_a_copy_that_is_not_what_was_verified(stack: Stack, way: str, fault: str, said: str) -> None:
    from grpo.weights import verify

    stack.replace(seed=210)
    verify(*stack.exchange(210, ahead=True))
    stack.engine.call("attack", fault)
    with pytest.raises(WeightSyncError, match=said):
        stack.engine.call("commit_weights", 210, way == IN_FLIGHT)
