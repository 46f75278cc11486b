"""Runs that share their processes: each is what it is by itself."""

import json
from pathlib import Path

import pytest

from benchmarks.one_stack import OneStack
from grpo.config import Config
from grpo.config.load import load_config

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")
SMALL = ["run.steps=2", "eval.every=2", "eval.prompts=8", "rollout.prompts_per_step=8", "train.minibatches=2"]


def config(folder: Path, *changes: str) -> Config:
    return load_config(QUICKSTART, [f"run.dir={folder}", *SMALL, *changes])


@pytest.mark.parametrize(
    "change, problem",
    [
        ("rollout.temperature=0.9", "share model, rollout and cluster"),
        ("model.max_length=64", "share model, rollout and cluster"),
        ("train.ranks=2", "one engine and one rank, not 1 and 2"),
    ],
)
def test_what_cannot_share_is_refused_before_anything_starts(tmp_path, change, problem):
    stack = OneStack()
    stack.first = config(tmp_path)
    with pytest.raises(ValueError, match=problem):
        stack.train(config(tmp_path, change))
    assert stack.cluster is None


def told(folder: Path) -> list[tuple[str, str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["event"] == "end" and rows[-1]["outcome"] == "ok"
    return [(row["weights"], row["tokens"], row["reward/mean"]) for row in rows if row["event"] == "step"]


@pytest.mark.slow
def test_a_run_is_the_same_behind_another_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    other = ("run.seed=1", "algorithm.loss=grpo", "algorithm.kl_coef=0.04", "train.learning_rate=1e-3")
    with OneStack() as stack:
        stack.train(config(tmp_path / "first"))
        stack.train(config(tmp_path / "other", *other))
        stack.train(config(tmp_path / "again"))
    first = told(tmp_path / "first")
    assert len(first) == 2
    assert told(tmp_path / "again") == first
    assert told(tmp_path / "other") != first
