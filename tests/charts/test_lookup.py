"""What `helm install` finds on the cluster is held against the values; without a cluster nothing is refused."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.generate.schema import CHART
from tests.charts.api_server import api_server
from tests.helm import SMOKE, helm, job, one, template, validate

HERE = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "kube-root-ca.crt"}}
CLASSES = [
    {"kind": "StorageClass", "apiVersion": "storage.k8s.io/v1", "metadata": {"name": name}} for name in ("fast", "nfs")
]

KEPT = {
    "labels": {"app.kubernetes.io/managed-by": "Helm"},
    "annotations": {"meta.helm.sh/release-name": "grpo", "meta.helm.sh/release-namespace": "team"},
}
"""Of what belongs to the release."""


def made(kind: str, name: str, **more: Any) -> dict[str, Any]:
    version = {"LocalQueue": "kueue.x-k8s.io/v1beta1"}.get(kind, "v1")
    return {"kind": kind, "apiVersion": version, "metadata": {"name": name}, **more}


def claim(phase: str = "Bound", size: str = "1Gi", modes: tuple[str, ...] = ("ReadWriteMany",), **meta: Any) -> Any:
    spec = {"storageClassName": "nfs", "accessModes": list(modes), "resources": {"requests": {"storage": size}}}
    found = made("PersistentVolumeClaim", "grpo-runs", spec=spec, status={"phase": phase})
    return found | {"metadata": {"name": "grpo-runs", **KEPT, **meta}}


def said(tmp_path: Path, values: dict[str, Any], *objects: dict[str, Any]) -> str:
    """What Helm says on a cluster with these objects; "" where it takes the values."""
    with api_server(tmp_path, [HERE, *CLASSES, *objects]) as kubeconfig:
        asked = [
            "--kubeconfig",
            str(kubeconfig),
            "--dry-run=server",
            "--namespace",
            "team",
            "--disable-openapi-validation",
        ]
        done = helm("template", "grpo", str(CHART), *asked, values=values, profile=SMOKE)
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    return done.stderr


HUB = {"secrets": {"huggingface": {"name": "hub"}}}
SECRET = made("Secret", "hub", data={"token": "eA=="})
ENV = {"head": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "own", "key": "k"}}}]}}
MODEL = {"model": {"claim": "m"}, "config": {"model": {"path": None}}}
ROWS = {"data": {"claim": "d"}, "config": {"data": {"source": None}}}
QUEUE = {"queue": {"name": "training"}}


@pytest.mark.parametrize(
    "values, objects, sentence",
    [
        (HUB, [], "secrets.huggingface names the Secret hub, which is not in the namespace team"),
        (HUB, [made("Secret", "hub", data={"key": "eA=="})], "names the key token of the Secret hub, which holds key"),
        (ENV, [], "head.env names the Secret own"),
        ({"trainer": {"volumes": [{"name": "v", "configMap": {"name": "own"}}]}}, [], "trainer.volumes names the"),
        ({"rollout": {"envFrom": [{"secretRef": {"name": "own"}}]}}, [], "rollout.envFrom names the Secret own"),
        ({"image": {"pullSecrets": [{"name": "pull"}]}}, [], "image.pullSecrets names the Secret pull"),
        ({"storage": {"existingClaim": "mine"}}, [], "storage.existingClaim names the PersistentVolumeClaim mine"),
        ({"storage": {"storageClassName": "fsat"}}, [], "Name is fsat, but this cluster has fast, nfs"),
        ({"storage": {"storageClassName": "fast"}}, [claim()], "with the storage class nfs, but storage.storage"),
        ({"storage": {"storageClassName": "fast"}}, [claim("Pending")], "It holds nothing, as it is still Pending"),
        ({}, [claim(modes=("ReadWriteOnce",))], "with the access modes ReadWriteOnce, but storage.accessModes is"),
        ({}, [claim(size="2Gi")], "from before with 2Gi, but storage.size is 1Gi"),
        ({}, [claim(deletionTimestamp="2026-01-01T00:00:00Z")], "The claim grpo-runs is being deleted"),
        (MODEL, [], "model.claim names the PersistentVolumeClaim m"),
        (ROWS, [], "data.claim names the PersistentVolumeClaim d"),
        ({"results": {"claim": "r"}}, [], "results.claim names the PersistentVolumeClaim r"),
        ({"cache": {"existingClaim": "c"}}, [], "cache.existingClaim names the PersistentVolumeClaim c"),
        ({"code": {"configMap": "c", "revision": "v1"}}, [], "code.configMap names the ConfigMap c"),
        ({"code": {"secret": "s"}}, [], "code.secret names the Secret s"),
        ({"all": {"env": ENV["head"]["env"]}}, [], "all.env names the Secret own"),
        (QUEUE, [], "queue.name is training, but the namespace team has no such LocalQueue"),
    ],
)  # fmt: skip
def test_what_is_missing_is_refused_with_a_sentence(
    tmp_path: Path, values: dict[str, Any], objects: list[dict[str, Any]], sentence: str
) -> None:
    assert sentence in said(tmp_path, values, *objects)
    template(values)  # no cluster, no refusal


def test_what_is_there_is_taken_and_so_is_all_where_nobody_shall_ask(tmp_path: Path) -> None:
    queue = made("LocalQueue", "training")
    assert said(tmp_path, HUB | QUEUE | {"storage": {"storageClassName": "nfs"}}, SECRET, queue, claim()) == ""
    assert said(tmp_path, HUB | QUEUE | {"lookup": False}) == ""


def test_a_job_that_is_there_keeps_the_spec_that_its_controllers_wrote_back(tmp_path: Path) -> None:
    """KubeRay fills in fields, Kueue selectors: a server-side apply of other words would be a conflict."""
    fresh = job()
    spec = json.loads(json.dumps(fresh["spec"])) | {"suspend": True}
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["scaleStrategy"] = {}
    metadata = {"name": fresh["metadata"]["name"], **KEPT}
    there = {"kind": "RayJob", "apiVersion": "ray.io/v1", "metadata": metadata, "spec": spec}
    for values, wanted in (
        ({}, {key: value for key, value in spec.items() if key != "suspend"}),
        ({"job": {"restart": "2"}}, job({"job": {"restart": "2"}})["spec"]),
    ):
        with api_server(tmp_path, [HERE, *CLASSES, there]) as kubeconfig:
            asked = ("--kubeconfig", str(kubeconfig), "--dry-run=server", "--disable-openapi-validation")
            done = helm("template", "grpo", str(CHART), *asked, values=values, profile=SMOKE)
        assert done.returncode == 0, done.stderr
        assert one(list(yaml.safe_load_all(done.stdout)), "RayJob")["spec"] == wanted


def notes(tmp_path: Path, values: dict[str, Any]) -> str:
    with api_server(tmp_path, [HERE]) as kubeconfig:
        asked = [
            "install",
            "grpo",
            str(CHART),
            "--dry-run=client",
            "--namespace",
            "team",
            "--kubeconfig",
            str(kubeconfig),
        ]
        done = helm(*asked, values=values, profile=SMOKE)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


@pytest.mark.parametrize(
    "values, claim, script",
    [
        ({"results": {"claim": "out", "path": "team"}}, "out", "read; exec tar c -C /mnt/results/team/mine ."),
        (
            {"storage": {"existingClaim": "all"}, "lookup": False},
            "all",
            "read; grpo export /runs/mine /tmp/out/policy >&2 ",
        ),
    ],
)
def test_the_notes_have_one_command_that_brings_the_results(
    values: dict[str, Any], claim: str, script: str, tmp_path: Path
) -> None:
    said = notes(tmp_path, values | {"lookup": False, "config": {"run": {"name": "mine"}}})
    (command,) = [line for line in said.splitlines() if "mkdir OUT" in line]
    words = shlex.split(command.partition("echo | ")[2].partition(" | tar")[0])
    assert words[:5] == ["kubectl", "-n", "team", "run", "grpo-results"]
    (told,) = [word.removeprefix("--overrides=") for word in words if word.startswith("--overrides=")]
    spec = json.loads(told)["spec"]
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    assert spec["containers"][0]["command"][2].startswith(script)
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})


def test_results_in_a_bucket_are_fetched_from_there_and_those_of_a_run_in_one_need_a_place(tmp_path: Path) -> None:
    mine = {"config": {"run": {"name": "mine"}}}
    assert "grpo fetch s3://bucket/out/mine OUT" in notes(tmp_path, mine | {"results": {"url": "s3://bucket/out"}})
    assert "OUT" not in notes(tmp_path, {"config": {"checkpoint": {"dir": "s3://bucket/run"}}})


def test_what_the_release_makes_itself_or_can_do_without_is_not_asked_for(tmp_path: Path) -> None:
    own = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "own"}}
    assert said(tmp_path, ENV | {"extraObjects": [own]}) == ""
    optional = {"secretKeyRef": {"name": "own", "key": "k", "optional": True}}
    assert said(tmp_path, {"head": {"env": [{"name": "A", "valueFrom": optional}]}}) == ""
