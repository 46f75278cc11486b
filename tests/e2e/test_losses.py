"""One run that loses everything once: a rollout pod, the trainer, a drained node, a node's power, its head.

It has to end as the run to which nothing happened, token for token; so nothing was sampled from stale weights and no
prompt came twice or not at all.
"""

import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import namespace
from tests.e2e.kube import cluster_tool, eventually, run
from tests.e2e.runs import UNDISTURBED, Run, install, show

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, tuple[str, str]]:
    if not UNDISTURBED:
        made = namespace("grpo-reference")
        one = install(next(made))
        one.succeeded(900)
        UNDISTURBED.update(one.digests())
        next(made, None)
    return UNDISTURBED


@pytest.fixture(scope="module")
def disturbed(undisturbed: dict[int, tuple[str, str]]) -> Iterator[Run]:
    made = namespace("grpo-losses")
    one = install(next(made))
    one.at_step(1)
    yield one
    next(made, None)


def lose(one: Run, group: str, *options: str) -> str:
    """Deletes the group's pod; its name."""
    pod = one.space.ready(group)
    one.space.kubectl("delete", "pod", pod, "--wait=false", *options)
    return pod


def replaced(one: Run, group: str, old: str, seconds: float = 240) -> None:
    what = f"a new {group} pod"
    eventually(lambda: one.space.ready(group) not in ("", old), what, seconds, one.space.describe)


def test_an_overlapping_start_is_fenced_off(disturbed: Run) -> None:
    """From another pod that holds the same volume: the run goes on, the intruder ends with the exit code for that."""
    config = disturbed.space.execute(disturbed.space.ready("headgroup"), "cat", "/etc/grpo/run.yaml")
    command = ["kubectl", "-n", disturbed.space.name, "exec", "-i", disturbed.space.ready("trainer"), "--"]
    command += ["bash", "-c", "cat >/tmp/run.yaml && grpo train /tmp/run.yaml"]
    intruder = subprocess.run(command, input=config, capture_output=True, text=True, timeout=200)
    assert intruder.returncode == 13, intruder.stdout + intruder.stderr
    assert "one run at a time" in intruder.stderr and "Traceback" not in intruder.stderr


def test_a_lost_rollout_pod_costs_no_step(disturbed: Run) -> None:
    before, lost = disturbed.step(), time.time()
    replaced(disturbed, "rollout", lose(disturbed, "rollout", "--grace-period=0", "--force"))
    disturbed.at_step(before + 2)
    show({"seconds from a lost rollout pod to the second step after it": round(time.time() - lost)})
    assert [row["role"] for row in disturbed.rows("recovery")] == ["rollout"]


def test_a_lost_trainer_is_rebuilt_from_the_last_commit(disturbed: Run) -> None:
    before, lost = disturbed.step(), time.time()
    replaced(disturbed, "trainer", lose(disturbed, "trainer", "--grace-period=0", "--force"))
    disturbed.at_step(before + 1)
    show({"seconds from a lost trainer pod to the step after it": round(time.time() - lost)})
    roles = [row["role"] for row in disturbed.rows("recovery")]
    assert "trainer" in roles  # and the engine too, if it broke off a weight sync
    assert disturbed.space.job_status("failed") in ("", "0"), "the RayJob was started again for a lost trainer"


def test_a_drained_node_costs_no_step(disturbed: Run) -> None:
    """cordon and drain: the pod asks for a commit before it goes; the run waits for a node that takes the trainer."""
    space, node = disturbed.space, disturbed.space.pods("trainer")[0]["spec"]["nodeName"]
    old, before = space.ready("trainer"), disturbed.step()
    drain = ["kubectl", "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=150s"]
    drain += ["--pod-selector", f"ray.io/cluster={space.job_status('rayClusterName')}"]
    started = time.time()
    try:
        run(drain, seconds=170)
        show({"seconds until a drained trainer node was free": round(time.time() - started)})
        committed = space.execute(space.ready("headgroup"), "ls", f"{disturbed.dir}/checkpoints").split()
        newest = max(int(name.removeprefix("step_")) for name in committed if name.removeprefix("step_").isdigit())
        assert newest >= before and newest == disturbed.step(), committed
    finally:
        run(["kubectl", "uncordon", node])
    replaced(disturbed, "trainer", old)
    disturbed.at_step(newest + 1)
    assert disturbed.space.job_status("failed") in ("", "0")


def test_a_node_that_loses_power_and_comes_back(disturbed: Run) -> None:
    down, up = cluster_tool("down"), cluster_tool("up")
    if down is None or up is None:
        pytest.skip("only a cluster of the test's own can lose the power of a node")
    before, old = disturbed.step(), disturbed.space.ready("rollout")
    node = disturbed.space.pods("rollout")[0]["spec"]["nodeName"]
    lost = time.time()
    run([str(down), node])
    time.sleep(20)  # the outage itself
    run([str(up)], seconds=300)
    replaced(disturbed, "rollout", old, 400)
    disturbed.at_step(before + 2)
    show({"seconds from a power loss of 20 s to the second step after it": round(time.time() - lost)})


def test_a_lost_head_is_resumed_and_the_run_is_the_undisturbed_one(
    disturbed: Run, undisturbed: dict[int, tuple[str, str]]
) -> None:
    space, before, lost = disturbed.space, disturbed.step(), time.time()
    starts = len(disturbed.rows("start"))
    lose(disturbed, "headgroup")  # with its grace period: SIGTERM reaches the driver, which commits
    eventually(lambda: len(disturbed.rows("start")) > starts, "the next attempt", 400, space.describe)
    resumed = disturbed.rows("start")[-1]
    show({"seconds from a deleted head to the next attempt": round(time.time() - lost), "lost at step": before})
    disturbed.succeeded(600)
    says = space.execute(space.ready("headgroup"), "bash", "-c", "cat /tmp/ray/session_latest/logs/job-driver-*")
    found = re.search(r"resumes from the checkpoint of step (\d+)", says)
    assert found and int(found[1]) >= before, f"the deleted head did not commit step {before}: {says}"
    assert int(resumed["attempt"]) >= 2
    assert disturbed.digests() == undisturbed
    show({"steps that equal those of the undisturbed run, prompts and tokens": len(undisturbed)})
