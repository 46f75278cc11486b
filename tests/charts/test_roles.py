"""What the roles share, what each adds, and pods that only look: `all`, `commonLabels`, `job.check`, `job.debug`."""

import re
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from charts.generate.schema import CHART, KUBERNETES
from grpo import cli
from tests.helm import RDMA, container, env, helm, job, one, pods, refusal, template
from tests.helm import validate as strictly

ROLES = ("head", "rollout", "trainer")


def named(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **more}


def test_what_all_have_comes_first_and_a_roles_own_of_the_same_name_counts() -> None:
    every = {
        "env": [named("A", value="all"), named("B", value="all")],
        "volumes": [named("certs", emptyDir={}), named("own", emptyDir={})],
        "volumeMounts": [named("certs", mountPath="/certs"), named("own", mountPath="/own")],
        "labels": {"team": "all", "cost": "1"},
        "annotations": {"note": "all"},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
        "priorityClassName": "low",
        "sidecarContainers": [named("ship", image="x")],
    }
    own = {
        "env": [named("A", value="own")],
        "volumes": [named("certs", configMap={"name": "x"})],
        "volumeMounts": [named("certs", mountPath="/certs", readOnly=True)],
        "labels": {"team": "own"},
        "priorityClassName": "high",
    }
    rayjob = job({"all": every, "trainer": own})
    strictly(rayjob)
    found = pods(rayjob)
    for role in ROLES:
        spec = found[role]["spec"]
        assert (spec["nodeSelector"]["zone"], spec["dnsConfig"]) == ("a", every["dnsConfig"])
        assert spec["containers"][1]["name"] == "ship" and env(found[role])["B"] == "all"
        assert every["tolerations"][0] in spec["tolerations"] and found[role]["metadata"]["labels"]["cost"] == "1"
        assert found[role]["metadata"]["annotations"]["note"] == "all"
    assert "cluster-autoscaler.kubernetes.io/safe-to-evict" in found["head"]["metadata"]["annotations"]
    assert [env(found[role])["A"] for role in ROLES] == ["all", "all", "own"]
    assert [found[role]["metadata"]["labels"]["team"] for role in ROLES] == ["all", "all", "own"]
    assert [found[role]["spec"]["priorityClassName"] for role in ROLES] == ["low", "low", "high"]
    spec = found["trainer"]["spec"]
    assert [volume for volume in spec["volumes"] if volume["name"] in ("certs", "own")] == [
        named("own", emptyDir={}),
        named("certs", configMap={"name": "x"}),
    ]
    assert [mount["mountPath"] for mount in container(found["trainer"])["volumeMounts"]][-2:] == ["/own", "/certs"]


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"all": {"env": [named("RAY_ADDRESS", value="x")]}}, "all.env sets RAY_ADDRESS"),
        ({"all": {"volumes": [named("h", hostPath={"path": "/"})]}}, "all.volumes: h is a hostPath"),
        ({"all": {"replicas": 2}}, "replicas"),
        ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "app.kubernetes.io/name"),
    ],
)
def test_all_is_held_to_the_same_rules(values: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(values)


def test_common_labels_are_on_every_object_and_pod_and_in_no_selector() -> None:
    objects = template({"commonLabels": {"cost": "42"}, "job": {"check": True}, "monitoring": {"enabled": True}})
    assert {item["metadata"]["labels"]["cost"] for item in objects} == {"42"}
    assert {pod["metadata"]["labels"]["cost"] for pod in pods(one(objects, "RayJob")).values()} == {"42"}
    selectors = [item["spec"]["podSelector"] for item in objects if item["kind"] == "NetworkPolicy"]
    assert selectors and "cost" not in str(selectors)


def test_a_label_of_ones_own_beside_a_common_one_of_the_same_name_is_there_once() -> None:
    values = {
        "commonLabels": {"team": "all"},
        "trainer": {"labels": {"team": "own"}},
        "job": {"labels": {"team": "job"}},
    }
    done = helm("template", "grpo", str(CHART), "--kube-version", KUBERNETES, values=values)
    for text in done.stdout.split("\n---\n"):
        assert not re.search(r"^( +)team: .*\n(?:\1\S.*\n)*\1team:", text, flags=re.MULTILINE), text
    rayjob = job(values)
    assert rayjob["metadata"]["labels"]["team"] == "job"
    assert [pod["metadata"]["labels"]["team"] for pod in pods(rayjob).values()] == ["all", "all", "own"]


def test_a_command_runs_before_ray_and_devices_may_come_from_a_claim() -> None:
    claims = [named("gpu", resourceClaimTemplateName="h200")]
    resources = {"claims": [named("gpu")], "limits": {"memory": "64Gi", "nvidia.com/gpu": None}}
    own = {"command": ["source", "/opt/setup.sh"], "resourceClaims": claims, "resources": resources, "gpus": 1}
    values = {"config": {"cluster": {"device": "cuda"}}, "rollout": own}
    values["trainer"] = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    rayjob = job(values)
    strictly(rayjob)
    rollout, trainer = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spec = rollout["template"]["spec"]
    assert spec["containers"][0]["command"] == ["source", "/opt/setup.sh"] and spec["resourceClaims"] == claims
    assert spec["containers"][0]["resources"]["claims"] == [named("gpu")]
    assert rollout["rayStartParams"]["num-gpus"] == "1" and "num-gpus" not in trainer["rayStartParams"]
    assert "a pod of rollout has 0" in refusal(values | {"rollout": own | {"gpus": None}})


def test_rollout_mounts_the_runs_where_the_model_lies_there() -> None:
    def mounted(path: str) -> list[str]:
        found = pods(job({"config": {"model": {"path": path}}}))
        return [
            role for role in ROLES if any(mount["name"] == "runs" for mount in container(found[role])["volumeMounts"])
        ]

    assert mounted("/runs/models/mine") == list(ROLES) and mounted("/models/mine") == ["head", "trainer"]


def test_a_job_to_look_around_in_starts_no_run() -> None:
    assert job({"job": {"debug": True}})["spec"]["entrypoint"] == "sleep infinity"
    assert job({})["spec"]["entrypoint"].startswith("grpo job ")


def check_pod(values: dict[str, Any], **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    objects = template(values | {"job": {"check": True}}, **options)
    for item in objects:
        strictly(item)
    return one(objects, "Pod", "-check"), objects


def test_a_check_before_the_install_reads_all_from_copies_of_its_own() -> None:
    values = {"code": {"files": {"a/b.py": "x = 1\n"}}, "secrets": {"huggingface": {"name": "hub"}}}
    pod, objects = check_pod(values)
    made = {item["metadata"]["name"]: item for item in objects if item["kind"] == "ConfigMap"}
    copies = {volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume}
    assert len(copies) == 2
    for name in copies:
        assert made[name]["data"] == made[name.removesuffix("-check")]["data"]
        assert made[name]["metadata"]["annotations"]["helm.sh/hook-weight"] == "-1"
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert env(pod)["HF_TOKEN_PATH"] == "/etc/grpo/secrets/huggingface/token"
    assert {mount["mountPath"] for mount in container(pod)["volumeMounts"]} >= {"/etc/grpo/code", "/etc/grpo/run.yaml"}
    [runs] = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "runs"]
    assert runs == named("runs", emptyDir={}) and "serviceAccountName" not in pod["spec"]
    assert not [item for item in template(values) if item["metadata"]["name"].endswith("-check")]


def test_the_check_asks_for_no_gpu_but_knows_that_the_run_has_some() -> None:
    pod, _ = check_pod({}, profile=RDMA)
    assert "gpu" not in str(pod["spec"]["containers"][0]["resources"])
    assert container(pod)["command"][2].endswith("cluster.device=cuda")
    program, *words = shlex.split(container(check_pod({})[0])["command"][2])[1:]
    assert program == "grpo" and words[-1] == "cluster.device=cpu"
    asked = CliRunner().invoke(cli.app, ["preflight", "--help"])
    assert words[0] == "preflight" and words[1] == "--inputs" and "--inputs" in asked.output


def test_the_check_fetches_into_a_cache_of_yours_and_into_nothing_else() -> None:
    url = {"model": {"url": "s3://bucket/m"}, "config": {"model": {"path": None}}}
    assert "Name a claim of yours in cache.existingClaim" in refusal(url | {"job": {"check": True}})
    pod, _ = check_pod(url | {"cache": {"existingClaim": "cache"}})
    assert container(pod)["command"][2].startswith("grpo fetch /etc/grpo/fetch.yaml && exec grpo preflight")
