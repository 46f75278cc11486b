"""Weight syncs that go wrong while an adapter is trained, against a real engine: the eight of `test_attacks.py`, and
those that only an adapter has. What is sent is merged anew each time, by the trainer's own `LiveWeights`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.algorithm.correction import NONE
from grpo.algorithm.loss import policy_loss
from grpo.cluster.syncing import PERTURBATION
from grpo.config import Algorithm, Lora
from grpo.errors import EngineLost, WeightSyncError
from grpo.types import Manifest, Sample, TensorRecord
from tests.engines import make_model
from tests.stack import PARITY, PROMPT, Stack, joined, mean_difference, prompt

Tensors = list[tuple[str, torch.Tensor]]
UP, GATE, Q = (f"model.layers.0.{name}_proj.weight" for name in ("mlp.up", "mlp.gate", "self_attn.q"))
LORA = Lora(rank=4, alpha=8.0)
TOLERANCE = 0.005  # of the self-test, in nats: what a trainer in float32 comes to


class Adapted(Stack):
    """Its model has an adapter that changes each matrix by a tenth."""

    weights: Any

    def add_adapter(self) -> None:
        from grpo.trainer.adapter import add_adapter
        from grpo.trainer.model import make_policy
        from grpo.trainer.weights import LiveWeights

        self.policy = make_policy(self.model, 1.0)
        add_adapter(self.model, LORA, 0, False)
        self.weights = LiveWeights(self.model)
        self.replace(seed=0)

    def tensors(self) -> Tensors:
        return [(name, tensor.clone()) for name, tensor in self.weights.published()]

    def records(self) -> tuple[TensorRecord, ...]:
        found: tuple[TensorRecord, ...] = self.weights.records()
        return found

    @torch.no_grad()
    def logprobs(self) -> list[float]:
        """Of the fixed prompt, as a trainer computes them."""
        from grpo.trainer.packing import pack

        output = PROMPT[1:]
        row = Sample("", 0, PROMPT[:1], output, (0.0,) * len(output), ((0, 0),), "stop", "", advantage=0.0)
        values: list[float] = self.policy(pack([row]))[0].tolist()
        return values

    def difference(self) -> float:
        return mean_difference(self.logprobs(), self.engine.call("prompt_logprobs", PROMPT))

    def replace(self, seed: int) -> None:
        """An update: other factors, and W as it was."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for one in self.weights.adapted.values():
                noise = torch.randn(one.b_OR.shape, generator=generator)
                one.b_OR.copy_(0.1 * one.size_of_b() * noise)

    def sync_verified(self, version: int, previous: Manifest | None = None, tensors: Tensors | None = None) -> Manifest:
        """As a run makes it after every training step."""
        from grpo.weights import verify

        sent, received = self.exchange(version, tensors)
        verify(sent, received, previous, updated=True)
        self.engine.call("commit_weights", version)
        return sent

    def self_test(self, faulty: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> float:
        """As a run makes it when an engine joins: the trainer's own perturbation, and back."""
        from grpo.weights import check_adapter_sent, check_self_test

        compared, sent = [], []
        for step in ("perturbed", "true"):
            if step == "perturbed":
                self.weights.perturb(PERTURBATION, 0)
            try:
                sent.append(self.sync_verified(0, tensors=faulty(self.tensors())))
                trained = self.logprobs()
            finally:
                if step == "perturbed":
                    self.weights.restore()
            compared.append((trained, [self.engine.call("prompt_logprobs", PROMPT)]))
        check_adapter_sent(sent[0], sent[1], self.records())
        return check_self_test(*compared, tolerance=TOLERANCE)

    def as_if(self, scaling: Callable[[str, float], float]) -> Tensors:
        """What a sender that scales B A of each matrix otherwise would send; 0: without it."""
        from grpo.trainer.adapter import merge

        found = []
        for name, tensor in self.tensors():
            if one := self.weights.adapted.get(name):
                factors = one.a_RI.detach(), one.b_OR.detach()
                tensor = merge(one.frozen.detach(), *factors, scaling(name, one.scaling))
            found.append((name, tensor))
        return found


@contextmanager
def adapted_stack(folder: Path) -> Iterator[Adapted]:
    with joined(make_model(folder, "llama", seed=0), folder, "tests.attacked_receiver.AttackedReceiver") as plain:
        stack = Adapted(plain.engine, plain.model, plain.config, plain.sender)
        try:
            stack.add_adapter()
            yield stack
        finally:
            plain.sender = stack.sender  # that the last test has joined


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    with adapted_stack(tmp_path_factory.mktemp("adapted")) as stack:
        yield stack


@pytest.fixture
def stack(shared: Adapted) -> Adapted:
    """The engine as it is after a good sync, whatever was done to it before."""
    shared.engine.call("renew")
    shared.engine.call("attack", "none")
    shared.join()
    shared.replace(seed=0)
    shared.sync_verified(100)
    return shared


def assert_nothing_is_sampled(stack: Adapted) -> None:
    with pytest.raises(WeightSyncError, match="only from committed weights"):
        stack.generate([prompt(0)])


@pytest.mark.slow
def test_a_clean_start_and_50_clean_syncs(stack: Adapted) -> None:
    """Also at the very start, where B is 0 and what is merged are the weights of the file."""
    assert stack.self_test() < PARITY
    with torch.no_grad():
        for one in stack.weights.adapted.values():
            one.b_OR.zero_()
    assert stack.self_test() < PARITY
    sent = None
    for version in range(1, 51):
        stack.replace(seed=version)
        sent = stack.sync_verified(version, sent)
    assert stack.difference() < PARITY
    assert {sample.versions for sample in stack.generate([prompt(0)])[0].samples} == {((0, 50),)}


@pytest.mark.slow
def test_logprobs_and_gradients_are_those_of_the_weights_that_the_engine_holds(stack: Adapted, tmp_path: Path) -> None:
    """Samples of the engine; the gradient at the plain model of what was sent, put through B A by the chain rule."""
    from grpo.trainer.packing import pack
    from tests.trainer.test_policy_trainer import loss_inputs

    samples = stack.generate([prompt(row, PROMPT[: 20 + 7 * row]) for row in range(3)])
    rows = [row for group in samples for row in group.samples]
    advantages = torch.randn(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [replace(row, advantage=value) for row, value in zip(rows, advantages, strict=True)]
    plain = make_model(tmp_path, "llama", seed=1)
    plain.load_state_dict(dict(stack.tensors()), strict=False)

    from grpo.trainer.model import make_policy

    gradients = []
    for policy in (stack.policy, make_policy(plain, 1.0)):
        policy.zero_grad()
        logprobs_C, _ = policy(pack(rows))
        sampled_C = torch.tensor([value for row in rows for value in row.logprobs])
        assert float((logprobs_C.detach() - sampled_C).abs().max()) < 20 * PARITY
        assert float((logprobs_C.detach() - sampled_C).abs().mean()) < PARITY
        policy_loss(loss_inputs(rows, logprobs_C), Algorithm(), NONE).loss.backward()
        gradients.append({name: param.grad for name, param in policy.causal_lm.named_parameters()})
    adapter, whole = gradients
    for name, one in stack.weights.adapted.items():
        dense_OI = whole[name]
        expected_a_RI = one.scaling * one.b_OR.detach().T @ dense_OI
        expected_b_OR = one.scaling * dense_OI @ one.a_RI.detach().T
        for factor, expected in (("lora_A", expected_a_RI), ("lora_B", expected_b_OR)):
            found = adapter[f"{one.name}.{factor}.default.weight"]
            assert torch.cosine_similarity(found.view(-1), expected.view(-1), dim=0) > 0.99999, (name, factor)
            assert found == pytest.approx(expected, abs=1e-6), (name, factor)


# Only an adapter


@pytest.mark.slow
def test_an_adapter_that_never_arrives(stack: Adapted) -> None:
    """W alone is sent, always: both sides write down the same digests."""
    with pytest.raises(WeightSyncError, match="and 13 more was sent with the same bits before and after its adapter"):
        stack.self_test(lambda tensors: stack.as_if(lambda name, scaling: 0.0))
    base = stack.sync_verified(1, tensors=stack.as_if(lambda name, scaling: 0.0))
    stack.replace(seed=1)
    with pytest.raises(WeightSyncError, match="has moved, but sent the weights of version 1 again"):
        stack.sync_verified(2, previous=base, tensors=stack.as_if(lambda name, scaling: 0.0))
    assert_nothing_is_sampled(stack)


@pytest.mark.slow
def test_an_adapter_of_which_one_matrix_is_left_out(stack: Adapted) -> None:
    """Each of the fourteen, though most move the logprobs by less than the self-test allows for."""
    for left_out in stack.weights.adapted:
        with pytest.raises(WeightSyncError, match=f"but {left_out} was sent with the same bits"):
            stack.self_test(lambda tensors, out=left_out: stack.as_if(lambda name, s: 0.0 if name == out else s))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [LORA.rank, 2.0, 0.5, -1.0])
def test_an_adapter_merged_with_another_scale(stack: Adapted, factor: float) -> None:
    """alpha in the place of alpha / rank, and others: what arrives is what was sent, and not what is trained."""
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        stack.self_test(lambda tensors: stack.as_if(lambda name, scaling: factor * scaling))


@pytest.mark.slow
def test_an_adapter_of_an_older_step(stack: Adapted) -> None:
    """All of it; and a part of it, with which the engine's logprobs are not the trainer's."""
    old = stack.sync_verified(3)
    snapshot = stack.tensors()
    stack.replace(seed=3)
    with pytest.raises(WeightSyncError, match="has moved, but sent the weights of version 3 again"):
        stack.sync_verified(4, previous=old, tensors=snapshot)
    assert_nothing_is_sampled(stack)
    held = dict(snapshot)
    mixed = [(name, held[name] if "layers.0" in name else tensor) for name, tensor in stack.tensors()]
    stack.sync_verified(5, previous=old, tensors=mixed)
    assert stack.difference() > 100 * PARITY, "the samples' mismatch tells"


@pytest.mark.slow
def test_an_adapter_merged_twice(stack: Adapted) -> None:
    """Into weights that hold it already, so that it adds up."""
    before = dict(stack.tensors())

    def twice(tensors: Tensors) -> Tensors:
        base = {name: one.frozen.detach() for name, one in stack.weights.adapted.items()}
        return [(name, tensor + before[name] - base[name] if name in base else tensor) for name, tensor in tensors]

    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer"):
        stack.self_test(twice)


# The eight


@pytest.mark.slow
def test_communicator_disabled(stack: Adapted) -> None:
    stack.engine.call("attack", "communicator disabled")
    with pytest.raises(WeightSyncError, match="model.embed_tokens.weight was announced and not sent"):
        stack.engine.call("receive_weights", 201, stack.records(), False)
    assert_nothing_is_sampled(stack)


@pytest.mark.slow
def test_tensor_dropped(stack: Adapted) -> None:
    with pytest.raises(WeightSyncError, match=f"{Q} was announced and not sent"):
        stack.sync_verified(202, tensors=[pair for pair in stack.tensors() if pair[0] != Q])
    assert_nothing_is_sampled(stack)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["tensor zeroed", "names swapped"])
def test_on_the_way(stack: Adapted, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
            stack.sync_verified(203)
    assert_nothing_is_sampled(stack)


@pytest.mark.slow
def test_names_swapped_before_they_are_sent(stack: Adapted) -> None:
    names = {UP: GATE, GATE: UP}
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        stack.self_test(lambda tensors: [(names.get(name, name), tensor) for name, tensor in tensors])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["salts ignored", "one salt"])
def test_kv_cache_kept(stack: Adapted, fault: str) -> None:
    if fault == "one salt":
        stack.engine.call("unsalted")
    else:
        stack.engine.call("attack", fault)
    with pytest.raises(WeightSyncError, match="prefix cache kept 128 tokens over the sync of version 20[78]"):
        for version in (207, 208):
            stack.sync_verified(version)
    with pytest.raises((WeightSyncError, EngineLost), match="only from committed weights|is stale"):
        stack.generate([prompt(0)])


@pytest.mark.slow
def test_tied_head_stale(stack: Adapted) -> None:
    """The head has no adapter, and yet an engine must compute with the one that is sent."""
    assert stack.self_test() < PARITY
    stack.engine.call("attack", "tied head stale")
    with pytest.raises(WeightSyncError, match="engine 0 must follow the trainer .* with the perturbed weights"):
        stack.self_test()


@pytest.mark.slow
def test_sync_cut_half_way(stack: Adapted) -> None:
    """Last: the engine is stale from then on."""
    stack.cut_half_way(300)
    with pytest.raises(EngineLost, match="engine 0 is stale: the transfer of version 300 broke off"):
        stack.generate([prompt(0)])
