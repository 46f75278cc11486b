"""Engines that come and go: by hand, with a node's power, by `helm upgrade` and by Ray's autoscaler.

Whoever sampled, each step has to be that of a run with one engine from its start to its end, token for token.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import namespace
from tests.e2e.kube import Namespace, cluster_tool, eventually, nodes, run
from tests.e2e.runs import START_SECONDS, Run, current, install, options, show, upgrade

pytestmark = pytest.mark.timeout(1800)
STEPS, AUTOSCALED_STEPS = 120, 50
CONFIG = {"model.dtype": "bfloat16", "run.steps": STEPS}
"""In bfloat16 nothing depends on how many rows an engine has at once; enough steps for all that happens to one run."""
LABEL = "grpo-e2e/engines"


@pytest.fixture(scope="module", autouse=True)
def _nodes() -> Iterator[None]:
    """Two nodes for engines; head and trainer are on the third, so that each of the two may lose its power."""
    pools = {node["metadata"]["labels"].get("pool"): name for name, node in nodes().items()}
    chosen = [pools["rollout"], pools["trainer"]]
    run(["kubectl", "label", "--overwrite", "node", *chosen, f"{LABEL}=yes"])
    yield
    run(["kubectl", "label", "node", *chosen, f"{LABEL}-"])


def elastic(replicas: int = 1, **config: object) -> list[str]:
    """Values of a run with 1 or 2 engines, each in a pod and on a node of its own."""
    apart = {
        "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "rollout"}},
        "topologyKey": "kubernetes.io/hostname",
    }
    group = {
        "replicas": replicas,
        "maxReplicas": 2,
        "nodeSelector": {LABEL: "yes"},
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}},
    }
    changed = {**CONFIG, "rollout.engines": {"min": 1, "max": 2}, **config}
    pods = [f"--set-json=rollout.{key}={json.dumps(value)}" for key, value in group.items()]
    return [*options(changed), *pods, "--set=trainer.nodeSelector.pool=system"]


@pytest.fixture(scope="module")
def fixed() -> dict[int, tuple[str, str]]:
    """Digests by step of a run with one engine to which nothing happens."""
    made = namespace("grpo-fixed")
    one = install(next(made), *options(CONFIG))
    one.succeeded(900)
    found = one.digests()
    next(made, None)
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def changing(fixed: dict[int, tuple[str, str]]) -> Iterator[Run]:
    made = namespace("grpo-elastic")
    one = install(next(made), *elastic())
    one.at_step(2)
    yield one
    next(made, None)


def engines(one: Run) -> int:
    """How many sampled in the last step."""
    rows = one.rows()
    return int(rows[-1]["pipeline/engines"]) if rows else 0


def events(one: Run) -> list[str]:
    return [row["what"] for row in one.rows("engine")]


def until(one: Run, count: int, seconds: float = START_SECONDS) -> None:
    eventually(lambda: engines(one) == count, f"steps with {count} engines", seconds, one.space.describe)


def scale(one: Run, pods: int) -> float:
    """Runs the command that Helm prints for it; the time."""
    notes = one.space.helm("get", "notes", "grpo")
    (command,) = [line.strip() for line in notes.splitlines() if "patch raycluster" in line]
    assert '"value": 2}' in command
    started = time.time()
    run(["bash", "-euo", "pipefail", "-c", command.replace('"value": 2}', f'"value": {pods}}}')])
    return started


def on_node(space: Namespace) -> dict[str, str]:
    """Node of each rollout pod."""
    return {pod["metadata"]["name"]: pod["spec"].get("nodeName", "") for pod in space.pods("rollout")}


def test_a_patch_of_the_ray_cluster_adds_an_engine_and_takes_it_away(changing: Run) -> None:
    one = changing
    assert engines(one) == 1 and events(one) == []
    started = scale(one, 2)
    until(one, 2)
    show({"seconds from the patch to 2 pods until both engines had made a step": round(time.time() - started)})
    assert len(set(on_node(one.space).values())) == 2
    one.at_step(one.step() + 2)
    started = scale(one, 1)
    until(one, 1)
    eventually(lambda: len(one.space.objects("pods", "ray.io/group=rollout")) == 1, "one pod left", 180)
    show({"seconds from the patch to 1 pod until it was gone": round(time.time() - started)})
    one.at_step(one.step() + 2)
    assert events(one) == ["joined", "left"] and one.rows("recovery") == []


def test_a_node_that_loses_power_takes_an_engine_and_the_run_goes_on(changing: Run) -> None:
    down, up = cluster_tool("down"), cluster_tool("up")
    if down is None or up is None:
        pytest.skip("only a cluster of the test's own can lose the power of a node")
    one = changing
    alone = set(on_node(one.space))
    scale(one, 2)
    until(one, 2)
    node = next(node for pod, node in on_node(one.space).items() if pod not in alone)
    before, lost = one.step(), time.time()
    run([str(down), node])
    try:
        one.at_step(before + 3)  # the one that broke off, and two of the engine that is left
        assert engines(one) == 1
        show({"seconds from a node's power loss to the third step after it": round(time.time() - lost)})
    finally:
        back = time.time()
        run([str(up)], seconds=300)
    until(one, 2)
    show({"seconds from its return until its engine had made a step": round(time.time() - back)})
    assert events(one) == ["joined", "left"] * 2 + ["joined"]
    assert one.rows("recovery") == [] and one.space.job_status("failed") in ("", "0")


def test_an_upgrade_with_other_replicas_resumes_the_run_with_them(changing: Run) -> None:
    old, before, started = changing, changing.step(), time.time()
    assert before < STEPS - 10, "it was over before the upgrade"
    new = upgrade(old, *elastic(2))
    assert (new.name, new.dir) == (old.name, old.dir)
    eventually(lambda: len(new.rows("start")) == 2, "the second start", START_SECONDS, new.space.describe)
    new.at_step(before + 2)
    show({"seconds from an upgrade to 2 pods to the second step after it": round(time.time() - started)})
    log = new.space.execute(new.space.ready("headgroup"), "cat", f"{new.dir}/logs/attempt-2.log")
    resumed = re.search(r"resumes from the checkpoint of step (\d+)", log)
    assert resumed and int(resumed[1]) >= before, log
    until(new, 2)


def test_the_run_is_that_of_a_fixed_number_of_engines(changing: Run, fixed: dict[int, tuple[str, str]]) -> None:
    one = current(changing.space)
    one.succeeded(600)
    assert one.digests() == fixed
    told = Counter(row["pipeline/engines"] for row in one.rows())
    assert set(told) == {1.0, 2.0}
    show({"steps that equal those of one engine": len(fixed), "with 1 engine": told[1.0], "with 2": told[2.0]})
    proof = one.space.execute(one.space.ready("headgroup"), "grpo", "audit", one.dir)
    assert "nothing contradicts" in proof and "note:" not in proof


def test_rays_autoscaler_makes_the_pod_of_an_engine_that_waits_and_removes_an_idle_one(
    fixed: dict[int, tuple[str, str]],
) -> None:
    made = namespace("grpo-autoscaled")
    space = next(made)
    started = time.time()
    scaled = "--set=rollout.autoscaling.enabled=true,rollout.autoscaling.idleTimeoutSeconds=20"
    one = install(space, *elastic(**{"run.steps": AUTOSCALED_STEPS}), scaled)
    one.at_step(1)
    until(one, 2)
    show({"seconds from helm install until the autoscaler's pod had made a step": round(time.time() - started)})
    assert len(set(on_node(space).values())) == 2 and events(one) == ["joined"]
    one.succeeded()
    assert one.digests() == {step: fixed[step] for step in range(1, AUTOSCALED_STEPS + 1)}
    idle = time.time()  # the job is over and its engines with it; the pods would stay for an hour
    eventually(lambda: len(space.pods("rollout")) == 1, "one pod of minReplicas", 180, space.describe)
    show({"seconds until a pod without an engine was gone": round(time.time() - idle)})
    next(made, None)
