"""`grpo k8s status`: what a person reads."""

from typing import Any

import pytest

from grpo.kubernetes.release import find
from grpo.kubernetes.status import newest, status_lines
from grpo.kubernetes.tools import Cluster
from tests.kubernetes.programs import BAD, DONE, RUNNING, SUSPENDED, Programs, job, pod


def lines(programs: Programs, pods: list[Any], **status: Any) -> list[str]:
    programs.items("get rayjobs", [job("mine", **status)])
    programs.items("get pods", pods)
    return list(status_lines(find(Cluster("team"), None)))


def test_a_run_that_goes_on_shows_its_pods_and_its_newest_step(programs: Programs) -> None:
    log = "[  1.0s] engine 0 ready\nstep 1/4  reward 0.1\nstep 2/4  reward 0.5\neval at step 2\x1b[2J\n"
    programs.answer("logs pod-head", {"out": log})
    assert lines(programs, [pod("rollout"), pod("head")], failed=1, **RUNNING) == [
        "run mine-grpo-1a of release mine: Running RUNNING (RayJob mine-grpo-9f; 1 of 5 retries used)",
        "  head     pod-head     node-1  Running",
        "  rollout  pod-rollout  node-1  Running",
        "  step 2/4  reward 0.5",
    ]
    assert programs.calls("logs") == [
        ["kubectl", "-n", "team", "logs", "pod-head", "-c", "ray-head", "--tail=200"],
    ]


@pytest.mark.parametrize(
    ("status", "last"),
    [
        (DONE, "its report and model: grpo k8s fetch OUT mine -n team"),
        (BAD, "once the cause is mended: helm upgrade, with another job.restart where the values stay the same"),
        (
            SUSPENDED,
            'it is stopped; to go on: kubectl -n team patch rayjob mine-grpo-9f --type merge -p \'{"spec": {"sus',
        ),
        ({}, "it has not started: there is no head yet"),
    ],
)
def test_what_there_is_to_do(status: dict[str, str], last: str, programs: Programs) -> None:
    said = lines(programs, [], **status)
    assert last in said[-1]
    assert ("error: data.source" in "\n".join(said)) == (status is BAD)
    assert programs.calls("logs") == []


RESERVED = {"type": "QuotaReserved", "status": "True", "message": "Quota reserved in ClusterQueue training"}
WAITS = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota\nfor cpu, 250m more needed"}
RESUME = 'kubectl -n team patch workloads.kueue.x-k8s.io w-2 --type merge -p \'{"spec": {"active": true}}\''


@pytest.mark.parametrize(
    ("active", "conditions", "last"),
    [
        (None, [], "  it waits in Kueue's queue: no reason is told yet"),
        (True, [WAITS], "  it waits in Kueue's queue: insufficient unused quota for cpu, 250m more needed"),
        (True, [RESERVED], "  it waits in Kueue's queue: no reason is told yet"),
        (False, [WAITS], f"  it is stopped; to go on: {RESUME}"),
    ],
)
def test_who_waits_in_the_queue_is_not_told_to_be_stopped(
    active: bool | None, conditions: list[Any], last: str, programs: Programs
) -> None:
    queued = job("mine", **SUSPENDED)
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
    programs.items("get rayjobs", [queued])
    programs.items("get pods", [])
    mine = {"name": "w-2", "ownerReferences": [{"uid": "uid-mine"}]}
    own = {"metadata": mine, "spec": {"active": active}, "status": {"conditions": conditions}}
    other = {"metadata": {"name": "w-1"}, "spec": {"active": not active}}
    programs.items("get workloads.kueue", [other] if active is None else [other, own])
    assert list(status_lines(find(Cluster("team"), None)))[-1] == last


def test_a_head_that_has_just_gone_is_a_line(programs: Programs) -> None:
    programs.answer("logs pod-head", {"err": "Unable to connect to the server: EOF", "code": 1})
    assert "the cluster must answer" in lines(programs, [pod("head")], **RUNNING)[-1]


def test_the_newest_line_is_that_of_a_step_or_the_last() -> None:
    assert newest(iter(["a", "step 1/2", "b", ""])) == "step 1/2"
    assert newest(iter(["a", "b", " "])) == "b" and newest(iter([])) == ""
