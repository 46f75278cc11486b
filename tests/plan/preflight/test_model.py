"""The model as each node finds it."""

import json
from pathlib import Path

import pytest

from grpo.plan.preflight import inputs
from grpo.plan.preflight.facts import look
from grpo.plan.preflight.model import ModelFiles, look_at_model
from tests.plan.preflight.sites import closed_port, config, two


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "a.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_a_models_files_must_be_there_and_the_same(model_folder: Path) -> None:
    def seen(weights: bool = True) -> ModelFiles:
        return look_at_model(config(model={"path": str(model_folder)}), weights)

    whole = seen()
    assert (whole.problem, "1 files of weights, 2 bytes" in whole.found) == ("", True)
    (model_folder / "a.safetensors").write_text("{ }")
    assert seen().identity != whole.identity
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
