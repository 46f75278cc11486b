"""What config.json says of a model, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config
from grpo.config.architecture import UNSYNCED, check_model_config, describe, refusal
from grpo.config.model_types import REFUSED, SUPPORTED
from grpo.errors import ConfigError

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


def refused(changes: dict[str, Any], max_length: int = 1024, device: str | None = None) -> str | None:
    return refusal(LLAMA | changes, Config.model_validate({"model": {"path": "x", "max_length": max_length}}), device)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}},  # transformers has its own
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 256},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1024}},
        {"sliding_window": 16},
        {"dtype": "auto"},
        {"model_type": "llama4_text", "attn_temperature_tuning": False},
        {"quantization_config": None, "is_encoder_decoder": False, "architectures": None},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 1024},
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
        {"num_attention_heads": 4},
    ],
    ids=str,
)
def test_a_model_that_can_be_used(changes: dict[str, Any]) -> None:
    assert refused(changes) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": 7}, "names no model_type"),
        ({"model_type": "bloom"}, "architecture bloom adds ALiBi"),
        ({"model_type": "llama4_text"}, "scales queries by place in the whole batch"),
        ({"model_type": "rwkv"}, "architecture rwkv has layers that carry a state"),
        ({"model_type": "qwen3_next"}, "carry a state"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "decoder of an encoder-decoder"),
        ({"model_type": "llava"}, "architecture llava is not among those"),
        ({"model_type": "chatglm", "auto_map": {"AutoModel": "x.Y"}}, "chatglm is code in the checkpoint (auto_map)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "it is a LlamaForSequenceClassification"),
        ({"architectures": ["T5EncoderModel"]}, "it is a T5EncoderModel"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"use_bidirectional_attention": "all"}, "sees both ways"),
        ({"is_causal": False}, "sees both ways"),
        ({"position_embedding_type": "alibi"}, "ALiBi"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantised (gptq)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised (mxfp4)"),
        ({"compression_config": {"format": "x"}}, "quantised (unknown method)"),
        ({"torch_dtype": "float8_e4m3fn", "dtype": None}, "weights are float8_e4m3fn"),
        (
            {"max_position_embeddings": 1023},
            "max_length = 1024 must fit the model's positions, which end at 1023",
        ),
        ({"max_position_embeddings": None, "n_positions": 512}, "end at 512"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 511}, "end at 1022"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512}, "end at 512"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE is dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, "RoPE is dynamic"),
        ({"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 1000}}, "longer than 1000 tokens"),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 512}, "lower model.max_length to 512"),
        ({"rope_scaling": 7}, "a value in config.json is not of its kind"),
        ({"max_position_embeddings": "long"}, "not of its kind"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_used_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    problem = refused(changes)
    assert problem is not None and said in problem
    assert "\n" not in problem and any(way in problem for way in ("choose", "lower", "repair", "convert", "whole"))


@pytest.mark.parametrize(
    ("device", "changes", "fits"),
    [
        ("cpu", {"num_attention_heads": 4}, False),
        ("cpu", {"head_dim": 16}, False),
        ("cpu", {"head_dim": 64}, True),
        ("cuda", {"head_dim": 16}, True),
        ("cpu", {"kv_lora_rank": 16, "num_attention_heads": 4}, True),
    ],
)
def test_the_size_of_a_head_counts_on_the_cpu(device: str, changes: dict[str, Any], fits: bool) -> None:
    problem = refused(changes, device=device)
    assert (problem is None) == fits and (fits or "vLLM on the CPU" in str(problem))


def test_what_is_said_of_attention_and_weights() -> None:
    found = describe(LLAMA | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2})
    assert found.windows == (8, None, 8, None)
    assert (found.model_type, found.dtype, found.positions, found.head_dim) == ("llama", "bfloat16", 2048, 32)
    assert describe(LLAMA | {"sliding_window": 8}).windows == (8,) * 4
    assert describe(LLAMA | {"sliding_window": 8, "use_sliding_window": False}).windows == (None,) * 4
    assert describe(LLAMA | {"quantization_config": {"quant_method": "awq"}}).quantised == "awq"


def test_it_is_read_from_the_models_folder(tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"path": str(tmp_path), "max_length": 4096}})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ConfigError, match=f"model.path = {tmp_path}: model.max_length = 4096 must fit"):
        check_model_config(config)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 4096}))
    assert check_model_config(config).positions == 4096
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        check_model_config(config)


def test_an_architecture_is_supported_or_refused() -> None:
    assert not SUPPORTED & set(REFUSED)


@pytest.mark.parametrize("name", UNSYNCED)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_whose_engine_takes_no_new_weights_is_refused_by_name(name: str, device: str) -> None:
    """The trainer computes it; found at the first sync otherwise, a minute after the start."""
    assert name in SUPPORTED
    assert f"its architecture {name} takes no new weights" in str(refused({"model_type": name}, device=device))
