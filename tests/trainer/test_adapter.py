"""An adapter: the gradient of plain PEFT, the weights that engines hold, and nothing else that moves."""

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings, strategies
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo.algorithm.correction import NONE
from grpo.algorithm.loss import policy_loss
from grpo.config import Algorithm, Config, Lora
from grpo.errors import CheckpointError, ConfigError
from grpo.trainer.adapter import (
    adapted_layers,
    adapter_off,
    add_adapter,
    merge,
    model_name,
    target_names,
    without_adapter,
)
from grpo.trainer.model import Policy, make_policy
from grpo.trainer.packing import pack
from grpo.trainer.rehearsal import check_adapter
from grpo.trainer.weights import LiveWeights
from grpo.types import Sample
from tests.models import random_samples, tiny_folder, tiny_model
from tests.ranks import free_port, run_ranks
from tests.trainer.test_policy_trainer import RATE, STAGES, loss_inputs, open_trainer
from tests.trainer.test_policy_trainer import settings as trainer_settings

ROWS = random_samples(9)
LORA = Lora(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), kind="qwen2")


def adapted(dtype: torch.dtype = torch.float32, checkpointing: bool = False, **lora: Any) -> Policy:
    """With an adapter that changes each matrix by a tenth of its size."""
    policy = make_policy(tiny_model("qwen2").to(dtype), 1.0, checkpointing)
    add_adapter(policy.causal_lm, LORA.model_copy(update=lora), 0, checkpointing)
    torch.manual_seed(1)
    with torch.no_grad():
        for one in adapted_layers(policy.causal_lm).values():
            one.b_OR.normal_(0.0, 0.1 * one.size_of_b())
    return policy


def plain_adapter(model: Any, factors: dict[str, torch.Tensor], lora: Lora = LORA) -> Any:
    """PEFT as its users know it, with these factors."""
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    named = dict(peft.named_parameters())
    with torch.no_grad():
        for name, factor in factors.items():
            named[f"base_model.model.{name}".replace(".weight", ".default.weight")].copy_(factor)
    return peft


def padded_logprobs(model: Any, rows: list[Sample]) -> torch.Tensor:
    """One forward of all rows, padded on the right."""
    ids = [torch.tensor(row.prompt_ids + row.output_ids) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in ids])).long()
    logprobs = model(input_ids=padded, attention_mask=mask).logits.float().log_softmax(-1)
    scored = []
    for row, values in zip(rows, logprobs, strict=True):
        start = len(row.prompt_ids)
        targets = torch.tensor(row.output_ids)
        scored.append(values[start - 1 : start - 1 + len(targets)].gather(1, targets[:, None])[:, 0])
    return torch.cat(scored)


def loss_of(logprobs_C: torch.Tensor, rows: list[Sample]) -> torch.Tensor:
    return policy_loss(loss_inputs(rows, logprobs_C), Algorithm(), NONE).loss


def factors_of(policy: Policy) -> dict[str, torch.Tensor]:
    named = {model_name(name): param for name, param in policy.causal_lm.named_parameters()}
    return {name: param for name, param in named.items() if param.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_plain_peft_on_padded_rows(checkpointing):
    policy = adapted(checkpointing=checkpointing)
    factors = factors_of(policy)
    assert len(factors) == 2 * 14 and all(".lora_" in name for name in factors)
    peft = plain_adapter(tiny_model("qwen2"), factors)
    expected_C = padded_logprobs(peft, ROWS)
    found_C, _ = policy(pack(ROWS))
    assert found_C.detach() == pytest.approx(expected_C.detach(), abs=1e-5)
    loss, expected = loss_of(found_C, ROWS), loss_of(expected_C, ROWS)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    loss.backward()
    expected.backward()
    named = dict(peft.named_parameters())
    for name, param in factors.items():
        plain = named[f"base_model.model.{name}".replace(".weight", ".default.weight")].grad
        assert torch.cosine_similarity(param.grad.view(-1), plain.view(-1), dim=0) > 0.9999, name
        assert param.grad == pytest.approx(plain, abs=1e-6), name
    assert all(param.grad is None for param in policy.parameters() if not param.requires_grad)


@given(seed=strategies.integers(0, 2**16), size=strategies.sampled_from([1e-6, 1e-3, 1.0]))
@settings(max_examples=20, deadline=None)
def test_merged_is_the_sum_in_float32_rounded_once(seed, size):
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((6, 5), (3, 5), (6, 3)))
    b *= size
    exact = w.double() + 1.5 * (b.double() @ a.double())
    found = merge(w, a, b, 1.5)
    assert found.dtype == torch.bfloat16
    step = 2.0 ** (exact.abs().log2().floor() - 7)  # of bfloat16 there
    assert ((found.double() - exact).abs() <= 0.5 * step + 1e-6 * (1 + size)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policy_computes_with_the_weights_that_are_sent_bit_for_bit(dtype):
    """And plain PEFT does not in bfloat16, by as much as rounding makes."""
    policy = adapted(dtype)
    sent = {name: tensor.clone() for name, tensor in LiveWeights(policy.causal_lm).published()}
    engine = tiny_model("qwen2").to(dtype)
    engine.load_state_dict(sent, strict=False)
    with torch.no_grad():
        found_C, _ = policy(pack(ROWS))
        assert torch.equal(found_C, make_policy(engine, 1.0)(pack(ROWS))[0])
        peft = make_policy(plain_adapter(tiny_model("qwen2").to(dtype), factors_of(policy)).base_model.model, 1.0)
        apart = float((peft(pack(ROWS))[0] - found_C).abs().mean())
    assert apart < 1e-5 if dtype == torch.float32 else 1e-3 < apart < 0.05


def test_a_change_below_half_a_step_of_bfloat16_is_none_for_trainer_and_engine_alike():
    policy = adapted(torch.bfloat16)
    before = make_policy(tiny_model("qwen2").bfloat16(), 1.0)(pack(ROWS))[0]
    with torch.no_grad():
        for one in adapted_layers(policy.causal_lm).values():
            one.b_OR.mul_(1e-8)
            one.frozen.copy_(torch.where(one.frozen.abs() < 1e-3, 1e-3, one.frozen))
    with torch.no_grad(), adapter_off(policy.causal_lm):
        before = policy(pack(ROWS))[0]
    after = policy(pack(ROWS))[0]
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(float(one.b_OR.grad.abs().max()) > 0 for one in adapted_layers(policy.causal_lm).values())


def test_the_self_tests_noise_reaches_adapted_matrices_through_the_adapter_alone_and_goes_without_a_trace():
    policy = make_policy(tiny_model("qwen2"), 1.0)
    add_adapter(policy.causal_lm, LORA, 0, False)
    weights = LiveWeights(policy.causal_lm)
    before = {name: param.detach().clone() for name, param in policy.named_parameters()}
    whole = {name: param.detach().clone() for name, param in weights.whole.items()}
    digest = weights.frozen_digest()
    weights.perturb(0.2, 7)
    for name, one in weights.adapted.items():
        size = float(one.frozen.square().mean().sqrt())
        assert torch.equal(one.frozen, whole[name]), name
        above = float((one.merged() - one.frozen).square().mean().sqrt())
        assert 0.1 < above / size < 0.35, name
    others = {name: param for name, param in weights.whole.items() if name not in weights.adapted}
    assert others and not any(torch.equal(param, whole[name]) for name, param in others.items())
    assert weights.frozen_digest() != digest
    weights.restore()
    assert all(torch.equal(param, before[name]) for name, param in policy.named_parameters())
    assert weights.frozen_digest() == digest and not weights.originals


@pytest.mark.parametrize(("alpha", "moves"), [(6.0, True), (0.01, False)])
def test_matrices_count_as_moved_by_an_update_only_where_the_adapter_reaches_them(alpha, moves):
    weights = LiveWeights(adapted(alpha=alpha).causal_lm)
    assert {record.moves for record in weights.records() if record.name in weights.adapted} == {moves}
    assert not any(record.moves for record in weights.records() if record.name not in weights.adapted)
    one = next(iter(weights.adapted.values()))
    size_a = float(one.a_RI.detach().square().mean().sqrt())
    assert one.reach == pytest.approx(one.scaling * math.sqrt(len(one.a_RI)) * size_a, rel=0.2)


def test_b_is_zero_at_the_start_and_a_follows_the_seed():
    models = [tiny_model("qwen2") for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        add_adapter(make_policy(model, 1.0).causal_lm, LORA, seed, False)
    assert torch.equal(state, torch.get_rng_state())
    first, same, other = (adapted_layers(model) for model in models)
    for name, one in first.items():
        assert torch.equal(one.merged(), one.frozen) and not one.b_OR.any()
        assert torch.equal(one.a_RI, same[name].a_RI) and not torch.equal(one.a_RI, other[name].a_RI)


def test_the_reference_is_the_policy_without_its_adapter():
    policy = adapted()
    plain = make_policy(tiny_model("qwen2"), 1.0)
    with torch.no_grad():
        found_C, _ = without_adapter(policy)(pack(ROWS))
        assert torch.equal(found_C, plain(pack(ROWS))[0])
        assert not torch.equal(policy(pack(ROWS))[0], found_C)


def test_compiled_layers_compute_the_same_with_the_adapter_and_without(monkeypatch):
    from grpo.trainer import compiling

    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    policy = adapted(torch.bfloat16)
    with torch.no_grad():
        on_C, off_C = policy(pack(ROWS))[0], without_adapter(policy)(pack(ROWS))[0]
    compiling.compile_layers(policy)
    try:
        with torch.no_grad():
            assert torch.equal(policy(pack(ROWS))[0], on_C)
            assert torch.equal(without_adapter(policy)(pack(ROWS))[0], off_C)
        policy(pack(ROWS))[0].sum().backward()
    finally:
        compiling.leave_uncompiled(policy)
    assert all(one.b_OR.grad.any() for one in adapted_layers(policy.causal_lm).values())


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("nothing",), "nothing names no layers; choose of down_proj, gate_proj"),
        (("q_proj", "lm_head"), "lm_head names those of LogprobHead"),
        (("embed_tokens",), "embed_tokens names those of Embedding"),
        (("proj",), "proj names no layers"),
        (("mlp",), "mlp names those of Qwen2MLP"),
    ],
)
def test_targets_are_linear_layers_below_the_head(targets, said):
    policy = make_policy(tiny_model("qwen2"), 1.0)
    with pytest.raises(ConfigError, match=said):
        add_adapter(policy.causal_lm, Lora(targets=targets), 0, False)


@pytest.mark.parametrize("reads", [True, False])
def test_a_layer_whose_weight_is_only_read_would_not_see_its_adapter(monkeypatch, reads):
    def forward(mlp, x):
        gate = torch.nn.functional.linear(x, mlp.gate_proj.weight) if reads else mlp.gate_proj(x)
        return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))

    policy = adapted()
    monkeypatch.setattr(type(policy.causal_lm.model.layers[0].mlp), "forward", forward)
    if reads:
        said = r"train.lora.targets: .*only reads the weights of gate_proj; name others \(called are: down_proj, k_proj"
        with pytest.raises(ConfigError, match=said):
            check_adapter(policy, 64)
    else:
        check_adapter(policy, 64)
    assert not any(one.layer._forward_pre_hooks for one in adapted_layers(policy.causal_lm).values())


def test_some_targets():
    policy = make_policy(tiny_model("qwen2"), 1.0)
    add_adapter(policy.causal_lm, Lora(targets=("self_attn.q_proj", "up_proj")), 0, False)
    assert list(adapted_layers(policy.causal_lm)) == [
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert target_names(policy.causal_lm, Lora())[-1] == "v_proj"


def run_of(folder: Path, stage: int, **sections: Any) -> Config:
    train = {"zero_stage": stage, "lora": LORA.model_dump()} | sections.pop("train", {})
    return trainer_settings(folder, train=train, **sections)


def numbers(tensors: Any) -> dict[str, Any]:
    return {name: tensor.float().numpy(force=True).copy() for name, tensor in tensors}


def bits(trainer: Any) -> dict[str, bytes]:
    """All that training moves."""
    from grpo.trainer.deepspeed_private import KINDS

    found = {}
    for name, param in trainer.weights.params.items():
        for kind in KINDS:
            found[f"{kind} {name}"] = trainer.engine.shards.gather(param, kind).numpy(force=True).tobytes()
    return found | {name: tensor.float().numpy(force=True).tobytes() for name, tensor in trainer.iter_weights()}


def use(rank: int, world_size: int, port: int, configs: list[Config], scratch: Path) -> list[dict[str, Any]]:
    """Two steps with a checkpoint between them, which another trainer goes on from."""
    answers = []
    for number, config in enumerate(configs):
        trainer = open_trainer(config, rank, world_size, port)
        start, factors = numbers(trainer.iter_weights()), numbers(trainer.weights.factors())
        records = trainer.weight_records()
        scores = trainer.logprobs(range(20))
        trainer.perturb(0.2, 0)
        moved = numbers(trainer.iter_weights()), trainer.logprobs(range(20))
        trainer.restore()
        assert numpy.array_equal(scores, trainer.logprobs(range(20)))
        sizes = sum(
            each.numel()
            for each in trainer.engine.shards.of(next(iter(trainer.weights.params.values()))).views.values()
        )
        stats = trainer.step(ROWS, step=1)
        merged, learned = numbers(trainer.iter_weights()), numbers(trainer.weights.factors())
        folder, beside = scratch / f"state-{number}", scratch / f"beside-{number}"
        for each in (folder, beside):
            each.mkdir(exist_ok=True)
        trainer.snapshot(1)
        trainer.write(beside, 1)
        trainer.save_state(folder, 1)
        trainer.step(ROWS, step=2)
        after = bits(trainer)
        again = open_trainer(config, rank, world_size, port)
        notes = again.load_state(folder, 1)
        again.step(ROWS, step=2)
        same = bits(again) == after
        answers.append(
            {
                "start": start,
                "factors": factors,
                "records": records,
                "moved": moved,
                "stats": stats,
                "notes": notes,
                "merged": merged,
                "learned": learned,
                "same": same,
                "scores": scores,
                "sizes": sizes,
                "drifted": again.frozen == trainer.frozen,
            }
        )
    trainer.close()
    return answers


def plain_step(folder: Path, factors: dict[str, Any]) -> dict[str, Any]:
    """The factors after one AdamW step, by PEFT and PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = plain_adapter(model, {name: torch.from_numpy(value) for name, value in factors.items()})
    params = [param for param in peft.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    loss_of(padded_logprobs(peft, ROWS), ROWS).backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    names = {f"base_model.model.{name}".replace(".weight", ".default.weight"): name for name in factors}
    return {names[name]: param.detach().numpy() for name, param in peft.named_parameters() if param.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_for_any_ranks_and_stage(world_size, folder, tmp_path):
    configs = [run_of(folder, stage, algorithm={"kl_coef": 1e-9}) for stage in STAGES]
    configs.append(run_of(folder, 1, checkpoint={"merged": False}, train={"gradient_checkpointing": True}))
    configs.append(run_of(folder, 2, model={"dtype": "bfloat16"}))
    answers = run_ranks(world_size, use, free_port(), configs, tmp_path)[0]
    base = {name: p.detach().numpy() for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    expected = plain_step(folder, answers[0]["factors"])
    for number, (config, found) in enumerate(zip(configs, answers, strict=True)):
        exact = config.model.dtype == "float32"
        assert [record.name for record in found["records"]] == list(base)
        targets = {record.name for record in found["records"] if record.moves}
        assert targets == {name for name in base if "proj.weight" in name}
        for name, value in found["start"].items() if exact else ():
            assert numpy.array_equal(value, base[name]), name
        changed = {
            name for name, value in found["merged"].items() if not numpy.array_equal(value, found["start"][name])
        }
        assert changed == targets
        assert found["same"] and found["notes"] == ()
        assert not numpy.allclose(found["moved"][1], found["scores"], atol=0.1)
        for name, value in found["learned"].items():
            close = numpy.abs(value - expected[name]) <= (1e-4 if exact else 2.5 * RATE)
            assert close.mean() > 0.98 and close.all() | exact, (number, name)
        state, beside = tmp_path / f"state-{number}", tmp_path / f"beside-{number}"
        names = {path.relative_to(state): path for path in state.rglob("*") if path.is_file()}
        assert {path.relative_to(beside) for path in beside.rglob("*") if path.is_file()} == set(names)
        for name, path in names.items():
            assert path.read_bytes() == (beside / name).read_bytes(), name
        assert (state / "policy").exists() == config.checkpoint.merged
        sizes = sum(path.stat().st_size for path in state.glob("optimizer-*"))
        assert sizes < 4 * 3 * sum(value.size for value in found["learned"].values()) + 20_000
        loads_with_peft(folder, state, found, config)


def loads_with_peft(folder: Path, state: Path, found: dict[str, Any], config: Config) -> None:
    dtype = getattr(torch, config.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    peft = PeftModel.from_pretrained(model, state / "adapter", autocast_adapter_dtype=False)
    assert peft.peft_config["default"].base_model_name_or_path == str(folder)
    merged = dict(peft.merge_and_unload().named_parameters())
    for name, value in found["merged"].items():
        assert merged[name].float().detach().numpy() == pytest.approx(
            value, abs=1e-6 if dtype == torch.float32 else 4e-3
        )
    if config.checkpoint.merged:
        whole = load_file(state / "policy" / "model.safetensors")
        assert all(numpy.array_equal(whole[name].float().numpy(), found["merged"][name]) for name in whole)


def resume_elsewhere(rank: int, world_size: int, port: int, configs: list[Config], scratch: Path) -> list[str]:
    said = []
    for config in configs:
        trainer = open_trainer(config, rank, world_size, port)
        if not said:
            trainer.save_state(scratch, 1)
        try:
            said.append(str(trainer.load_state(scratch, 1)))
        except CheckpointError as error:
            said.append(str(error))
    trainer.close()
    return said


@pytest.mark.slow
def test_an_adapter_goes_on_only_with_its_own_base(folder, tmp_path):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(other)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    state = tmp_path / "state"
    state.mkdir()
    configs = [
        run_of(folder, 1),
        run_of(other, 1),
        run_of(folder, 1, train={"lora": None}),
        run_of(folder, 1, train={"lora": {"targets": ["q_proj"]}}),
    ]
    (said,) = run_ranks(1, resume_elsewhere, free_port(), configs, state)
    assert said[0] == "()"
    assert "very weights that it was trained on" in said[1]
    assert "of an adapter, and train.lora asks for none" in said[2]
    assert "differ in 24" in said[3] and "train.lora to its adapter" in said[3]


def test_scaling():
    assert math.isclose(LORA.scaling, 1.5) and Lora().scaling == 2.0
