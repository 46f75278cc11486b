"""What a model came with is saved as it came, or refused before the first step, by the name of its file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)

from grpo.config import Config
from grpo.data.generation import load_generation_config
from grpo.errors import CheckpointError, ConfigError
from grpo.trainer.saving import prepare_saving, write_policy
from grpo.trainer.weights import LiveWeights, persistent_buffers
from tests.models import SHAPE, tiny_folder
from tests.trainer.test_policy_trainer import settings

GENERATION = "generation_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def save(folder: Path, out: Path, weights: bool = True) -> Any:
    """As a rank does: load, prepare, write."""
    config = settings(folder)
    load_generation_config(config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prepare_saving(model)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()} | persistent_buffers(model)
    write_policy(model, out, tensors if weights else {}, config)
    return model


@pytest.mark.parametrize(
    "shipped",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]},
        {"temperature": 0.6},
        {"pad_token_id": -1},
        {"early_stopping": True, "length_penalty": 2.0, "num_beams": 1},
        {"do_sample": True, "temperature": 0.0, "max_new_tokens": 2048},
        {"output_scores": True, "bos_token_id": 1},
    ],
    ids=str,
)
def test_generation_settings_go_out_as_they_came_in(folder: Path, tmp_path: Path, shipped: dict[str, Any]) -> None:
    (folder / GENERATION).write_text(json.dumps(shipped))
    save(folder, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / GENERATION).read_text())
    defaults = {"num_beams": 1}  # which transformers leaves out
    assert {**defaults, **saved}.items() >= shipped.items()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("shipped", [{"temperature": 0.5}, {"do_sample": True, "top_k": 7}, {"num_beams": 4}], ids=str)
@pytest.mark.parametrize("with_file", [True, False])
def test_generation_settings_inside_config_json(
    folder: Path, tmp_path: Path, shipped: dict[str, Any], with_file: bool
) -> None:
    """Where there is no file of their own they move into one; else transformers has passed them over."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | shipped))
    if not with_file:
        (folder / GENERATION).unlink()
    save(folder, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text()).keys() & shipped.keys()
    moved = json.loads((tmp_path / "out" / GENERATION).read_text())
    assert (moved.items() >= shipped.items()) != with_file


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "valid JSON"),
        ("[1, 2]", "mapping"),
        ('{"early_stopping": "yes"}', "early_stopping"),
        ('{"max_new_tokens": 0}', "max_new_tokens"),
        ('{"cache_implementation": "nonsense"}', "nonsense"),
    ],
)
def test_settings_that_nobody_can_read_are_refused_by_the_name_of_the_file(
    folder: Path, text: str, reason: str
) -> None:
    (folder / GENERATION).write_text(text)
    with pytest.raises(ConfigError, match=rf"{folder}: {GENERATION} must hold .*{reason}.*; correct the file"):
        load_generation_config(settings(folder))


def test_no_file_is_no_error(folder: Path) -> None:
    (folder / GENERATION).unlink()
    assert load_generation_config(settings(folder)) is None


def test_a_trial_writes_all_but_the_weights(folder: Path, tmp_path: Path) -> None:
    save(folder, tmp_path / "out", weights=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", GENERATION, "tokenizer.json"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("w7") == 7


def test_what_cannot_be_written_has_a_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwritable:
        def save_pretrained(self, path: Path) -> None:
            raise AttributeError("'NoneType' object has no attribute 'save'\nat line 3")

    def load(config: Config) -> Unwritable:
        return Unwritable()

    monkeypatch.setattr("grpo.trainer.saving.load_tokenizer", load)
    with pytest.raises(ConfigError, match=r"cannot write its tokenizer \(AttributeError: .*'save'\); correct"):
        save(folder, tmp_path / "out", weights=False)
    with pytest.raises(CheckpointError, match="never overwritten"):
        save(folder, tmp_path / "out")


EXPERTS = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "llama"])
def test_a_saved_policy_is_the_whole_state(family: str, tmp_path: Path) -> None:
    """Experts' score corrections are buffers: without them the same weights choose other experts."""
    folder = tiny_folder(tmp_path / "model")
    if family != "llama":
        torch.manual_seed(0)
        sizes = SHAPE | EXPERTS | GROUPS | {"initializer_range": 0.2}
        made = (
            DeepseekV3Config(**sizes | LATENT) if family == "deepseek_v3" else Glm4MoeConfig(**sizes | {"head_dim": 8})
        )
        model = AutoModelForCausalLM.from_config(made)
        for name, tensor in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.3)
        model.save_pretrained(folder)
    model = save(folder, tmp_path / "out").eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    kept = {name: torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()}
    assert all(kept.values()), kept
    corrections = [name for name in persistent_buffers(model) if "correction" in name]
    assert bool(corrections) == (family != "llama") or family == "deepseek_v3"


TWO_OF_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "made",
    [
        LlamaConfig(**SHAPE, tie_word_embeddings=True),
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
        *(kind(**SHAPE, **TWO_OF_FOUR) for kind in (MixtralConfig, PhimoeConfig, GraniteMoeConfig)),
        GptOssConfig(**SHAPE, **TWO_OF_FOUR, head_dim=8),
    ],
    ids=lambda made: str(made.model_type),
)
def test_engines_get_the_tensors_that_a_checkpoint_holds(made: Any, tmp_path: Path) -> None:
    """transformers fuses experts and renames tensors as it loads; an engine knows the names of its own start."""
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights, saved = LiveWeights(model), load_file(tmp_path / "model.safetensors")
    sent = dict(weights.published())
    assert set(sent) == set(saved) and all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())
    announced = [(record.name, record.shape) for record in weights.records()]
    assert announced == [(name, tuple(tensor.shape)) for name, tensor in sent.items()]
    assert [record.name for record in weights.param_records()] == [name for name, _ in model.named_parameters()]
    converted = {"qwen3_moe", "mixtral", "phimoe"}  # their experts: a copy of each is made
    assert isinstance(weights.published(), list) == (made.model_type not in converted)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
        next(model.parameters()).data = torch.ones_like(next(model.parameters()))
    again = dict(weights.published())
    assert [bool(tensor.any()) for name, tensor in again.items()] == ["embed_tokens" in name for name in again]


def test_a_hub_models_settings_are_read_from_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine without a network: nobody is asked whether there is such a file."""
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    config = Config.model_validate({"model": {"path": "owner/tiny", "revision": "a" * 40}})
    assert load_generation_config(config) is None
