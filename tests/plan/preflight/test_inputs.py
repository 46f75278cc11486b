"""Model, rows and secrets."""

import socket
from pathlib import Path
from typing import Any

import pytest

from grpo.plan.preflight import inputs
from grpo.plan.preflight.facts import look
from grpo.plan.preflight.verdict import Check
from grpo.rewards import process
from grpo.rewards.sandbox import landlock
from tests.plan.preflight.sites import VERSIONS, config, facts, node, site


def test_the_first_rows_are_read(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n' * 5)
    wanted = {"data": {"source": str(rows)}, "eval": {"prompts": 0}}
    assert inputs.data(config(**wanted)) == Check("data", "ok", f"{rows} opens (3 rows looked at)")
    rows.unlink()
    assert inputs.data(config(**wanted)).status == "failed"
    assert inputs.data(config()).text.count("arithmetic/") == 2


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
