"""Kueue, with the guide's queue: one run has the quota, its twin waits, and an urgent one takes the place of the first.

The run that was preempted has to end as its twin to which nothing happened, token for token, and its folder proves it.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import yaml

from tests.e2e.conftest import namespace
from tests.e2e.kube import CHART, Namespace, Object, eventually, nodes, run
from tests.e2e.runs import SMOKE, START_SECONDS, Run, block, install, options, show, upgrade

pytestmark = pytest.mark.timeout(1500)
STEPS, URGENT_STEPS = 30, 5
POOLS = {"cpu": "system", "gpu-spot": "rollout", "gpu": "trainer"}
"""Pools of the guide's queue and of this cluster."""
FLAVORS = {"head": "system", "rollout": "rollout", "trainer": "trainer"}
ONE_RUN = {"cpu": "400m", "memory": "1536Mi", "nvidia.com/gpu": "0"}
"""Quota of a pool: more than a pod of cpu-smoke asks for, less than two."""


def queue_of(spaces: list[Namespace]) -> str:
    """The guide's objects with this cluster's pools and room for one run, and its LocalQueue in each namespace."""
    objects: list[Object] = []
    for one in yaml.safe_load_all(block("yaml", "kind: ClusterQueue")):
        if one["kind"] == "ResourceFlavor":
            pool = POOLS[one["metadata"]["name"]]
            objects.append(one | {"metadata": {"name": pool}, "spec": {"nodeLabels": {"pool": pool}}})
        elif one["kind"] == "LocalQueue":
            places = [{"metadata": {**one["metadata"], "namespace": space.name}} for space in spaces]
            objects += [one | place for place in places]
        else:
            objects.append(one)
    (cluster_queue,) = [one for one in objects if one["kind"] == "ClusterQueue"]
    for flavor in cluster_queue["spec"]["resourceGroups"][0]["flavors"]:
        flavor["name"] = POOLS[flavor["name"]]
        for resource in flavor["resources"]:
            resource["nominalQuota"] = ONE_RUN[resource["name"]]
    return str(yaml.safe_dump_all(objects))


@dataclass
class Queue:
    """A namespace for each run, and the runs that are in the queue by now."""

    spaces: dict[str, Namespace]
    runs: dict[str, Run] = field(default_factory=dict)

    def add(self, name: str, priority: str, **config: object) -> Run:
        self.runs[name] = install(self.spaces[name], *values(priority, **config))
        return self.runs[name]


def values(priority: str, **config: object) -> list[str]:
    """Of a run in bfloat16, whose results do not depend on how rows are batched: a resume batches them anew."""
    queue = ["--set", f"queue.name=training,queue.priorityClass={priority}"]
    return [*options({"model.dtype": "bfloat16", "run.steps": STEPS, **config}), *queue]


@pytest.fixture(scope="module")
def queue() -> Iterator[Queue]:
    if not run(["kubectl", "get", "crd", "workloads.kueue.x-k8s.io", "--ignore-not-found"]):
        pytest.skip("this cluster has no Kueue")
    made = {name: namespace(f"grpo-{name}") for name in ("first", "twin", "urgent")}
    one = Queue({name: next(space) for name, space in made.items()})
    objects = queue_of(list(one.spaces.values()))
    run(["kubectl", "apply", "-f", "-"], stdin=objects)
    yield one
    for closing in made.values():
        next(closing, None)
    run(["kubectl", "delete", "--ignore-not-found", "--wait=false", "-f", "-"], stdin=objects)


def workload(space: Namespace) -> Object:
    """What Kueue made of the namespace's only RayJob; {} before that."""
    found = space.objects("workloads.kueue.x-k8s.io")
    assert len(found) <= 1, [one["metadata"]["name"] for one in found]
    return found[0] if found else {}


def condition(space: Namespace, kind: str) -> tuple[str, str, str]:
    """Status, reason and message of a condition of the workload."""
    for one in workload(space).get("status", {}).get("conditions", []):
        if one["type"] == kind:
            return one["status"], one["reason"], one["message"]
    return "", "", ""


def holds(space: Namespace, kind: str, status: str = "True") -> Callable[[], bool]:
    return lambda: condition(space, kind)[0] == status


def describe(space: Namespace) -> Callable[[], str]:
    return lambda: f"{space.kubectl('get', 'workloads', '-o', 'yaml', check=False)}\n{space.describe()}"


def held_back(space: Namespace) -> bool:
    """Suspended, with not one pod or Ray cluster, those that are going away included."""
    suspended = space.job()["spec"].get("suspend") and space.job_status("jobDeploymentStatus") == "Suspended"
    return bool(suspended) and not space.objects("pods") and not space.objects("rayclusters.ray.io")


def grpo(*words: str) -> str:
    """The program on this machine, with kubectl's access."""
    return run([sys.executable, "-m", "grpo", "k8s", *words], seconds=240)


def said(one: Run, attempt: int) -> str:
    """The log of one start."""
    return one.space.execute(one.space.ready("headgroup"), "cat", f"{one.dir}/logs/attempt-{attempt}.log")


def test_the_quota_admits_the_first_run_with_a_flavor_for_each_pool(queue: Queue) -> None:
    started = time.time()
    one = queue.add("first", "research")
    eventually(holds(one.space, "Admitted"), "the first run's admission", 60, describe(one.space))
    admitted = round(time.time() - started)
    assigned = workload(one.space)["status"]["admission"]["podSetAssignments"]
    assert {part["name"]: part["flavors"] for part in assigned} == {
        part: {"cpu": flavor, "memory": flavor} for part, flavor in FLAVORS.items()
    }
    one.at_step(1)
    show({"seconds from helm install to admitted": admitted, "to the first step": round(time.time() - started)})
    assert not one.space.job()["spec"].get("suspend")
    labels = {name: node["metadata"]["labels"] for name, node in nodes().items()}
    placed = {pod["metadata"]["labels"]["ray.io/group"]: labels[pod["spec"]["nodeName"]] for pod in one.space.pods()}
    assert {group: found["pool"] for group, found in placed.items()} == {
        "headgroup": "system",
        "rollout": "rollout",
        "trainer": "trainer",
    }


def test_an_upgrade_with_the_same_values_leaves_an_admitted_run_alone(queue: Queue) -> None:
    """Kueue wrote into the RayJob; Helm finds nothing there to fight over."""
    one = queue.runs["first"]
    before = one.space.job()["metadata"]
    one.space.helm("upgrade", "grpo", str(CHART), "-f", str(SMOKE), *values("research"))
    after = one.space.job()["metadata"]
    assert (after["uid"], after["generation"]) == (before["uid"], before["generation"])
    assert condition(one.space, "Admitted")[0] == "True"


def test_a_twin_waits_without_a_pod_and_the_queue_says_what_for(queue: Queue) -> None:
    first, twin = queue.runs["first"], queue.add("twin", "research")
    eventually(holds(twin.space, "QuotaReserved", "False"), "the queue's reason", 60, describe(twin.space))
    status, reason, message = condition(twin.space, "QuotaReserved")
    assert (status, reason) == ("False", "Pending")
    assert "insufficient unused quota for cpu in flavor system" in message, message
    eventually(lambda: held_back(twin.space), "a suspended RayJob without a pod", 30, describe(twin.space))
    assert f"it waits in Kueue's queue: {message}" in grpo("status", "-n", twin.space.name)
    first.at_step(first.step() + 2)
    assert held_back(twin.space), "it did not wait while the first run went on"


def test_an_urgent_run_preempts_the_first_which_goes_on_from_its_last_step(queue: Queue) -> None:
    first, twin = queue.runs["first"], queue.runs["twin"]
    before, started = first.step(), time.time()
    seconds: dict[str, object] = {}

    def passed(what: str) -> None:
        seconds[what] = round(time.time() - started)

    urgent = queue.add("urgent", "urgent", **{"run.steps": URGENT_STEPS, "eval.prompts": 0})
    eventually(holds(first.space, "Evicted"), "the preemption", 60, describe(first.space))
    passed("preempted")
    assert condition(first.space, "Evicted")[1] == "Preempted"
    eventually(lambda: held_back(first.space), "the first run's pods to go", 180, describe(first.space))
    passed("its last pod gone")
    assert condition(first.space, "QuotaReserved")[:2] == ("False", "Pending")
    urgent.at_step(1)
    passed("urgent run at step 1")
    assert held_back(first.space) and held_back(twin.space)
    urgent.succeeded()
    passed("urgent run succeeded")
    eventually(lambda: len(first.rows("start")) == 2, "the second start", START_SECONDS, describe(first.space))
    first.at_step(before + 2)
    passed("first run stepping again")
    show({"seconds from the install of an urgent run": seconds})
    assert held_back(twin.space), "the twin overtook a run that was in the queue before it"
    resumed = re.search(r"resumes from the checkpoint of step (\d+)", said(first, 2))
    assert resumed and int(resumed[1]) >= before, said(first, 2)
    show({"last step seen before the urgent run": before, "resumed from": int(resumed[1])})


def test_no_retry_was_spent_and_the_folder_proves_what_the_run_did(queue: Queue) -> None:
    first = queue.runs["first"]
    first.succeeded()
    assert first.space.job_status("failed") in ("", "0")
    assert [row["attempt"] for row in first.rows("start")] == ["1", "2"] and first.rows("recovery") == []
    proof = first.space.execute(first.space.ready("headgroup"), "grpo", "audit", first.dir)
    assert "nothing contradicts" in proof and "note:" not in proof


def test_the_twin_follows_and_did_the_same_undisturbed(queue: Queue) -> None:
    first, twin = queue.runs["first"], queue.runs["twin"]
    eventually(holds(twin.space, "Admitted"), "the twin's admission", 60, describe(twin.space))
    twin.succeeded(600)
    assert [row["attempt"] for row in twin.rows("start")] == ["1"]
    assert len(twin.digests()) == STEPS and first.digests() == twin.digests()
    show({"steps that equal those of the undisturbed twin, prompts and tokens": STEPS})


def test_a_run_that_is_stopped_gives_its_quota_back_and_goes_on_by_the_command_it_prints(queue: Queue) -> None:
    one = upgrade(queue.runs["urgent"], *values("urgent", **{"run.seed": 7}))
    one.at_step(2)
    before, started = one.step(), time.time()
    told = grpo("stop", "-n", one.space.name).splitlines()
    show({"seconds that `grpo k8s stop` took": round(time.time() - started)})
    assert held_back(one.space) and condition(one.space, "QuotaReserved")[0] == "False"
    command = told[-1].partition("To go on: ")[2]
    assert command in grpo("status", "-n", one.space.name)
    run(["bash", "-euo", "pipefail", "-c", command])
    one.at_step(before + 2)
    resumed = re.search(r"resumes from the checkpoint of step (\d+)", said(one, 2))
    assert resumed and int(resumed[1]) >= before, said(one, 2)
    # KubeRay may see the driver's end before Kueue suspends the job: that costs a retry, and no step.
    assert one.space.job_status("failed") in ("", "0", "1")
