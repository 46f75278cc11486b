"""What lies on this machine becomes a file of the values, or a claim that is asked for; what pods have stays."""

from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.kubernetes import inputs
from grpo.kubernetes.inputs import in_pods, inputs_of
from tests.helm import job, run_yaml, template, validate

BASE = {"model": {"path": "/opt/grpo/examples/quickstart/model"}, "data": {"source": "arithmetic"}}


def made(**sections: Any) -> inputs.Inputs:
    return inputs_of(Config.model_validate(BASE | sections))


def rendered(found: inputs.Inputs) -> str:
    values = {"config": found.config, **found.values, "image": {"registry": "r.example"}}
    validate(job(values, profile=None))
    return run_yaml(template(values, profile=None))


def test_how_it_is_started_here_is_left_to_the_chart() -> None:
    found = made(
        run={"name": "x", "dir": "runs/x", "steps": 5, "grace_seconds": 9, "results": "out"},
        cluster={"address": "10.0.0.1:6379", "environment": ["OMP_X"], "device": "cuda"},
        checkpoint={"dir": "ckpt", "every": 5},
        metrics={"port": 8080},
    )
    assert found.config["run"] == {"steps": 5} and found.config["cluster"] == {"device": "cuda"}
    assert found.config["checkpoint"] == {"every": 5} and "metrics" not in found.config
    assert found.needed == [] and found.ports == []
    rendered(found)


def test_a_run_on_the_volume_keeps_its_name_and_folder() -> None:
    found = made(run={"name": "x", "dir": "/runs/x", "results": "s3://bucket/p"})
    assert found.config["run"] == {"name": "x", "dir": "/runs/x", "results": "s3://bucket/p"}
    assert found.ports == [443] and "the bucket" in found.needed[0]
    assert in_pods("/runs/x") and not in_pods("/runs/../etc") and not in_pods("/runsx/y")


def test_small_rows_of_ones_own_are_in_the_values(in_tmp: Path) -> None:
    for split in ("train", "test"):
        (in_tmp / f"{split}.jsonl").write_text('{"question": "é", "answer": "1"}\n')
    found = made(data={"source": "{split}.jsonl"})
    assert found.values == {
        "data": {"files": {name: '{"question": "é", "answer": "1"}\n' for name in ("train.jsonl", "test.jsonl")}}
    }
    assert "source: /etc/grpo/data/{split}.jsonl" in rendered(found) and found.needed == []


def test_rows_of_several_folders_keep_apart(in_tmp: Path) -> None:
    for name in ("a/rows.jsonl", "b/rows.jsonl", "held.jsonl"):
        (in_tmp / name).parent.mkdir(exist_ok=True)
        (in_tmp / name).write_text("{}\n")
    sources = [{"name": name, "source": f"./{name}/rows.jsonl"} for name in "ab"]
    found = made(data={"sources": sources}, eval={"source": "held.jsonl"})
    assert sorted(found.values["data"]["files"]) == ["a/rows.jsonl", "b/rows.jsonl", "held.jsonl"]
    assert [one["source"] for one in found.config["data"]["sources"]] == [
        f"/etc/grpo/data/{name}/rows.jsonl" for name in "ab"
    ]
    assert found.config["eval"]["source"] == "/etc/grpo/data/held.jsonl"
    rendered(found)


@pytest.mark.parametrize("kind", ["large", "binary", "folder", "missing"])
def test_other_rows_are_asked_for_on_a_claim(kind: str, in_tmp: Path) -> None:
    source = "rows.parquet" if kind == "binary" else "./rows" if kind == "folder" else "rows.jsonl"
    if kind == "folder":
        (in_tmp / "rows").mkdir()
    elif kind != "missing":
        (in_tmp / source).write_bytes(b"\xff" * 9 if kind == "binary" else b"x" * (inputs.INLINE_BYTES + 1))
    found = made(data={"source": source})
    name = source.removeprefix("./")
    assert found.values == {"data": {"claim": "data"}} and found.config["data"]["source"] == f"/mnt/data/{name}"
    assert found.needed == [f"a claim `data` with {name}, copied from {in_tmp}"]
    rendered(found)


def test_reward_code_of_ones_own_comes_along(in_tmp: Path) -> None:
    (in_tmp / "my_rewards.py").write_text("def score(p, c, a):\n    return 1.0\n")
    (in_tmp / "unrelated.py").write_text("x")
    found = made(rewards=[{"function": "my_rewards:score"}, {"function": "gsm8k"}])
    assert list(found.values["code"]["files"]) == ["my_rewards.py"]
    assert "folder: /etc/grpo/code" in rendered(found)
    (in_tmp / "code" / "deep").mkdir(parents=True)
    (in_tmp / "code" / "deep" / "x.py").write_text("x = 1\n")
    found = made(rewards=[{"function": "deep.x:f"}], reward_code={"folder": "code", "seconds": 5})
    assert found.values["code"]["files"] == {"deep/x.py": "x = 1\n"}
    assert found.config["reward_code"] == {"seconds": 5}
    rendered(found)


def test_reward_code_that_is_elsewhere_or_too_large(in_tmp: Path) -> None:
    assert made(rewards=[{"function": "theirs:f"}]).needed == ["the controller's image holds theirs (or code.files)"]
    (in_tmp / "big.py").write_text("#" * (inputs.INLINE_BYTES + 1))
    with pytest.raises(ConfigError, match="must be text of at most 500000 bytes.*code.imagePath"):
        made(rewards=[{"function": "big:f"}])


def test_models() -> None:
    hub = {"path": "Qwen/Qwen2.5-1.5B-Instruct", "revision": "9" * 40}
    found = made(model=hub)
    assert found.config["model"] == hub and found.ports == [443] and "reach the hub" in found.needed[0]
    found = made(model={"path": "../models/mine/"})
    assert found.values == {"model": {"claim": "models", "path": "mine"}} and "model" not in found.config
    rendered(found)


def test_services_open_their_ports() -> None:
    found = made(rewards=[{"url": "http://judge.example:8000/x"}, {"url": "https://r.example/y"}])
    assert found.ports == [443, 8000] and "tokens in head.env from a Secret" in found.needed[0]


def test_trackers_open_theirs() -> None:
    found = made(metrics={"wandb_project": "p", "mlflow_uri": "http://mlflow.example:5000"})
    assert found.ports == [443, 5000] and "secrets.wandb" in found.needed[0] and "mlflow-skinny" in found.needed[1]
    rendered(found)
