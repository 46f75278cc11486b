"""What tests of alerts and dashboards share: the chart as Helm renders it, and promtool."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.generate.tools import ROOT, helm

CHART = ROOT / "charts/grpo"
OPERATOR = "monitoring.coreos.com/v1"
# Words in PromQL that look like the name of a metric
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool", "Inf"}


def promtool() -> str:
    """From the folder of programs of the test cluster, or from the PATH; skips the test where there is none."""
    own = Path(os.environ.get("CLUSTER_CACHE", "/nonexistent")) / "bin/promtool"
    found = str(own) if own.exists() else shutil.which("promtool")
    if found is None:
        pytest.skip("promtool (Debian package prometheus) is not installed")
    return found


@cache
def render(
    *settings: str, release: str = "grpo", namespace: str = "default", operator: bool = True
) -> list[dict[str, Any]]:
    """The objects of the chart with `settings` (key=value), in a cluster with or without the Prometheus operator."""
    command = [helm(), "template", release, str(CHART), "--namespace", namespace, "--kube-version", "1.34.0"]
    command += ["--values", str(CHART / "ci/cpu-smoke-values.yaml")]
    command += [part for setting in settings for part in ("--set", setting)]
    command += ["--api-versions", OPERATOR] if operator else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def kind(wanted: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == wanted]


def alerts(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rules by their names."""
    (rule,) = kind("PrometheusRule", documents)
    return {alert["alert"]: alert for group in rule["spec"]["groups"] for alert in group["rules"]}


def metric_labels(expression: str) -> list[tuple[str, list[str]]]:
    """Every metric of an expression and the labels by which it is selected."""
    without_strings = re.sub(r'"(\\.|[^"\\])*"', '""', expression)
    without_groups = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", without_strings)
    without_ranges = re.sub(r"\[[^\]]*\]", " ", without_groups)
    found = re.finditer(r"(?<![\w.])([a-zA-Z_:][\w:]*)\s*(\(|\{([^}]*)\})?", re.sub(r"\$\w+", "1", without_ranges))
    return [
        (match[1], re.findall(r"(\w+)\s*[=!]~?", match[3] or ""))
        for match in found
        if match[2] != "(" and match[1] not in WORDS and match.start() != match.end()
    ]
