"""A model's size, from its config.json alone."""

from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.plan.memory import make_plan
from grpo.plan.model_size import read_shape
from tests.plan.planned import SMOLLM2, config


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("variant", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False, "head_dim": 12}])
def test_parameters_are_those_that_transformers_makes(tmp_path: Path, model_type: str, variant: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type in ("llama", "qwen3"):
        variant = variant | {"attention_bias": True}
    if model_type == "llama":
        variant = variant | {"mlp_bias": True}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 101}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model_config = AutoConfig.for_model(model_type, **sizes, **heads, **variant)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    model_config.save_pretrained(tmp_path)
    shape = read_shape(Config.model_validate({"model": {"path": str(tmp_path)}}))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({**SMOLLM2, "model_type": "gpt2"}, "plan knows the model types llama"),
        ({"model_type": "llama"}, "'num_attention_heads' is missing"),
        ({**SMOLLM2, "h": "big"}, "a value in config.json is not of its kind"),
        ({**SMOLLM2, "i": "big"}, "a size is not a positive integer"),
        ({**SMOLLM2, "H": 0}, "a size is not a positive integer"),
        ({**SMOLLM2, "L": -1}, "a size is below 1"),
        ({**SMOLLM2, "model_type": "bloom"}, "architecture bloom adds ALiBi"),
        ({**SMOLLM2, "max_position_embeddings": 64}, "positions, which end at 64"),
        ("[]", "must hold a JSON object"),
        ("{", "config.json cannot be read"),
    ],
)
def test_an_unusable_config_json_is_refused(tmp_path: Path, model: dict[str, Any] | str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_plan(config(tmp_path, model))


@pytest.mark.parametrize("path", ["nobody/nothing", "not an id", "/no/such/folder"])
def test_a_model_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="set model.path to a folder or a hub id"):
        make_plan(Config.model_validate({"model": {"path": path, "revision": "a" * 40}}))
