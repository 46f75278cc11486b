from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from grpo.errors import ConfigError
from grpo.trainer import attention, head, kernels
from grpo.trainer import model as policy_module
from grpo.trainer.model import make_policy
from grpo.trainer.packing import pack
from tests.models import random_samples, tiny_model

TEMPERATURE = 0.7


def row_logprobs(model, samples, temperature=TEMPERATURE):
    """The same by the plain road: one row a forward pass, eager attention, all logits."""
    logprobs, entropies = [], []
    for sample in samples:
        logits_TV = model(torch.tensor([sample.prompt_ids + sample.output_ids])).logits[0] / temperature
        log_probs_CV = torch.log_softmax(logits_TV, -1)[len(sample.prompt_ids) - 1 : -1]
        logprobs.append(log_probs_CV.gather(1, torch.tensor(sample.output_ids)[:, None])[:, 0])
        entropies.append(-(log_probs_CV.exp() * log_probs_CV).sum(1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_equals_row_by_row_with_gradients(kind, tied, checkpointing, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", chunk)
    samples = random_samples(7)
    model = tiny_model(kind, tied, attn_implementation="eager")
    expected_C, expected_entropy_C = row_logprobs(model, samples)
    weights_C = torch.randn(len(expected_C), generator=torch.Generator().manual_seed(1))
    (expected_C * weights_C).sum().backward()
    expected_gradients = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()

    policy = make_policy(model, TEMPERATURE, checkpointing).train()
    logprobs_C, entropy_C = policy(pack(samples))
    torch.testing.assert_close(logprobs_C, expected_C, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_C, expected_entropy_C, atol=1e-5, rtol=0)
    (logprobs_C * weights_C).sum().backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("tied", [True, False])
def test_the_entropy_has_its_gradient_where_it_is_asked_for(tied, chunk, monkeypatch):
    """Against autograd through all logits, row by row."""
    monkeypatch.setattr(head, "CHUNK", chunk)
    samples = random_samples(7)
    model = tiny_model(tied=tied, attn_implementation="eager")
    expected_C, expected_entropy_C = row_logprobs(model, samples)
    generator = torch.Generator().manual_seed(2)
    weights_C, bonus_C = (torch.randn(len(expected_C), generator=generator) for _ in range(2))
    (expected_C * weights_C + expected_entropy_C * bonus_C).sum().backward()
    expected_gradients = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    policy = make_policy(model, TEMPERATURE).train()
    assert not policy(pack(samples))[1].requires_grad
    policy.entropy_gradient = True
    logprobs_C, entropy_C = policy(pack(samples))
    (logprobs_C * weights_C + entropy_C * bonus_C).sum().backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-4, rtol=1e-4)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.3, 3.0),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    biased=st.booleans(),
)
def test_gradients_of_the_head_against_finite_differences(seed, temperature, scale, softcap, biased):
    """Of a random mix of logprobs and entropies, in a random direction of hidden states, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 5), (7, 5), *[(7,)] * biased]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    targets_C = torch.randint(7, (4,), generator=generator)
    mix_C, bonus_C = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    moves = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in tensors]

    def value(step: float, gradient: bool = False):
        inputs = [(tensor + step * move).requires_grad_(gradient) for tensor, move in zip(tensors, moves, strict=True)]
        arguments = [*inputs, *[None] * (not biased), targets_C, temperature, True, head.Shaping(scale, softcap)]
        logprobs_C, entropy_C = head._Logprobs.apply(*arguments)
        return (logprobs_C * mix_C + entropy_C * bonus_C).sum(), inputs

    total, inputs = value(0.0, gradient=True)
    slopes = torch.autograd.grad(total, inputs)
    slope = sum((gradient * move).sum().item() for gradient, move in zip(slopes, moves, strict=True))
    step = 3e-3  # the logits are in float32
    difference = (value(step)[0] - value(-step)[0]).item() / (2 * step)
    assert slope == pytest.approx(difference, rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (3.0, 2.0)])
def test_the_head_gives_what_autograd_gives_through_all_logits(scale, softcap, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", chunk)
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 7)
    hidden_CD, targets_C = torch.randn(8, 5, requires_grad=True), torch.randint(7, (8,))
    logits_CV = linear(hidden_CD) * scale
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    log_probs_CV = torch.log_softmax(logits_CV / TEMPERATURE, -1)
    expected_C = log_probs_CV.gather(1, targets_C[:, None])[:, 0]
    expected_entropy_C = -(log_probs_CV.exp() * log_probs_CV).sum(1)
    ours = head.LogprobHead(linear, head.Shaping(scale, softcap))(hidden_CD, targets_C, TEMPERATURE, True)
    weights_C, bonus_C = torch.randn(8), torch.randn(8)
    wanted = [hidden_CD, linear.weight, linear.bias]
    torch.testing.assert_close(ours, (expected_C, expected_entropy_C), atol=1e-6, rtol=1e-5)
    found, expected = (
        torch.autograd.grad((logprobs_C * weights_C + entropy_C * bonus_C).sum(), wanted)
        for logprobs_C, entropy_C in (ours, (expected_C, expected_entropy_C))
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mask_with_holes_scores_the_trained_tokens_alone_and_sees_all():
    """Several turns: the words between them are seen, not scored."""
    samples = random_samples(5)
    masked = [
        replace(each, trained=tuple((place // 2 + row) % 2 == 0 for place in range(len(each.output_ids))))
        for row, each in enumerate(samples)
    ]
    model = tiny_model(attn_implementation="eager")
    expected_C, _ = row_logprobs(model, samples)
    scored_C = torch.tensor([trained for each in masked for trained in each.trained])
    weights_C = torch.randn(int(scored_C.sum()), generator=torch.Generator().manual_seed(1))
    (expected_C[scored_C] * weights_C).sum().backward()
    expected_gradients = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    logprobs_C, _ = make_policy(model, TEMPERATURE)(pack(masked))
    torch.testing.assert_close(logprobs_C, expected_C[scored_C], atol=1e-5, rtol=0)
    (logprobs_C * weights_C).sum().backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-4, rtol=1e-4)


def row_by_row_kernel(query, key, value, *, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa=False):
    """What the varlen kernel computes, on any device: [E, heads, head_dim] in and out."""
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
    grouped = {"enable_gqa": enable_gqa}
    outputs = []
    for start, end in pairwise(cu_seq_q.tolist()):
        rows = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, **grouped)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [7, 2])
def test_the_layout_for_the_varlen_kernel_gives_the_same_with_gradients(count, grouped, monkeypatch):
    """With the fused head of GPUs. `grouped`: whether the kernel knows of grouped heads; two rows share no prompt."""
    batch = pack(random_samples(count))
    policy = make_policy(tiny_model(), TEMPERATURE)

    def run():
        policy.zero_grad()
        logprobs_C, _ = policy(batch)
        weights_C = torch.randn(len(logprobs_C), generator=torch.Generator().manual_seed(1))
        (logprobs_C * weights_C).sum().backward()
        return logprobs_C, {name: param.grad.clone() for name, param in policy.named_parameters()}

    expected = run()
    monkeypatch.setattr(policy_module, "Layout", lambda batch, flash: attention.Layout(batch, flash=True))
    monkeypatch.setattr(kernels, "varlen_attn", row_by_row_kernel)
    monkeypatch.setattr(kernels, "GROUPED", grouped)
    policy.causal_lm.get_output_embeddings().fused = True
    torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)


def test_rows_do_not_see_each_other():
    samples = random_samples(5)
    assert samples[1].prompt_ids == samples[2].prompt_ids
    samples[1] = replace(samples[1], prompt_ids=(5,) * len(samples[1].prompt_ids))  # else fewer tokens: other rounding
    policy = make_policy(tiny_model(), TEMPERATURE)
    changed = [
        *samples[:2],
        replace(samples[2], prompt_ids=tuple(60 - token for token in samples[2].prompt_ids)),
        *samples[3:],
    ]
    rows_C = pack(samples).rows_C
    before_C, after_C = policy(pack(samples))[0], policy(pack(changed))[0]
    assert torch.equal(before_C[rows_C != 2], after_C[rows_C != 2])
    assert not torch.isclose(before_C[rows_C == 2], after_C[rows_C == 2]).all()


def test_a_shared_prompt_is_forwarded_once_and_leaks_nothing():
    first, second = random_samples(3)[1:]
    assert first.prompt_ids == second.prompt_ids
    policy = make_policy(tiny_model(), TEMPERATURE)
    batch = pack([first, second])
    assert len(batch.input_ids_T) == len(first.prompt_ids + first.output_ids + second.output_ids) - 2
    alone_C = torch.cat([policy(pack([sample]))[0] for sample in (first, second)])
    torch.testing.assert_close(policy(batch)[0], alone_C, atol=1e-5, rtol=0)
    other = replace(first, output_ids=tuple(60 - token for token in first.output_ids))
    assert torch.equal(policy(pack([other, second]))[0][batch.rows_C == 1], policy(batch)[0][batch.rows_C == 1])


def test_a_token_sees_only_what_is_before_it():
    (sample,) = random_samples(1, seed=4)
    other = replace(sample, output_ids=sample.output_ids[:-2] + (1, 2))
    policy = make_policy(tiny_model(), TEMPERATURE)
    before_C, after_C = policy(pack([sample]))[0], policy(pack([other]))[0]
    assert torch.equal(before_C[:-2], after_C[:-2])


def test_temperature_can_be_replaced_and_a_filler_is_scored():
    samples = random_samples(3)
    model = tiny_model()
    expected_C, _ = row_logprobs(model, samples, temperature=1.0)
    policy = make_policy(model, TEMPERATURE)
    torch.testing.assert_close(policy(pack(samples), temperature=1.0)[0], expected_C, atol=1e-5, rtol=0)
    assert policy(pack([]))[0].isfinite().all()


def test_dropout_is_off():
    model = tiny_model(attention_dropout=0.5)
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    policy = make_policy(model, TEMPERATURE).train()
    batch = pack(random_samples(3))
    assert torch.equal(policy(batch)[0], policy(batch)[0])


def test_the_head_shares_the_weight_and_keeps_its_name():
    tied, untied = make_policy(tiny_model(), 1.0).causal_lm, make_policy(tiny_model(tied=False), 1.0).causal_lm
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert "lm_head.weight" in dict(untied.named_parameters())


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_scaling", "logit_scale"])
def test_logits_that_the_model_may_not_make_so_are_refused(name):
    model = tiny_model()
    setattr(model.config, name, 30.0)
    with pytest.raises(ConfigError, match=f"llama .* its logits is not known .*{name} 30"):
        make_policy(model, 1.0)
