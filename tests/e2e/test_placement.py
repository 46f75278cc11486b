"""What the scheduler and the API server say of the chart, with GPUs that do not exist; nothing is trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import namespace
from tests.e2e.kube import CHART, ROOT, Namespace, eventually, fails, nodes
from tests.e2e.runs import SMOKE, install

pytestmark = pytest.mark.timeout(600)
PROFILES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))


@pytest.fixture
def space() -> Iterator[Namespace]:
    yield from namespace("grpo-placement")


def test_there_are_five_profiles() -> None:
    assert PROFILES == ["cpu-smoke", "one-host", "rdma-ondemand", "spot-kueue", "two-hosts"]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_api_server_takes_the_profile(profile: str, space: Namespace) -> None:
    values, manifest = str(CHART / "ci" / f"{profile}-values.yaml"), str(ROOT / "manifests" / f"{profile}.yaml")
    rendered = space.helm("template", "grpo", str(CHART), "-f", values, "--skip-tests", "--kube-version", "1.34.0")
    for text in (rendered, Path(manifest).read_text()):
        space.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)


def test_a_typo_fails_at_install(space: Namespace) -> None:
    command = ["helm", "-n", space.name, "install", "grpo", str(CHART), "-f", str(SMOKE)]
    assert "learning_rat" in fails([*command, "--set", "config.train.learning_rat=1e-6"])
    assert space.job() == {}


def gpus(pool_size: str, *more: str) -> list[str]:
    wanted = {"requests": {"cpu": "50m", "memory": "256Mi", "nvidia.com/gpu": 2}}
    wanted["limits"] = {"memory": "2Gi", "nvidia.com/gpu": 2}  # none of CPU: with it a pod needs minutes to end
    resources = [f"--set-json={group}.resources={json.dumps(wanted)}" for group in ("rollout", "trainer")]
    engines = [f"--set-json=rollout.replicas={pool_size}", f"--set-json=config.rollout.engines={2 * int(pool_size)}"]
    device = ["--set", "config.cluster.device=cuda", "--set", "config.train.ranks=2", "--set", "trainer.replicas=1"]
    return [*resources, *engines, *device, *more]


def test_every_gpu_pod_lands_in_its_pool(space: Namespace) -> None:
    install(space, *gpus("2"))
    eventually(lambda: len([pod for pod in space.pods() if pod["spec"].get("nodeName")]) == 4, "four placed pods", 120)
    pools = {name: node["metadata"]["labels"].get("pool") for name, node in nodes().items()}
    placed = sorted((pod["metadata"]["labels"]["ray.io/group"], pools[pod["spec"]["nodeName"]]) for pod in space.pods())
    assert placed == [("headgroup", "system"), ("rollout", "rollout"), ("rollout", "rollout"), ("trainer", "trainer")]


def test_engines_and_ranks_of_one_host_share_a_pod(space: Namespace) -> None:
    wanted = {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "2Gi", "nvidia.com/gpu": 4}}
    values = ["rollout.replicas=0", "config.rollout.engines=4", "config.rollout.engines_per_gpu=2", "job.debug=true"]
    values += ["config.cluster.device=cuda", "config.train.ranks=2"]
    install(
        space,
        f"--set-json=trainer.resources={json.dumps(wanted)}",
        *(part for value in values for part in ("--set", value)),
    )
    look = (
        "import json, ray; ray.init('auto', logging_level='ERROR', log_to_driver=False); print(json.dumps(ray.nodes()))"
    )

    def both() -> dict[str, Any]:
        head = space.ready("headgroup")
        told = space.execute(head, "python", "-c", look, check=False) if head and space.ready("trainer") else ""
        found = json.loads(told.splitlines()[-1]) if told.strip().endswith("]") else []
        return next((node for node in found if node["Alive"] and node["Resources"].get("GPU")), {})

    node = eventually(both, "a node of Ray with GPUs", 180, space.describe)
    assert len(space.pods("trainer")) == 1 and not space.pods("rollout")
    assert node["Resources"]["GPU"] == 4 and node["Resources"]["CPU"] == 6
    assert "grpo.dev/role" not in node["Labels"], "a node of no role takes both"


def test_a_pool_that_is_too_small_leaves_nothing_half_placed(space: Namespace) -> None:
    deadline = ["--set", "job.preRunningDeadlineSeconds=40", "--set", "job.backoffLimit=0"]
    deadline += ["--set", "job.ttlSecondsAfterFinished=20"]
    install(space, *gpus("3", *deadline))

    def unschedulable() -> str:
        for pod in space.pods("rollout"):
            for condition in pod.get("status", {}).get("conditions", []):
                if condition.get("reason") == "Unschedulable":
                    return str(condition["message"])
        return ""

    assert "Insufficient nvidia.com/gpu" in eventually(unschedulable, "a pod that cannot be placed", 60)
    assert space.job_status("jobDeploymentStatus") in ("Initializing", "Waiting")
    over = eventually(lambda: space.job_status("jobDeploymentStatus") == "Failed", "the deadline", 120, space.describe)
    assert over and space.job_status("reason") == "PreRunningDeadlineExceeded"
    held = "ray.io/group in (rollout,trainer)"
    eventually(lambda: not space.objects("pods", held), "no pod left that holds a GPU", 150, space.describe)


def test_without_the_operator_one_sentence_says_how_to_install_it() -> None:
    bare = ["--kube-version", "1.34.0", "--api-versions", "apiregistration.k8s.io/v1"]  # a cluster, but no KubeRay
    told = fails(["helm", "template", "grpo", str(CHART), "-f", str(SMOKE), *bare])
    assert "KubeRay" in told and "helm install kuberay-operator" in told
