"""Runs whose engines come and go with the nodes of a real cluster do what a run with a fixed number of them does."""

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from grpo.observe.audit import audit
from tests.chaos.judge import Row, results
from tests.chaos.runs import MODES
from tests.cluster.test_drain import SMALL, START_SECONDS, Run, drained
from tests.nodes import ROOT, Nodes

REAL = (sys.executable, "-m", "grpo", "train", "tests/chaos/real.yaml")
FIXED = ("checkpoint.every=900", "run.max_recoveries=0", "deadlines.start=180", "run.grace_seconds=60")


def engines(run: Run, count: int) -> bool:
    """Whether so many sampled in the last step."""
    rows = run.rows("step")
    return bool(rows) and rows[-1]["pipeline/engines"] == count


def ups_and_downs(nodes: Nodes, run: Run) -> None:
    """1 -> 3 -> 1 -> 2 engines: nodes are added, one loses its power, one drains, and one is added again."""
    run.until(lambda: run.step >= 2 and engines(run, 1))
    for name in ("rollout-1", "rollout-2"):
        nodes.add(name, "rollout", cpus=1)
    run.until(lambda: engines(run, 3))
    run.further(2)
    nodes.kill("rollout-1")
    run.until(lambda: engines(run, 2))
    assert drained(nodes, "rollout-2") == "rollout-2 is drained: no actor is left on it\n"
    run.until(lambda: engines(run, 1))
    run.further(2)
    nodes.add("rollout-3", "rollout", cpus=1)
    run.until(lambda: engines(run, 2))
    run.further(2)


def still(run_dir: Path, *overrides: str, command: Sequence[str] = SMALL) -> list[Row]:
    """The rows of the same run with two engines on this machine."""
    fixed = [f"run.dir={run_dir}", "eval.prompts=0", "rollout.engines=2", *FIXED, *overrides]
    ended = subprocess.run([*command, *fixed], cwd=ROOT, capture_output=True, text=True, timeout=2 * START_SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return results(run_dir)


@pytest.mark.slow
def test_engines_come_and_go_and_the_run_is_the_same(tmp_path: Path) -> None:
    """Ahead of training; the synchronous loop has the engines of vLLM below. Not one loss counts: with
    `run.max_recoveries` 0 one would end the run."""
    mode = MODES["between"]
    changes = ("rollout.engines={min: 1, max: 3}", "train.ranks=1", *FIXED, *mode)
    with Nodes() as nodes:
        nodes.add("rollout-0", "rollout", cpus=1)
        nodes.add("trainer-0", "trainer", cpus=1)
        run = Run(nodes, tmp_path / "elastic", *changes)
        ups_and_downs(nodes, run)
        drained(nodes, "head", "tests/chaos/run.yaml", f"run.dir={run.run_dir}")
        assert run.process.wait(60) == 11, run.text
    events = Counter(row["what"] for row in run.rows("engine"))
    assert events == {"joined": 3, "left": 2}, run.text
    assert run.rows("recovery") == []
    audit(run.run_dir)
    wanted = still(tmp_path / "still", "train.ranks=1", f"run.steps={run.step}", *mode)
    found = results(run.run_dir)
    assert found == wanted and len(found) == run.step


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.timeout(900)
def test_engines_of_vllm_come_and_go_and_the_run_is_the_same(tmp_path: Path) -> None:
    """1 -> 2 -> 1 engines, in bfloat16: in float32 the last bits depend on how rows are batched."""
    changes = ("rollout.engines={min: 1, max: 2}", *FIXED)
    with Nodes() as nodes:
        nodes.add("rollout-0", "rollout", cpus=1)
        nodes.add("trainer-0", "trainer", cpus=1)
        run = Run(nodes, tmp_path / "elastic", *changes, command=REAL)
        run.until(lambda: run.step >= 2 and engines(run, 1))
        nodes.add("rollout-1", "rollout", cpus=1)
        run.until(lambda: engines(run, 2))
        run.further(2)
        assert drained(nodes, "rollout-1") == "rollout-1 is drained: no actor is left on it\n"
        run.until(lambda: engines(run, 1))
        run.further(2)
        drained(nodes, "head", "tests/chaos/real.yaml", f"run.dir={run.run_dir}")
        assert run.process.wait(60) == 11, run.text
    assert [row["what"] for row in run.rows("engine")] == ["joined", "left"], run.text
    audit(run.run_dir)
    assert results(run.run_dir) == still(tmp_path / "still", f"run.steps={run.step}", command=REAL)
