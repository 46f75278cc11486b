"""The model as each node finds it."""

import json
from pathlib import Path

import pytest

from grpo.plan.preflight import inputs
from grpo.plan.preflight.facts import look
from grpo.plan.preflight.model import ModelFiles, look_at_model
from tests.plan.preflight.sites import closed_port, config, site, two


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_a_models_files_must_be_there_and_the_same(model_folder: Path) -> None:
    def seen(weights: bool = True) -> ModelFiles:
        return look_at_model(config(model={"path": str(model_folder)}), weights)

    whole = seen()
    assert (whole.problem, "1 files of weights, 2 bytes" in whole.found) == ("", True)
    (model_folder / "model.safetensors").write_text("{ }")
    assert seen().identity != whole.identity
    (model_folder / "model.safetensors").rename(model_folder / "a.safetensors")
    assert "has no weights (model.safetensors or" in seen().problem, "transformers reads none of another name"
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors" in seen().problem
    assert seen(weights=False) == ModelFiles(f"{model_folder}: configuration and tokenizer")
    (model_folder / "config.json").unlink()
    assert "config.json" in seen(weights=False).problem
    unequal = inputs.model(two("cpu", "trainer", model=ModelFiles("another", identity="other")))
    assert unequal.status == "failed" and "trainer: other files (another) than driver" in unequal.text


def test_a_hub_model_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = config(model={"path": "nobody/nothing", "revision": "a" * 40})
    assert look_at_model(hub) == ModelFiles("nobody/nothing at aaaaaaaaaaaa on the hub, to be downloaded", cached=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert "127.0.0.1 cannot be reached" in look(hub).model.problem
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in look(hub).model.problem


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"model_type": "bloom"}, "architecture bloom adds ALiBi"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "weights are quantised (awq)"),
        ({"model_type": "qwen3", "max_position_embeddings": 100}, "positions, which end at 100"),
    ],
)
def test_what_config_json_says_against_the_model_is_said(model_folder: Path, said: object, problem: str) -> None:
    (model_folder / "config.json").write_text(json.dumps(said))
    assert problem in look_at_model(config(model={"path": str(model_folder)}), weights=False).problem


def test_the_size_of_a_head_is_judged_on_the_device_that_was_found(model_folder: Path) -> None:
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    (model_folder / "config.json").write_text(json.dumps(sizes))
    wanted = config(model={"path": str(model_folder)})
    refused = inputs.model(site(wanted, {}, "cpu"))
    assert refused.status == "failed" and "heads have 16 numbers" in refused.text
    assert inputs.model(site(wanted, {}, "cuda")).status == "ok"


@pytest.mark.parametrize(
    ("weights", "tokenizer"),
    [
        ({"pytorch_model.bin": "{}"}, "tokenizer.json"),
        ({"pytorch_model.bin.index.json": '{"weight_map": {"x": "a.bin"}}', "a.bin": "{}"}, "tokenizer.model"),
        ({"model.safetensors": "{}"}, "tekken.json"),
    ],
)
def test_what_train_reads_is_there(tmp_path: Path, weights: dict[str, str], tokenizer: str) -> None:
    for name, text in {**weights, tokenizer: "{}", "config.json": '{"model_type": "llama"}'}.items():
        (tmp_path / name).write_text(text)
    found = look_at_model(config(model={"path": str(tmp_path)}))
    assert (found.problem, "1 files of weights" in found.found) == ("", True)


@pytest.mark.parametrize("text", ["{", '{"early_stopping": "yes"}', '{"max_new_tokens": 0}'])
def test_generation_settings_that_a_start_would_refuse_are_named(model_folder: Path, text: str) -> None:
    (model_folder / "generation_config.json").write_text(text)
    found = inputs.model(site(config(model={"path": str(model_folder), "max_length": 512}), {}))
    assert found.status == "failed" and "generation_config.json must hold settings" in found.text
