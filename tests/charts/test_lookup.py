"""What `helm install` finds on the cluster is held against the values; without a cluster nothing is refused."""

from pathlib import Path
from typing import Any

import pytest

from charts.generate.schema import CHART
from tests.charts.api_server import api_server
from tests.helm import SMOKE, helm, template

HERE = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "kube-root-ca.crt"}}
CLASSES = [
    {"kind": "StorageClass", "apiVersion": "storage.k8s.io/v1", "metadata": {"name": name}} for name in ("fast", "nfs")
]


def made(kind: str, name: str, **more: Any) -> dict[str, Any]:
    version = {"LocalQueue": "kueue.x-k8s.io/v1beta1"}.get(kind, "v1")
    return {"kind": kind, "apiVersion": version, "metadata": {"name": name}, **more}


def claim(phase: str = "Bound", size: str = "1Gi", modes: tuple[str, ...] = ("ReadWriteMany",), **meta: Any) -> Any:
    spec = {"storageClassName": "nfs", "accessModes": list(modes), "resources": {"requests": {"storage": size}}}
    found = made("PersistentVolumeClaim", "grpo-runs", spec=spec, status={"phase": phase})
    release = {"meta.helm.sh/release-name": "grpo", "meta.helm.sh/release-namespace": "team"}
    kept = {"labels": {"app.kubernetes.io/managed-by": "Helm"}, "annotations": release}
    return found | {"metadata": {"name": "grpo-runs", **kept, **meta}}


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


def test_what_the_release_makes_itself_or_can_do_without_is_not_asked_for(tmp_path: Path) -> None:
    own = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "own"}}
    assert said(tmp_path, ENV | {"extraObjects": [own]}) == ""
    optional = {"secretKeyRef": {"name": "own", "key": "k", "optional": True}}
    assert said(tmp_path, {"head": {"env": [{"name": "A", "valueFrom": optional}]}}) == ""
