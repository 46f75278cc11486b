"""Every architecture of docs/models.md: packed = plain in value and gradient, and the others refused by name."""

import copy
import re

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo.config import Config
from grpo.config.architecture import refusal
from grpo.config.model_types import REFUSED, SUPPORTED
from grpo.errors import ConfigError
from grpo.trainer.model import make_policy
from grpo.trainer.packing import pack
from tests.models import random_samples
from tests.trainer.architectures import CASES, PAGE, VARIANTS, compare, measure, plain_logprobs, tiny

VALUE, GRADIENT = 1e-5, 1e-7
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_are_computed_as_each_alone(case):
    found = measure(case)
    assert found.value <= VALUE and found.gradient <= GRADIENT


@CUDA
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_too(case, monkeypatch):
    """In float32, with matrix products in full precision."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    name, changes = CASES[case]
    found = compare(tiny(name, **changes).cuda(), random_samples(7), "cuda")
    assert found.value <= 3e-5 and found.gradient <= 1e-6


@CUDA
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_in_bfloat16(case):
    """With the varlen kernel where it is used: no further from float32 than plain bfloat16 is, times three.

    Experts are chosen by rounded scores, so that of each row the median counts, not the worst token.
    """
    name, changes = CASES[case]
    samples = random_samples(24, seed=2)
    exact_C = plain_logprobs(tiny(name, **changes), samples).detach()
    model = tiny(name, **changes).to("cuda", torch.bfloat16)
    plain_C = plain_logprobs(model, samples, "cuda").detach().cpu()
    packed_C = make_policy(model, 0.7)(pack(samples).to(torch.device("cuda")))[0].detach().cpu()
    noise = (plain_C - exact_C).abs().median().item()
    assert (packed_C - exact_C).abs().median().item() <= 3 * noise + 0.01
    assert packed_C.isfinite().all()


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v3", "minicpm3", "gemma2", "gpt_oss", "llama", "phi3"])
def test_in_bfloat16_on_the_cpu_it_is_as_near_to_float32_as_the_plain_forward(case):
    samples = random_samples(24, seed=2)
    exact_C = plain_logprobs(tiny(case), samples).detach()
    model = tiny(case).bfloat16()
    plain_C = plain_logprobs(model, samples).detach()
    logprobs_C = make_policy(model, 0.7)(pack(samples))[0]
    logprobs_C.sum().backward()
    noise = (plain_C - exact_C).abs().median().item()
    assert (logprobs_C - exact_C).abs().median().item() <= 2 * noise
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_oss", "gemma2", "opt", "mixtral", "deepseek_v3", "llama4_text"])
def test_layers_that_are_computed_again_give_the_same_and_keep_less(case):
    """In the product's own mode, which is that of the loaded model, and in training mode."""
    name, changes = CASES[case]
    found = compare(tiny(name, **changes), random_samples(7), checkpointing=True)
    assert found.value <= VALUE and found.gradient <= GRADIENT

    def saved(checkpointing: bool) -> int:
        policy, kept = make_policy(tiny(name, **changes), 0.7, checkpointing), {}
        weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs_C, _ = policy(batch)
        del logprobs_C
        return sum(kept.values())

    batch = pack(random_samples(40))
    assert saved(True) < 0.6 * saved(False)


@pytest.mark.parametrize("case", ["seed_oss", "opt", "mixtral", "phimoe", "gpt2", "gpt_bigcode", "granite", "olmoe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_mode_brings_randomness(case, checkpointing):
    """Dropout, router jitter and skipped layers are configured, and off."""
    model, batch = tiny(case), pack(random_samples(7))
    expected_C = make_policy(copy.deepcopy(model), 0.7).eval()(batch)[0]
    policy = make_policy(model, 0.7, checkpointing)
    for set_mode in (policy.train, policy.causal_lm.train, policy.causal_lm.base_model.train):
        set_mode()
        torch.testing.assert_close(policy(batch)[0], expected_C, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_architecture_that_is_not_supported_is_refused_by_name(name):
    problem = refusal({"model_type": name}, Config.model_validate({"model": {"path": "x"}}))
    assert problem == f"its architecture {name} {REFUSED[name]}; choose a model of a type in docs/models.md"


SMALL = {"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 61}
UNFIT = {
    "bloom": ({"hidden_size": 32, "n_head": 2, "n_layer": 2, "vocab_size": 61}, "attention interface"),
    "gptj": (SMALL | {"rotary_dim": 8}, "attention interface"),
    "falcon": ({"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}, "attention interface"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "carries a state from token to token"),
    "lfm2": (
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
         "layer_types": ["conv", "full_attention"], "intermediate_size": 32},
        "carries a state from token to token",
    ),
    "modernbert-decoder": ({"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}, "has .'lm_head'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_does_not_fit_is_refused_even_where_its_name_is_not_known(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes, said = UNFIT[name]
    with pytest.raises(ConfigError, match=said):
        make_policy(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)), 1.0)


def test_a_layer_without_attention_is_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ConfigError, match="has 3 layers, 2 with attention"):
        make_policy(model, 1.0)(pack(random_samples(2)))


def test_every_causal_model_of_transformers_is_supported_or_refused():
    same_file = {"gpt-sw3": "gpt2"}  # saved under that name
    known = {same_file.get(name, name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert known <= SUPPORTED | set(REFUSED) and known >= SUPPORTED


def test_the_page_lists_what_is_supported_with_its_differences_and_what_is_not():
    page = PAGE.read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| ([\d.e+-]+ \| [\d.e+-]+) \|$", page, re.MULTILINE))
    assert list(rows) == [*sorted(SUPPORTED), *VARIANTS]
    for differences in rows.values():
        value, gradient = map(float, differences.split(" | "))
        assert value <= VALUE and gradient <= GRADIENT
    refused = {name: reason for reason, names in re.findall(r"^\| (\D[^|]+) \| ([a-z][^|]+) \|$", page, re.MULTILINE)
               for name in names.split(", ")}  # fmt: skip
    refused.pop("model_type", None)
    assert refused == REFUSED
