"""What `grpo drain` does: beside the driver, in a pod of workers, and to a run of small actors on a real cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.cluster import drain as module
from grpo.cluster.drain import RayNode, drain, stop_driver
from grpo.config import Config
from grpo.errors import ClusterError
from grpo.run.attempts import Holder, holder_here
from grpo.run.lease import Lease
from tests.chaos.judge import results, rows_of
from tests.nodes import ROOT, Nodes, grpo

START_SECONDS = 120.0


class Head:
    """Ray's head: three nodes, one of which went away, and a number of looks until the actors have left."""

    def __init__(self, looks: int = 2, gone: bool = False) -> None:
        self.looks, self.gone = looks, gone
        self.drained: list[tuple[str, int, str]] = []

    def get_all_node_info(self, timeout: float) -> dict[bytes, object]:
        nodes = [("head", b"h", True, 0), ("rollout-0", b"o", False, 1), ("rollout-0", b"r", False, 0)]
        return {
            node_id: SimpleNamespace(node_manager_hostname=name, node_id=node_id, is_head_node=head, state=state)
            for name, node_id, head, state in nodes
        }

    def drain_node(self, node_id: str, reason: int, said: str, until: int, timeout: float) -> None:
        assert reason == module.PREEMPTION and 0 < until - time.time() * 1000 < 60_000
        self.drained.append((node_id, reason, said))

    async def async_get_all_actor_info(self, actor_state_name: str, timeout: float) -> dict[int, object]:
        if self.gone:
            raise RuntimeError("no head")
        self.looks -= 1
        places = [("VLLMActor", b"r")] * (self.looks > 0) + [("VLLMActor", b"elsewhere")]
        rows = [SimpleNamespace(class_name=name, address=SimpleNamespace(node_id=at)) for name, at in places]
        return dict(enumerate(rows))


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    made = Head()
    monkeypatch.setattr(module, "connect", lambda address: made)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    return made


def leave(host: str, seconds: float = 30) -> str:
    return RayNode("127.0.0.1:6379", host).leave(time.monotonic() + seconds)


def test_the_number_of_the_reason_is_rays() -> None:
    from ray.core.generated import autoscaler_pb2

    assert autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION") == module.PREEMPTION


def test_a_pod_of_workers_is_drained_once_its_actors_are_elsewhere(head: Head) -> None:
    assert leave("rollout-0") == "rollout-0 is drained: no actor is left on it"
    assert head.drained == [(b"r".hex(), module.PREEMPTION, "grpo drain")] and head.looks == 0


@pytest.mark.parametrize("host", ["head", "another"])
def test_the_head_and_other_hosts_are_no_nodes_of_workers(head: Head, host: str) -> None:
    assert leave(host).startswith(f"nothing to drain: {host} is no node of workers")
    assert head.drained == []


def test_actors_that_do_not_leave_are_named(head: Head) -> None:
    head.looks = 1000
    with pytest.raises(
        ClusterError, match="^rollout-0 must be drained in time, but VLLMActor has not left it"
    ) as caught:
        leave("rollout-0", 0.1)
    assert caught.value.exit_code == 10


def test_a_head_that_ends_meanwhile_takes_the_run_with_it(head: Head) -> None:
    head.gone = True
    assert leave("rollout-0") == "rollout-0 is drained: Ray's head has ended, and the run with it"


def test_a_head_that_is_gone_before_is_an_error() -> None:
    with pytest.raises(ClusterError, match="^Ray's head at .*:9 must answer, but: "):
        RayNode("127.0.0.1:9", "rollout-0").leave(time.monotonic() + 30)


def local(run_dir: Path, **cluster: object) -> Config:
    return Config.model_validate({"model": {"path": "x"}, "run": {"dir": str(run_dir)}, "cluster": cluster})


def test_nothing_runs_here(tmp_path: Path) -> None:
    assert drain(local(tmp_path), 5) == f"nothing to drain: no start of {tmp_path} runs on this machine"
    with Lease(tmp_path, 30):
        pass
    assert drain(local(tmp_path), 5).startswith("nothing to drain")


SLOW_DRIVER = """
import signal, sys, time
from pathlib import Path
from grpo.run.lease import Lease
from grpo.run.stopping import StopRequest
with StopRequest(60) as stop, Lease(Path(sys.argv[1]), 30, stop):
    print("holds", flush=True)
    while not stop.requested:
        time.sleep(0.05)
    time.sleep(float(sys.argv[2]))
"""


def driver(run_dir: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLOW_DRIVER, str(run_dir), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "holds\n"
    return process


def test_the_driver_gets_sigterm_and_is_waited_for(tmp_path: Path) -> None:
    with driver(tmp_path, 1.0) as process:
        assert (
            drain(local(tmp_path, address="auto"), 60)
            == f"attempt 1 (process {process.pid}) was told to stop and has ended"
        )
        assert process.wait() == 0


def test_a_driver_that_needs_longer_is_an_error(tmp_path: Path) -> None:
    with driver(tmp_path, 60.0) as process:
        try:
            with pytest.raises(ClusterError, match=rf"^attempt 1 \(process {process.pid}\) must end in time"):
                drain(local(tmp_path), 0.5)
        finally:
            process.kill()


def test_a_driver_that_ended_a_moment_ago(tmp_path: Path) -> None:
    with driver(tmp_path, 0.0) as process:
        holder = holder_here(tmp_path)
        assert isinstance(holder, Holder)
        process.send_signal(signal.SIGTERM)
        process.wait()
        assert stop_driver(holder, time.monotonic() + 5).endswith("has just ended")


SMALL = (sys.executable, "-m", "tests.chaos.driver", "tests/chaos/run.yaml")


class Run:
    """A run on a cluster, of the small actors unless another `command` is given."""

    def __init__(self, nodes: Nodes, run_dir: Path, *overrides: str, command: Sequence[str] = SMALL) -> None:
        self.nodes, self.run_dir, self.said = nodes, run_dir, run_dir.with_suffix(".txt")
        fixed = [f"run.dir={run_dir}", f"cluster.address={nodes.address}", "eval.prompts=0", "run.steps=1000"]
        with open(self.said, "wb") as output:
            self.process = subprocess.Popen(
                [*command, *fixed, *overrides], cwd=ROOT, env=nodes.environment, stdout=output, stderr=output
            )

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    @property
    def step(self) -> int:
        return max((row["step"] for row in self.rows("step")), default=0)

    def rows(self, event: str) -> list[dict[str, object]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, filter(lambda line: line.endswith("}"), lines)) if row["event"] == event]

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not true():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def further(self, steps: int) -> None:
        goal = self.step + steps
        self.until(lambda: self.step >= goal)


def drained(nodes: Nodes, host: str, *arguments: str) -> str:
    pod = nodes.environment | {"RAY_ADDRESS": nodes.address}  # KubeRay sets it
    ended = grpo(host, pod, "drain", *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_nodes_come_and_go_and_the_run_is_the_same(tmp_path: Path) -> None:
    """Rollout and trainer nodes drain, one dies, the driver drains: no step is made twice, nothing counts as a loss."""
    fixed = ("checkpoint.every=900", "run.max_recoveries=1", "deadlines.start=180", "run.grace_seconds=60")
    with Nodes() as nodes:
        for name in ("rollout-0", "trainer-0"):
            nodes.add(name, name.partition("-")[0])
        run = Run(nodes, tmp_path / "moved", *fixed)
        run.until(lambda: run.step >= 2)
        nodes.add("trainer-1", "trainer")  # KubeRay's next pods
        nodes.add("rollout-1", "rollout")
        nodes.wait("trainer-1", "rollout-1")
        assert drained(nodes, "rollout-0") == "rollout-0 is drained: no actor is left on it\n"
        nodes.add("rollout-2", "rollout")
        run.further(2)
        assert drained(nodes, "trainer-0") == "trainer-0 is drained: no actor is left on it\n"
        run.further(2)
        nodes.wait("rollout-2")
        nodes.kill("rollout-1")  # without a word
        run.further(2)
        said = drained(nodes, "head", "tests/chaos/run.yaml", f"run.dir={run.run_dir}")
        assert said == f"attempt 1 (process {run.process.pid}) was told to stop and has ended\n"
        assert run.process.wait(10) == 11, run.text
        steps = run.step
        again = Run(nodes, tmp_path / "still", *fixed, f"run.steps={steps}")
        assert again.process.wait(START_SECONDS) == 0, again.text
    causes = [(row["role"], str(row["cause"]).partition(":")[0]) for row in run.rows("recovery")]
    assert causes[:3] == [("rollout", "engines move")] * 2 + [("trainer", "trainer ranks move")]
    assert {role for role, _ in causes[3:]} == {"rollout"} and len(causes) == 5
    gone = [row for file in (run.run_dir / "superseded").iterdir() for row in rows_of(file)]
    assert [row["event"] for row in gone] == ["commit", "checkpoint"], "no step was made again"
    assert [row["step"] for row in run.rows("step")] == list(range(1, steps + 1))
    assert results(run.run_dir) == results(again.run_dir)


@pytest.mark.slow
def test_an_actor_without_a_node_is_named_with_what_it_needs(tmp_path: Path) -> None:
    with Nodes() as nodes:
        nodes.add("rollout-0", "rollout")
        run = Run(nodes, tmp_path / "run", "deadlines.start=20", "rollout.engines=1", "train.ranks=1")
        assert run.process.wait(START_SECONDS) == 10, run.text
    assert (
        "error: NoNode: start: no node for trainer rank 0 came within 20 s (deadlines.start): it needs 1 CPU, 0 GPU, "
        "no label grpo.dev/role=rollout; nodes: " in run.text
    )
    assert "rollout-0 (rollout, 2 CPU, 0 GPU)" in run.text and "head (no role, 0 CPU, 0 GPU)" in run.text
    assert os.listdir(run.run_dir / "attempts") == ["000001.json"]
