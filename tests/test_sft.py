"""`grpo sft` as its user runs it: real Ray and DeepSpeed on the shipped model, killed, resumed, and GRPO behind it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grpo import cli

ROOT = Path(__file__).parent.parent
STEPS = 4
KEYS = ("prompts", "tokens", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens")


def grpo(verb: str, run_dir: Path, *overrides: str, faults: str = "") -> int:
    """Runs the verb on the quickstart and says how it ended."""
    (run_dir / "faults").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"GRPO_FAULTS": faults, "GRPO_FAULT_DIR": str(run_dir / "faults")}
    command = [sys.executable, "-m", "grpo", verb, "examples/quickstart.yaml", f"run.dir={run_dir}", *overrides]
    with (run_dir / "screen.txt").open("a") as screen:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=screen, stderr=screen, timeout=540).returncode


def warm_up(run_dir: Path, faults: str = "") -> int:
    sizes = (f"sft.steps={STEPS}", "sft.rows_per_step=16", "sft.learning_rate=1e-3", "eval.prompts=64")
    return grpo(
        "sft", run_dir, "model.dtype=bfloat16", "run.lease_seconds=5", "checkpoint.every=1", *sizes, faults=faults
    )


def rows(run_dir: Path, event: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


@pytest.mark.slow
def test_a_warm_up_that_was_killed_is_the_same_and_grpo_begins_with_it(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert warm_up(calm) == 0, (calm / "screen.txt").read_text()
    losses = [row["eval/loss"] for row in rows(calm / "sft", "eval")]
    assert len(losses) == 2 and losses[1] < losses[0]
    faults = "save.renamed@1:kill; train.optimizer@3:kill"  # the driver, and in the next start the rank
    assert warm_up(killed, faults) == -9
    assert not (killed / "sft" / "policy").exists()
    assert warm_up(killed, faults) == 0, (killed / "screen.txt").read_text()
    assert len(rows(killed / "sft", "start")) == 2 and len(rows(killed / "sft", "recovery")) == 1
    one, other = ([{key: row[key] for key in KEYS} for row in rows(run / "sft", "step")] for run in (calm, killed))
    assert one == other and len(one) == STEPS
    one_policy, other_policy = (run / "sft" / "policy" / "model.safetensors" for run in (calm, killed))
    assert one_policy.read_bytes() == other_policy.read_bytes()
    begun = grpo("train", calm, f"model.path={calm}/sft/policy", "run.steps=1", "eval.prompts=0", "checkpoint.every=0")
    assert begun == 0, (calm / "screen.txt").read_text()
    (step,) = rows(calm, "step")
    assert step["train/rollout_kl"] < 1e-3 and step["reward/mean"] > 0.3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sft.completion=worked", "worked: there is no such column"),
        ("sft.epochs=0", "sft.epochs = 0"),
        ("sft.epoch=1", "did you mean sft.epochs?"),
        ("rollout.max_tokens=2", "raise rollout.max_tokens"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_starts(override: str, says: str, tmp_path: Path) -> None:
    arguments = ["sft", str(ROOT / "examples/quickstart.yaml"), f"run.dir={tmp_path}/run", override]
    path = f"model.path={ROOT}/examples/quickstart/model"
    ended = CliRunner().invoke(cli.app, [*arguments, path])
    assert ended.exit_code in (2, 3) and says in ended.stderr, ended.output
    assert not re.search("Traceback", ended.output)
