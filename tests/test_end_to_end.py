"""The product as its user runs it: `grpo train` with real Ray, vLLM and DeepSpeed on the shipped model."""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.observe.audit import audit

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 8, 6
MARK = "GRPO_TEST_MARK"
ROLES = "driver, Ray, two actors and an engine core carry the mark"


def command(run_dir: Path, *overrides: str) -> list[str]:
    run = ["-m", "grpo", "train", "examples/quickstart.yaml", f"run.dir={run_dir}"]
    return [sys.executable, *run, *overrides]


def rows(run_dir: Path, event: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def marked(mark: str) -> set[int]:
    """Processes that were started, by whomever, below a command with this mark in its environment."""
    found = set()
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(psutil.Error):
            if process.info["status"] != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.add(process.pid)
    return found


def left_behind(mark: str, within: float) -> set[int]:
    """Marked processes that are still there `within` seconds from now."""
    deadline = time.monotonic() + within
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    return marked(mark)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short run of the quickstart with two engines, to its end; nothing of it may stay behind."""
    run_dir = tmp_path_factory.mktemp("e2e") / "run"
    mark = secrets.token_hex(8)
    often = (f"eval.every={EVERY}", f"checkpoint.every={EVERY}")
    overrides = (f"run.steps={STEPS}", "rollout.engines=2", "eval.prompts=256", "metrics.port=0", *often)
    environment = os.environ | {MARK: mark}
    ended = subprocess.run(
        command(run_dir, *overrides), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert left_behind(mark, within=60) == set()
    yield run_dir


@pytest.mark.slow
def test_the_policy_learns(run: Path) -> None:
    scores = [row["eval/accuracy"] for row in rows(run, "eval")]
    assert scores[-1] > scores[0] + 0.1
    rewards = [row["reward/mean"] for row in rows(run, "step")]
    assert sum(rewards[-3:]) > sum(rewards[:3])


@pytest.mark.slow
def test_sampler_and_trainer_agree_after_every_sync(run: Path) -> None:
    steps = rows(run, "step")
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert max(row["train/rollout_kl"] for row in steps) < 1e-4
    assert max(row["train/rollout_abs_diff"] for row in steps) < 1e-3
    first = rows(run, "weight_sync")[0]
    assert first["sync/self_test_diff"] < 1e-3


@pytest.mark.slow
def test_no_sample_is_stale(run: Path) -> None:
    assert {row["rollout/staleness"] for row in rows(run, "step")} == {0.0}
    groups = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    stamped = {(row["event"], row["step"]): set(row["versions"]) for row in groups}
    # Step n samples from the weights of the n - 1 steps before it; an evaluation after step n from those of n.
    expected = {("step", step): {step - 1} for step in range(1, STEPS + 1)}
    assert stamped == expected | {("eval", step): {step} for step in (0, EVERY, STEPS)}


@pytest.mark.slow
def test_the_folder_proves_what_the_run_did(run: Path) -> None:
    proof = audit(run)
    assert (proof.steps, proof.evaluations, proof.notes) == (STEPS, 3, [])


@pytest.mark.slow
def test_engines_and_ranks_in_turns_make_the_same_run(run: Path, tmp_path: Path) -> None:
    """Rests, wakes and syncs with the real engines and ranks; on the CPU there is no memory to give away."""
    in_turns = (
        "cluster.colocate=true",
        "rollout.engines=2",
        "rollout.engines_per_gpu=2",
        "run.steps=2",
        "eval.prompts=0",
    )
    ended = subprocess.run(command(tmp_path / "run", *in_turns), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    mine, plain = rows(tmp_path / "run", "step"), rows(run, "step")
    assert len(mine) == 2
    for name in ("reward/mean", "rollout/completion_tokens"):
        assert [row[name] for row in mine] == [row[name] for row in plain[:2]], name
    for name in ("train/loss", "train/grad_norm"):  # of the second step the rate is another: a shorter run, sooner at 0
        assert mine[0][name] == plain[0][name], name
    assert all(row["train/seconds_rest"] > 0 for row in mine)


@pytest.mark.slow
def test_the_exported_policy_is_the_trained_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    exported = subprocess.run([sys.executable, "-m", "grpo", "export", str(run), str(out)], cwd=ROOT, timeout=300)
    assert exported.returncode == 0
    score = [sys.executable, "-m", "grpo", "eval", "examples/quickstart.yaml", f"model.path={out}", "eval.prompts=256"]
    printed = subprocess.run(score, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert printed.returncode == 0, printed.stderr
    accuracy = re.search(r"accuracy\D+(\d\.\d+)", printed.stdout)
    assert accuracy, printed.stdout
    assert float(accuracy[1]) == pytest.approx(rows(run, "eval")[-1]["eval/accuracy"], abs=0.1)


@pytest.mark.slow
def test_a_terminal_that_is_closed_commits(tmp_path: Path) -> None:
    """The signal goes to the whole process group, and the screen is gone. SIGTERM to the group: test_security.py."""
    run_dir, mark = tmp_path / "run", secrets.token_hex(8)
    read, write = os.pipe()
    driver = subprocess.Popen(
        command(run_dir, "eval.prompts=0", "run.steps=5000", "checkpoint.every=1000"),
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdout=write,
        stderr=write,
        start_new_session=True,
    )
    os.close(write)
    deadline = time.monotonic() + 300
    while not ((run_dir / "metrics.jsonl").exists() and rows(run_dir, "step")):
        assert driver.poll() is None and time.monotonic() < deadline, "the run must reach its first step"
        time.sleep(0.2)
    os.close(read)
    os.killpg(driver.pid, signal.SIGHUP)
    assert driver.wait(timeout=120) == 11
    done = {row["step"] for row in rows(run_dir, "step")}
    assert (run_dir / "checkpoints" / f"step_{max(done):06d}").is_dir()
    assert left_behind(mark, within=60) == set()


def killed(run_dir: Path, *overrides: str, faults: str) -> None:
    """A run that a fault kills: all of its processes go. What is stopped by SIGTERM: the run of test_security.py."""
    mark = secrets.token_hex(8)
    environment = os.environ | {MARK: mark, "GRPO_FAULTS": faults, "GRPO_FAULT_DIR": str(run_dir.parent)}
    driver = subprocess.Popen(
        command(run_dir, *overrides), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not ((run_dir / "metrics.jsonl").exists() and rows(run_dir, "step")):
        assert driver.poll() is None and time.monotonic() < deadline, "the run must reach its first step"
        time.sleep(0.5)
    assert len(marked(mark)) > 4, ROLES
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == -signal.SIGKILL
    assert "Traceback" not in errors
    assert left_behind(mark, within=60) == set()


@pytest.mark.slow
def test_nothing_stays_of_a_killed_run_and_resumed_its_curriculum_is_proved(tmp_path: Path) -> None:
    """Few prompts, so that each comes several times; batches are drawn ahead of the outcomes of those before. The audit
    makes each choice again; that it is the one of a run that was not killed is shown by rollout/test_curriculum.py.

    Batch 8 is drawn once step 6 is trained, and its commit waits for that of step 3: there is something to resume.
    """
    overrides = (
        *("run.steps=9", "checkpoint.every=3", "eval.prompts=0", "rollout.max_staleness=1", "model.dtype=bfloat16"),
        *("data.size=40", "rollout.prompts_per_step=16", "rollout.samples_per_prompt=4"),
        *("data.curriculum.easy_fraction=0.1", "data.curriculum.hard_fraction=0.2"),
    )
    run_dir = tmp_path / "run"
    killed(run_dir, *overrides, faults="reward.ended@8:kill")
    ended = subprocess.run(command(run_dir, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    proof = audit(run_dir)
    assert (proof.steps, proof.starts, proof.notes) == (9, 2, []) and proof.not_drawn > 0
    assert all(0 <= row["rollout/effective_groups"] <= 1 for row in rows(run_dir, "step"))
