"""`grpo train` on GPUs, in the ways that no CPU has: turns, CUDA IPC, offload, an adapter, a float32 head, losses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROOT = Path(__file__).parents[2]
STEPS = 12
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SHARED = ("rollout.gpus_per_engine=0.25", "train.gpus_per_rank=0.25")
"""An engine and a rank on one GPU at the same time."""
WAYS: dict[str, tuple[str, ...]] = {
    "shared": (*SHARED, "model.fp32_head=true"),
    "turns": ("cluster.colocate=true", "rollout.engines=2", "rollout.engines_per_gpu=2", "model.dtype=bfloat16"),
    "turns, offloaded": (
        *("cluster.colocate=true", "train.zero_stage=3"),
        *("train.offload_optimizer=cpu", "train.offload_param=cpu"),
    ),
    "lora": (*SHARED, 'train.lora={"rank": 16, "alpha": 32}', "train.learning_rate=2e-3"),
    "offloaded optimizer": (*SHARED, "train.zero_stage=2", "train.offload_optimizer=cpu"),
    "offloaded weights": (*SHARED, "train.zero_stage=3", "train.offload_optimizer=cpu", "train.offload_param=cpu"),
    "cispo, bfloat16": (*SHARED, "algorithm.loss=cispo", "model.dtype=bfloat16"),
    "gspo, k3, entropy": (*SHARED, "algorithm.loss=gspo", "algorithm.kl_coef=0.001", "algorithm.entropy_coef=0.001"),
}
ACROSS: dict[str, tuple[str, ...]] = {
    "through memory": (),
    "by NCCL": ("sync.transport=nccl",),
    "in flight": ("sync.transport=ipc", "rollout.max_staleness=2", "rollout.update=in_flight"),
    "turns of two": ("cluster.colocate=true", "rollout.engines=2", "train.ranks=2"),
}


def train(run: Path, *settings: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of a whole run of the quickstart's task, and what it said."""
    common = ["cluster.device=cuda", "rollout.memory_utilization=0.1", f"run.steps={STEPS}", f"run.dir={run}"]
    common += ["eval.prompts=0", "rollout.prompts_per_step=64", "checkpoint.every=6"]
    passed = [name for name in ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_NCCL_SO_PATH") if name in os.environ]
    common.append(f"cluster.environment={json.dumps(passed)}")
    command = [sys.executable, "-m", "grpo", "train", "examples/quickstart.yaml", *common, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    print(done.stdout[-6000:], done.stderr[-3000:])
    assert done.returncode == 0
    audit = subprocess.run(
        [sys.executable, "-m", "grpo", "audit", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    print(audit.stdout, audit.stderr)
    assert audit.returncode == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "step"], done.stdout + done.stderr


def check(rows: list[dict[str, Any]], said: str) -> None:
    """All steps are there, engine and trainer agree on what was sampled, and it learns."""
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    reward = [row["reward/mean"] for row in rows]
    print("reward", [round(value, 3) for value in reward])
    apart = [row["train/rollout_abs_diff"] for row in rows]
    print("apart", [round(value, 4) for value in apart])
    assert max(apart) < 0.05, "nats a token between sampler and trainer"
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.05
    assert "weights go by NCCL" not in said


@pytest.mark.parametrize("way", WAYS)
def test_on_one_gpu(way: str, tmp_path: Path) -> None:
    check(*train(tmp_path / "run", *WAYS[way]))


@TWO
@pytest.mark.parametrize("way", ACROSS)
def test_on_two_gpus(way: str, tmp_path: Path) -> None:
    check(*train(tmp_path / "run", *ACROSS[way]))
