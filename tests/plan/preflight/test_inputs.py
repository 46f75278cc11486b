"""Model, rows and secrets."""

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from grpo.data.tokenizer import load_tokenizer
from grpo.plan.preflight import inputs
from grpo.plan.preflight.facts import look
from grpo.plan.preflight.verdict import Check
from grpo.rewards import process
from grpo.rewards.sandbox import landlock
from tests.plan.preflight.sites import VERSIONS, config, facts, node, site


def test_every_row_is_read_and_one_prompt_is_shown(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"question": "1+1?", "answer": "#### 2"}
    rows.write_text("".join(json.dumps(row | {"question": question}) + "\n" for question in ("1+1?", "2+0?", "1+1?")))
    wanted = config(data={"source": str(rows), "prompt_format": "{question}\nAnswer:\n"}, eval={"prompts": 0})
    data, prompt = inputs.data(site(wanted, {}))
    assert data.status == "warning" and "1 of 3 prompts are copies of others (1 = 3)" in data.text
    assert "(3 prompts to train on)" in data.text
    tokens = load_tokenizer(wanted)("1+1?\nAnswer:\n")["input_ids"]
    assert prompt == Check("prompt", "ok", f"{len(tokens)} tokens: 1+1?\\nAnswer:\\n {tokens}")
    rows.write_text(json.dumps(row | {"answer": "two"}))
    (failed,) = inputs.data(site(wanted, {}))
    assert failed.status == "failed" and f"{rows}:1: answer: " in failed.text
    rows.unlink()
    assert [check.status for check in inputs.data(site(wanted, {}))] == ["failed"]


def test_skipped_rows_and_a_template_are_told(tmp_path: Path) -> None:
    rows, template = tmp_path / "rows.jsonl", tmp_path / "chat.jinja"
    rows.write_text('{"question": "1+1?", "answer": "2"}\nnull\n')
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    asked = {"source": str(rows), "chat_template": str(template), "chat_template_kwargs": {"thinking": False}}
    data, prompt = inputs.data(site(config(data=asked | {"on_bad_row": "skip"}, eval={"prompts": 0}), {}))
    assert data.status == "warning" and "1 bad rows are skipped" in data.text
    assert f"data.chat_template_kwargs.thinking: data.chat_template: {template} never reads it" in data.text
    assert "user: 1+1?" in prompt.text
    asked["chat_template"] = str(tmp_path / "none.jinja")
    (failed,) = inputs.data(site(config(data=asked, eval={"prompts": 0}), {}))
    assert "data.chat_template: there is no file" in failed.text


def test_rows_of_the_hub_are_not_loaded_and_a_made_up_one_is_shown() -> None:
    data, prompt = inputs.data(site(config(data={"source": "a/b", "revision": "a" * 40}), {}))
    assert "a/b/train at aaaaaaaaaaaa on the hub" in data.text or "cache" in data.text
    assert prompt.status == "ok" and "of a made-up row" in prompt.text and "What is 1 + 1?" in prompt.text


@pytest.mark.parametrize("path", [{"path": "owner/model", "revision": "a" * 40}, {"path": "./nowhere"}])
def test_without_the_model_no_row_is_looked_at(path: dict[str, str]) -> None:
    broken = dataclasses.replace(facts().model, problem="gone")
    (check,) = inputs.data(site(config(model=path), {}, driver=facts(model=broken)))
    assert (check.status, check.text) == ("warning", "not looked at without the model's tokenizer")


def test_a_tokenizer_that_is_broken_where_the_model_seems_whole_fails(tmp_path: Path) -> None:
    (failed,) = inputs.data(site(config(model={"path": str(tmp_path)}), {}))
    assert failed.status == "failed" and "no tokenizer can be loaded" in failed.text


@pytest.mark.parametrize(
    ("sections", "driver", "status"),
    [
        ({}, {}, "ok"),
        ({"metrics": {"wandb_project": "p"}}, {}, "failed"),
        ({"metrics": {"wandb_project": "p"}}, {"versions": VERSIONS | {"wandb": "1"}}, "failed"),
        (
            {"metrics": {"wandb_project": "p"}},
            {"versions": VERSIONS | {"wandb": "1"}, "secrets": frozenset({"wandb"})},
            "ok",
        ),
        ({"metrics": {"mlflow_uri": "http://x"}}, {}, "failed"),
        ({"checkpoint": {"dir": "s3://bucket/x"}}, {"secrets": frozenset({"s3"})}, "warning"),
        ({"model": {"path": "a/b", "revision": "a" * 40}}, {"secrets": frozenset({"huggingface"})}, "warning"),
    ],
)
def test_secrets_are_looked_for_where_they_are_used(
    sections: dict[str, Any], driver: dict[str, Any], status: str
) -> None:
    found = {node("t", "trainer"): facts()}
    assert inputs.secrets(site(config(**sections), found, driver=facts(**driver))).status == status


def test_reward_services_are_reached_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEY", raising=False)
    assert inputs.services(config()) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/score"
        assert inputs.services(config(rewards=[{"url": url}])) == [Check("rewards", "ok", f"reached: {url}")]
        (check,) = inputs.services(config(rewards=[{"url": url, "token_variable": "KEY"}]))
        assert (check.status, "variable KEY" in check.text) == ("failed", True)
    (check,) = inputs.services(config(rewards=[{"url": url}]))
    assert (check.status, url in check.text) == ("failed", True)


def test_reward_code_is_imported_behind_its_fence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(prompt, completion, answer): return 1.0\n")
    assert inputs.reward_code(config()) == []
    assert inputs.reward_code(config(rewards=[{"url": "http://127.0.0.1:9/score"}])) == []
    own = {"rewards": [{"function": "mine:f"}]}
    (check,) = inputs.reward_code(config(**own, reward_code={"isolation": "none"}))
    assert (check.status, "runs without a fence" in check.text) == ("warning", True)
    (check,) = inputs.reward_code(config(rewards=[{"function": "mine:g"}], reward_code={"isolation": "none"}))
    assert (check.status, "has no function 'g'" in check.text) == ("failed", True)
    if landlock.abi():
        assert inputs.reward_code(config(**own)) == [Check("reward code", "ok", "imported behind its fence: mine:f")]
    monkeypatch.setattr(
        process,
        "BOOT",
        process.BOOT.replace("main()", "main.__globals__['seccomp'].restrict = lambda network: None\nmain()"),
    )
    (check,) = inputs.reward_code(config(**own))
    assert check.status == "failed" and "lacks seccomp" in check.text and "reward_code.isolation: none" in check.text


def test_secrets_are_told_by_name_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("hf_hidden")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hidden")
    seen = look(config())
    assert seen.secrets == {"huggingface", "s3"} and "hidden" not in repr(seen)
