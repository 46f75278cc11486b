"""examples/kubernetes: objects of other projects by those projects' definitions, values that the chart takes."""

import copy
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helm import _closed, _with_defaults, template

SAMPLES = Path(__file__).parents[2] / "examples/kubernetes"
MODULES = Path(os.environ.get("GOMODCACHE") or Path.home() / "go/pkg/mod")
# Where the definitions lie once `go mod download MODULE` has fetched them
CRDS = {
    "kubeflow-trainer.yaml": "github.com/kubeflow/trainer/v2@v2.1.0/manifests/base/crds",
    "argo-cd.yaml": "github.com/argoproj/argo-cd/v2@v2.13.3/manifests/crds",
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((SAMPLES / name).read_text()))


@pytest.mark.parametrize("name", CRDS)
def test_samples_are_what_their_projects_define(name: str) -> None:
    folder = MODULES / CRDS[name]
    if not folder.is_dir():
        pytest.skip(f"no definitions here: go mod download {CRDS[name].partition('/manifests')[0]}")
    kinds = {}
    for path in folder.glob("*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)
        if definition["kind"] == "CustomResourceDefinition":
            kinds[definition["spec"]["names"]["kind"]] = definition["spec"]
    for item in documents(name):
        group, _, version = item["apiVersion"].partition("/")
        spec = kinds[item["kind"]]
        assert spec["group"] == group
        (schema,) = [one["schema"]["openAPIV3Schema"] for one in spec["versions"] if one["name"] == version]
        jsonschema.Draft202012Validator(_closed(schema)).validate(_with_defaults(copy.deepcopy(item), schema))


def test_the_application_has_values_that_the_chart_takes() -> None:
    (application,) = documents("argo-cd.yaml")
    values = application["spec"]["source"]["helm"]["valuesObject"]
    assert {item["kind"] for item in template(values, profile=None)} >= {"RayJob", "PrometheusRule"}


def test_the_runtime_keeps_to_restricted() -> None:
    runtime, job = documents("kubeflow-trainer.yaml")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    context = pod["securityContext"]
    assert context["runAsNonRoot"] and context["seccompProfile"]["type"] == "RuntimeDefault"
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
