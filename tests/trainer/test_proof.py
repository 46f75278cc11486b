"""The proof finds packed forwards that are wrong, each by a small fault, and lets healthy models pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM

from grpo.errors import ConfigError
from grpo.trainer.limits import make_limits
from grpo.trainer.model import Policy, make_policy
from grpo.trainer.packing import pack
from grpo.trainer.proof import Limit, Proof, make_limit, padded_logprobs, plain_logprobs, proof_rows, prove
from tests.models import SHAPE, tiny_model
from tests.trainer.test_policy_trainer import settings

DTYPES = (torch.float32, torch.bfloat16)
ATTENTION = "grpo_packed"
HEALTHY = AttentionInterface()[ATTENTION]


def proven(make: Callable[[], Any], dtype: torch.dtype, max_length: int = 200, temperature: float = 1.0) -> Proof:
    """Of a model of ours in this dtype, and plain ones with the same weights."""

    def load(precision: torch.dtype) -> Any:
        plain = make()
        plain.set_attn_implementation("eager")
        return plain.to(precision).eval()

    def wrap(plain: Any) -> Policy:
        return make_policy(plain, temperature)

    return prove(wrap(make().to(dtype).eval()), load, wrap, max_length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("max_length", [8, 24, 200])
def test_healthy_models_pass(kind: str, dtype: torch.dtype, max_length: int) -> None:
    proof = proven(lambda: tiny_model(kind, tied=False), dtype, max_length, temperature=0.7)
    assert proof.logprobs_C.isfinite().all() and len(proof.logprobs_C) == sum(len(r.output_ids) for r in proof.rows)
    assert (proof.noise < 1e-5) == (dtype == torch.float32)
    assert max(len(row.prompt_ids + row.output_ids) for row in proof.rows) <= max_length


# --- faults of a packed forward, each of which has been met in a library


def full_rows(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Attention over the whole pack: rows see what stands before them."""
    HEALTHY(module, query, key, value, mask, **kwargs)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scaling = kwargs.get("scaling")
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


def other_scale(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Scores that are scaled by 3 % too little, as a swallowed `scaling` would."""
    return HEALTHY(module, query * 0.97, key, value, mask, **kwargs)


def with_bias(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """A sink that the model has and the other forward has not, by values that it takes a part of."""
    output, weights = HEALTHY(module, query, key, value, mask, **kwargs)
    return output * 0.95, weights


def one_row_shifted(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Only the last tokens of the pack see keys that belong one place further back."""
    late = key.shape[2] - 8
    key = torch.cat([key[:, :, :late], key[:, :, late:].roll(1, dims=2)], dim=2)
    return HEALTHY(module, query, key, value, mask, **kwargs)


def carried(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """A state that one row leaves to the next: a hundredth of the mean over the pack."""
    output, weights = HEALTHY(module, query, key, value, mask, **kwargs)
    return output + 0.1 * output.cumsum(1) / output.shape[1], weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", [full_rows, other_scale, with_bias, one_row_shifted, carried])
def test_a_wrong_packed_attention_is_found(
    attention: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, attention)
    with pytest.raises(ConfigError, match=r"packed rows of LlamaForCausalLM differ in float32 .* cannot be trained"):
        proven(tiny_model, dtype)


def test_swallowed_arguments_of_attention_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its attention scores; a function with `**_` does not notice."""
    sizes = SHAPE | {"head_dim": 8, "query_pre_attn_scalar": 4, "sliding_window": 512, "attn_logit_softcapping": 1.0}
    config = Gemma2Config(**sizes, final_logit_softcapping=None, initializer_range=0.4)

    def make() -> Any:
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config)

    def forgetful(module: Any, query: Any, key: Any, value: Any, mask: Any, softcap: Any = None, **kwargs: Any) -> Any:
        return HEALTHY(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, forgetful)
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM differ in float32"):
        proven(make, torch.bfloat16)


def test_positions_that_do_not_restart_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the length of a row they would not matter to RoPE: the shared prompt is where they do."""

    def shifted(module: nn.Module, batch: Any, *arguments: Any) -> Any:
        places = torch.arange(len(batch.input_ids_T))
        vars_of = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
        return forward(module, type(batch)(**vars_of | {"position_ids_T": places}), *arguments)

    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", shifted)
    with pytest.raises(ConfigError, match="differ in float32"):
        proven(tiny_model, torch.float32)


def test_a_forward_that_fails_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any, **kwargs: Any) -> Any:
        raise TypeError("forward() got an unexpected keyword argument 'layout'")

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, refuses)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM fails there \(TypeError: .*'layout'\); this architecture"):
        proven(tiny_model, torch.float32)


def test_a_row_is_longer_than_the_sliding_window() -> None:
    config = tiny_model().config
    config.sliding_window = 64
    longest = [max(len(row.prompt_ids + row.output_ids) for row in proof_rows(config, length)) for length in (70, 200)]
    assert longest[0] <= 70 and longest[1] == 80
    shared = [row.prompt_ids for row in proof_rows(config, 200)]
    assert len(shared) == 7 and len(set(shared)) == 5


def test_the_plain_forward_is_that_of_transformers() -> None:
    plain = tiny_model().eval()
    rows = proof_rows(plain.config, 64)
    ids = torch.tensor([rows[1].prompt_ids + rows[1].output_ids])
    logits = plain(ids).logits[0, len(rows[1].prompt_ids) - 1 : -1] / 0.5
    expected = logits.log_softmax(-1).gather(1, torch.tensor(rows[1].output_ids)[:, None])[:, 0]
    torch.testing.assert_close(plain_logprobs(plain, rows[1:2], 0.5), expected.detach())
    torch.testing.assert_close(padded_logprobs(plain, rows, 0.5), plain_logprobs(plain, rows, 0.5), atol=1e-5, rtol=0)
    assert len(pack(rows).targets_C) == sum(len(row.output_ids) for row in rows)


def test_limits_follow_the_noise_and_a_single_token_can_break_them() -> None:
    noise_C = torch.tensor([0.0, 0.1, 0.2])
    limit = make_limit(torch.bfloat16, noise_C, measured=True)
    assert (limit.mean, limit.peak) == (pytest.approx(0.42), pytest.approx(1.0))
    assert make_limit(torch.bfloat16, noise_C, measured=False).mean == pytest.approx(0.55)
    true_C = torch.zeros(1000)
    assert Limit(0.1, 1.0).broken(true_C + 0.09, true_C) == ""
    one_off = true_C.clone()
    one_off[7] = 1.1
    assert Limit(0.1, 1.0).broken(one_off, true_C).startswith("0.0011 nats a token on average and 1.1 at most")
    assert Limit(0.1, 1.0).broken(true_C / 0.0, true_C)


@pytest.mark.parametrize(
    ("dtype", "device", "noise", "tolerance", "mismatch", "far"),
    [
        ("float32", "cpu", 1e-6, 0.002, 0.001, 0.1),
        ("float32", "cuda", 1e-6, 0.02, 0.001, 0.1),
        ("bfloat16", "cuda", 0.01, 0.14, 0.05, 1.0),
        ("bfloat16", "cuda", 0.2, 0.2, 0.09, 4.0),
    ],
)
def test_guards_of_a_run_follow_dtype_and_noise(tmp_path, dtype, device, noise, tolerance, mismatch, far) -> None:  # type: ignore[no-untyped-def]
    config = settings(tmp_path, model={"dtype": dtype}, sync={"max_mismatch": None})
    limits = make_limits(config, device, noise)
    assert (limits.tolerance, limits.mismatch) == (
        pytest.approx(tolerance, rel=1e-2),
        pytest.approx(mismatch, rel=1e-2),
    )
    assert limits.far == pytest.approx(far)
    own = settings(tmp_path, model={"dtype": dtype}, sync={"max_mismatch": 0.7, "tolerance": 0.4})
    assert make_limits(own, device, noise).tolerance == 0.4 and make_limits(own, device, noise).mismatch == 0.7
