"""`grpo k8s stop`: by the RayJob or by Kueue, with the driver's last words, until no pod is left."""

import json

import pytest

from grpo.errors import ClusterError, ConfigError, DeadlineExceeded
from grpo.kubernetes.release import find
from grpo.kubernetes.stop import grace, stop
from grpo.kubernetes.tools import Cluster
from tests.kubernetes.programs import BAD, DONE, RUNNING, SUSPENDED, Answer, Programs, job, pod


def running(programs: Programs, one: Answer) -> None:
    """A run that is suspended once somebody asks for it."""
    programs.items("get rayjobs", [one], patched=[{**one, "status": SUSPENDED}])
    programs.items("get pods", [pod("head"), pod("trainer")], patched=[])
    programs.answer("patch", {})
    programs.answer("exec", {"out": "attempt 1 was told to stop and has ended"})
    programs.answer("logs", {"out": "step 3/9\nstopped by SIGTERM; step 3 is committed\n"})


def test_the_job_is_suspended_and_the_driver_heard_until_the_pods_are_gone(programs: Programs) -> None:
    running(programs, job("mine", **RUNNING))
    said: list[str] = []
    stop(find(Cluster("team"), None), said.append)
    assert said[:2] == ["step 3/9", "stopped by SIGTERM; step 3 is committed"]
    resume = 'kubectl -n team patch rayjob mine-grpo-9f --type merge -p \'{"spec": {"suspend": false}}\''
    assert said[2:] == [f"run mine-grpo-1a is stopped and its pods are gone. To go on: {resume}"]
    (patch,) = programs.calls("patch")
    assert patch[3:7] == ["patch", "rayjobs.ray.io", "mine-grpo-9f", "--type"]
    assert json.loads(patch[-1]) == {"spec": {"suspend": True}}
    order = [words[3] for words in programs.calls()]
    assert order.index("patch") < len(order) - 1 and "logs" in order
    (drained,) = programs.calls("exec")
    assert drained[3:] == ["exec", "pod-head", "-c", "ray-head", "--", "grpo", "drain"]
    assert order.index("exec") < order.index("patch"), "its workers go with the patch"


def test_a_driver_that_cannot_be_told_is_stopped_by_its_pods_hook(programs: Programs) -> None:
    running(programs, job("mine", **RUNNING))
    programs.answer("exec", {"err": "Error from server (Forbidden): pods/exec", "code": 1})
    said: list[str] = []
    stop(find(Cluster("team"), None), said.append)
    assert said[0].startswith("warning: the driver could not be told to commit before its pods go: ")
    assert said[1:3] == ["step 3/9", "stopped by SIGTERM; step 3 is committed"] and programs.calls("patch")


def test_kueue_is_asked_where_it_decides(programs: Programs) -> None:
    queued = job("mine", **RUNNING)
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
    running(programs, queued)
    owner = {"metadata": {"name": "w-2", "ownerReferences": [{"uid": "uid-mine"}]}}
    programs.items("get workloads.kueue", [{"metadata": {"name": "w-1"}}, owner])
    said: list[str] = []
    stop(find(Cluster(), None), said.append)
    resume = 'kubectl patch workloads.kueue.x-k8s.io w-2 --type merge -p \'{"spec": {"active": true}}\''
    assert said[-1] == f"run mine-grpo-1a is stopped and its pods are gone. To go on: {resume}"
    (patch,) = programs.calls("patch")
    assert patch[2:4] == ["workloads.kueue.x-k8s.io", "w-2"] and json.loads(patch[-1]) == {"spec": {"active": False}}


def test_kueue_without_a_workload_is_a_sentence(programs: Programs) -> None:
    queued = job("mine")
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
    running(programs, queued)
    programs.items("get workloads.kueue", [])
    with pytest.raises(ClusterError, match="Kueue must have a workload of run mine-grpo-1a .*; try again"):
        stop(find(Cluster(), None), print)


@pytest.mark.parametrize("status", [DONE, BAD])
def test_a_run_that_is_over_is_left_alone(status: Answer, programs: Programs) -> None:
    running(programs, job("mine", **status))
    with pytest.raises(
        ConfigError, match="stop is for a run that goes on, but run mine-grpo-1a of release mine: Complete"
    ):
        stop(find(Cluster(), None), print)
    assert programs.calls("patch") == []


def test_rules_of_ones_own_for_the_end_exclude_it(programs: Programs) -> None:
    kept = job("mine", **RUNNING)
    del kept["spec"]["shutdownAfterJobFinishes"]
    running(programs, kept)
    with pytest.raises(ConfigError, match="has job.deletionStrategy; `helm uninstall mine` ends it"):
        stop(find(Cluster(), None), print)
    assert programs.calls("patch") == []


def test_pods_that_stay_are_named_after_the_grace_period(programs: Programs) -> None:
    one = job("mine", **RUNNING)
    programs.items("get rayjobs", [one])
    programs.items("get pods", [pod("trainer", "stays")])
    programs.answer("patch", {})
    with pytest.raises(DeadlineExceeded, match="must end within 0.3 s, .* with 1 pods left .stays.; it still ends"):
        stop(find(Cluster(), None), print, 0.3)


def test_the_grace_period_is_that_of_the_pods_that_have_most(programs: Programs) -> None:
    one = job("mine")
    one["spec"]["rayClusterSpec"]["workerGroupSpecs"] = [{"template": {"spec": {}}}]
    programs.items("get rayjobs", [one])
    assert grace(find(Cluster(), None)) == 30.0
    del one["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    programs.items("get rayjobs", [one])
    assert grace(find(Cluster(), None)) == 7.0


def test_one_that_ends_meanwhile_is_told(programs: Programs) -> None:
    programs.items("get rayjobs", [job("mine", **RUNNING)], patched=[job("mine", **DONE)])
    programs.items("get pods", [])
    programs.answer("patch", {})
    with pytest.raises(
        ConfigError, match="it came to its end meanwhile: run mine-grpo-1a of release mine: Complete SUCC"
    ):
        stop(find(Cluster(), None), print)
