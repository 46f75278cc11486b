"""values.schema.json: the run's part from grpo/config/schema.py, the chart's from its values, closed throughout.

`python -m charts.generate.schema` writes it. Types come from the defaults in values.yaml and descriptions from its
comments; KINDS says what a default cannot. It is draft 07, which every Helm 3 and 4 reads.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from charts.generate.comments import descriptions
from charts.generate.tools import ROOT
from grpo.config.load import config_schema

Schema = dict[str, Any]
CHART = ROOT / "charts" / "grpo"
KUBERNETES = "1.34.0"
CORE, NETWORKING = "io.k8s.api.core.v1.", "io.k8s.api.networking.v1."
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
OWN_LABELS: Schema = TEXTS | {"propertyNames": {"not": {"pattern": "^(app\\.kubernetes\\.io|ray\\.io|grpo\\.dev)/"}}}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": "^[0-9]+(\\.[0-9]+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"}
_PLAIN, _EXTENDED = "cpu|memory|ephemeral-storage|hugepages-[0-9]+[KMG]i", "[a-z0-9.-]+/[A-Za-z0-9._-]+"
RESOURCE_NAMES: Schema = {"pattern": f"^({_PLAIN}|{_EXTENDED})$"}
SECONDS: Schema = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": 10_000}


def _kubernetes(kind: str) -> Schema:
    return {"$ref": f"#/definitions/{kind}"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _choice(*values: Any) -> Schema:
    return {"enum": list(values)}


def _text(pattern: str) -> Schema:
    return {"type": "string", "pattern": f"^({pattern})?$"}


def _or_null(schema: Schema) -> Schema:
    return schema | {"type": [schema["type"], "null"]}


NAME = "[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
FILES: Schema = TEXTS | {"propertyNames": {"pattern": f"^{_PART}(/{_PART})*$", "maxLength": 200}}
_LINE = "[^\\x00-\\x20\\x7f\"'`$\\\\]+"
ENDED = _choice("SUCCEEDED", "FAILED")
_CONDITION: Schema = {
    "type": "object",
    "properties": {
        "jobStatus": ENDED,
        "jobDeploymentStatus": _choice("Failed"),
        "ttlSeconds": {"type": "integer", "minimum": 0},
    },
    "oneOf": [{"required": ["jobStatus"]}, {"required": ["jobDeploymentStatus"]}],
}
_RULE: Schema = {
    "type": "object",
    "properties": {
        "policy": _choice("DeleteWorkers", "DeleteCluster", "DeleteSelf", "DeleteNone"),
        "condition": _CONDITION,
    },
    "required": ["policy", "condition"],
}

_ACTIONS = "Replace Keep Drop HashMod LabelMap LabelDrop LabelKeep Lowercase Uppercase KeepEqual DropEqual"
RELABELING: Schema = {
    "type": "object",
    "properties": {
        "action": _choice(*(name for pair in ((word.lower(), word) for word in _ACTIONS.split()) for name in pair)),
        "sourceLabels": _list({"type": "string"}),
        "separator": {"type": "string"},
        "targetLabel": {"type": "string"},
        "regex": {"type": "string"},
        "modulus": {"type": "integer", "minimum": 1},
        "replacement": {"type": "string"},
    },
}
GROUP: dict[str, Schema] = {
    "replicas": COUNT,
    "resources": _kubernetes(f"{CORE}ResourceRequirements"),
    "nodeSelector": TEXTS,
    "tolerations": _list(_kubernetes(f"{CORE}Toleration")),
    "affinity": _kubernetes(f"{CORE}Affinity"),
    "topologySpreadConstraints": _list(_kubernetes(f"{CORE}TopologySpreadConstraint")),
    "priorityClassName": _text(NAME),
    "runtimeClassName": _text(NAME),
    "gpus": _or_null({"type": "integer", "minimum": 1}),
    "resourceClaims": _list(_kubernetes(f"{CORE}PodResourceClaim")),
    "command": _list({"type": "string"}),
    "annotations": TEXTS,
    "labels": OWN_LABELS,
    "env": _list(_kubernetes(f"{CORE}EnvVar")),
    "envFrom": _list(_kubernetes(f"{CORE}EnvFromSource")),
    "volumes": _list(_kubernetes(f"{CORE}Volume")),
    "volumeMounts": _list(_kubernetes(f"{CORE}VolumeMount")),
    "initContainers": _list(_kubernetes(f"{CORE}Container")),
    "sidecarContainers": _list(_kubernetes(f"{CORE}Container")),
    "shmSize": QUANTITY,
    "objectStoreMemory": QUANTITY,
    "terminationGracePeriodSeconds": SECONDS,
}

KINDS: dict[str, Schema] = {
    "nameOverride": _text("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"),
    "fullnameOverride": _text("[a-z]([-a-z0-9]{0,36}[a-z0-9])?"),
    "config": {"$ref": "#/definitions/Config"},
    "code.files": FILES,
    "data.files": FILES,
    **{f"{key}.configMap": _text(NAME) for key in ("code", "data")},
    "code.secret": _text(NAME),
    "results.claim": _text(NAME),
    "results.path": _text(_LINE),
    "results.url": _text("s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\\x00-\\x20\\x7f\"'`$?#*\\\\]*)?"),
    "code.imagePath": _text("/[A-Za-z0-9_./-]*"),
    **{f"{key}.claim": _text(NAME) for key in ("data", "model")},
    **{f"{key}.{part}": _text(_LINE) for key in ("data", "model") for part in ("url", "path")},
    **{f"{key}.include": _list({"type": "string", "pattern": f"^{_LINE}$"}) for key in ("data", "model")},
    **{f"{key}.revision": _text("[^\\x00-\\x1f\\x7f]{1,1000}") for key in ("code", "data", "model")},
    "cache.existingClaim": _text(NAME),
    "image.pullPolicy": _choice("Always", "IfNotPresent", "Never"),
    "image.pullSecrets": _list(_kubernetes(f"{CORE}LocalObjectReference")),
    "image.controller.digest": _text("sha256:[0-9a-f]{64}"),
    "image.worker.digest": _text("sha256:[0-9a-f]{64}"),
    "podSecurity": _choice("restricted", "baseline", "privileged"),
    "runAsUser": _or_null({"type": "integer", "minimum": 1}),
    "fsGroup": _or_null({"type": "integer", "minimum": 0}),
    "job.submissionMode": _choice("auto", "SidecarMode", "HTTPMode", "K8sJobMode"),
    "job.restart": {"type": "string", "maxLength": 1024},
    "job.backoffLimit": {"type": "integer", "minimum": 0, "maximum": 1000},
    "job.activeDeadlineSeconds": _or_null(SECONDS),
    "job.preRunningDeadlineSeconds": _or_null(SECONDS),
    "job.ttlSecondsAfterFinished": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "job.deletionStrategy": {"type": "object", "properties": {"deletionRules": _list(_RULE) | {"minItems": 1}}},
    "job.rayVersion": {"type": "string", "pattern": "^[0-9]+\\.[0-9]+\\.[0-9]+$"},
    "job.labels": OWN_LABELS,
    "job.annotations": TEXTS,
    "storage.existingClaim": _text(NAME),
    "storage.storageClassName": _text(NAME),
    "storage.size": QUANTITY,
    "storage.accessModes": _list(_choice("ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod")) | {"minItems": 1},
    "queue.name": _text(NAME),
    "queue.priorityClass": _text(NAME),
    "scheduler.name": _choice("none", "volcano", "kai"),
    "scheduler.priorityClassName": _text(NAME),
    "scheduler.networkTopologyMode": _choice("", "hard", "soft"),
    "networkPolicy.dnsCIDRs": _list({"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]+$"}),
    "networkPolicy.extraIngress": _list(_kubernetes(f"{NETWORKING}NetworkPolicyIngressRule")),
    "networkPolicy.extraEgress": _list(_kubernetes(f"{NETWORKING}NetworkPolicyEgressRule")),
    "serviceAccount.name": _text(NAME),
    "serviceAccount.annotations": TEXTS,
    "rdma.resources": {"type": "object", "propertyNames": RESOURCE_NAMES, "additionalProperties": QUANTITY},
    "monitoring.enabled": _choice("auto", True, False),
    "monitoring.podMonitor.labels": TEXTS,
    "monitoring.podMonitor.interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
    "monitoring.podMonitor.scrapeTimeout": _text("[0-9]+(ms|s|m|h)"),
    "monitoring.podMonitor.relabelings": _list(RELABELING),
    "monitoring.podMonitor.metricRelabelings": _list(RELABELING),
    "monitoring.runbookUrl": _text("https?://[^\\s/#]+(/[^\\s#]*)?"),
    "monitoring.rules.labels": TEXTS,
    "monitoring.dashboards.labels": TEXTS,
    "monitoring.dashboards.annotations": TEXTS,
    "extraObjects": _list({"type": "object"}),
    "commonLabels": OWN_LABELS,
    "all.dnsConfig": _kubernetes(f"{CORE}PodDNSConfig"),
    **{f"{group}.{key}": kind for group in ("all", "head", "rollout", "trainer") for key, kind in GROUP.items()},
    "rollout.replicas": COUNT | {"minimum": 0},
    "rollout.maxReplicas": _or_null(COUNT),
    "rollout.autoscaling.idleTimeoutSeconds": SECONDS,
}


def values_schema() -> Schema:
    """The schema of the chart's values. Raises KeyError for a value whose type nothing tells."""
    text = (CHART / "values.yaml").read_text()
    schema = _object("", yaml.safe_load(text), descriptions(text))
    schema["properties"]["global"] = {"type": "object", "description": "Helm's, where the chart is part of another."}
    config = config_schema()
    definitions = config.pop("$defs") | {"Config": config}
    for required in (definitions["Config"], definitions["Model"]):  # `model` may name it; the templates say a sentence
        required.pop("required")
    for section, key in (("Model", "path"), ("Data", "source")):  # null over a profile's, where the values name another
        definitions[section]["properties"][key] = _or_null(definitions[section]["properties"][key])
    _take_kubernetes(schema, definitions)
    named = {"definitions": dict(sorted(definitions.items()))}
    tree = {"$schema": "http://json-schema.org/draft-07/schema#", **schema, **named}
    closed: Schema = _draft7(tree)
    return closed


def _object(path: str, defaults: dict[str, Any], texts: dict[str, str]) -> Schema:
    properties = {}
    for key, default in defaults.items():
        name = f"{path}.{key}" if path else key
        kind = KINDS.get(name) or _by_default(name, default, texts)
        properties[key] = {"description": texts[name], **kind} if name in texts else kind
    return {"type": "object", "properties": properties}


def _by_default(name: str, default: Any, texts: dict[str, str]) -> Schema:
    if isinstance(default, bool):
        return {"type": "boolean"}
    if isinstance(default, int | float):
        return {"type": "number", "minimum": 0}
    if isinstance(default, str):
        return {"type": "string"}
    if isinstance(default, dict) and default:
        return _object(name, default, texts)
    raise KeyError(f"{name}: its default {default!r} tells no type; add it to KINDS")


def _take_kubernetes(schema: Schema, definitions: Schema) -> None:
    """Adds the definitions of Kubernetes that the schema refers to, and those that these refer to."""
    folder = Path(str(files("kubernetes_validate"))) / "kubernetes-json-schema"
    known = json.loads((folder / f"v{KUBERNETES}-local-strict" / "_definitions.json").read_text())["$defs"]
    missing = _references(schema) - set(definitions)
    while missing:
        definitions |= {name: _lean(known[name]) for name in missing}
        missing = {name for kind in missing for name in _references(definitions[kind])} - set(definitions)
    for part in ("limits", "requests"):
        definitions[f"{CORE}ResourceRequirements"]["properties"][part]["propertyNames"] = RESOURCE_NAMES


def _references(tree: Any) -> set[str]:
    if isinstance(tree, list):
        return {name for item in tree for name in _references(item)}
    if not isinstance(tree, dict):
        return set()
    own = {tree["$ref"].rpartition("/")[2]} if "$ref" in tree else set()
    return own | {name for value in tree.values() for name in _references(value)}


def _lean(tree: Any) -> Any:
    """Without prose and hints for API servers: a release of Helm keeps the schema in a Secret of 1 MiB."""
    if isinstance(tree, list):
        return [_lean(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: _lean(value)
        for key, value in tree.items()
        if not (key.startswith("x-kubernetes") or key == "description" and isinstance(value, str))
    }


def _draft7(tree: Any) -> Any:
    """Draft 2020-12 as draft 07, without titles; every object with named keys takes no others."""
    if isinstance(tree, list):
        return [_draft7(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    new = {key: _draft7(value) for key, value in tree.items() if key != "title" or not isinstance(value, str)}
    if "$ref" in new:
        new["$ref"] = "#/definitions/" + new["$ref"].rpartition("/")[2]
    if "prefixItems" in new:
        new |= {"items": new.pop("prefixItems"), "additionalItems": False}
    if new.get("properties") and "type" in new:
        new.setdefault("additionalProperties", False)
    return new


def main() -> None:
    (CHART / "values.schema.json").write_text(json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
