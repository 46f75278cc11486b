"""What is generated around charts/grpo is fresh, and the package holds it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.generate import docs, manifests, schema
from charts.generate.comments import descriptions
from charts.generate.schema import CHART
from charts.generate.tools import ROOT
from tests import helm as charts
from tests.helm import HELMS, job, one

PROFILES = manifests.PROFILES


def test_schema_is_fresh() -> None:
    assert json.loads((CHART / "values.schema.json").read_text()) == schema.values_schema(), "make schema"


@pytest.mark.parametrize("profile", PROFILES)
def test_manifests_are_fresh(profile: str) -> None:
    for name, text in manifests.manifests(profile).items():
        assert (ROOT / "manifests" / name).read_text() == text, "make manifests"


@pytest.mark.skipif(docs.go() is None, reason="helm-docs is a Go program, and there is no Go")
def test_readme_is_fresh() -> None:
    try:
        fresh = docs.readme()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"helm-docs cannot be had: {error.stderr[-200:]}")
    assert (CHART / "README.md").read_text() == fresh, "make chart-docs"


def test_every_value_is_described() -> None:
    text = (CHART / "values.yaml").read_text()
    described = descriptions(text)

    def missing(tree: dict[str, Any], path: str = "") -> list[str]:
        names = {key: f"{path}{key}" for key in tree}
        return [
            leaf
            for key, value in tree.items()
            if names[key] not in described
            for leaf in (missing(value, f"{names[key]}.") if isinstance(value, dict) and value else [names[key]])
        ]

    assert missing(yaml.safe_load(text)) == []


def test_a_default_without_a_type_is_an_error() -> None:
    with pytest.raises(KeyError, match="storage.new: its default \\[\\] tells no type"):
        schema._object("storage", {"new": []}, {})


@pytest.mark.parametrize("profile", PROFILES)
def test_plain_manifests_hold_nothing_of_helm_and_no_namespace(profile: str) -> None:
    text = (ROOT / "manifests" / f"{profile}.yaml").read_text()
    assert "helm.sh/" not in text and "managed-by" not in text
    objects = list(yaml.safe_load_all(text))
    assert all("namespace" not in item["metadata"] for item in objects)
    assert {item["kind"] for item in objects} >= {"RayJob", "ConfigMap", "NetworkPolicy", "ServiceAccount", "Service"}
    assert one(objects, "RayJob")["metadata"]["name"] == job(profile=profile)["metadata"]["name"]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_claim_is_in_a_file_of_its_own_that_warns_at_its_head(profile: str) -> None:
    with_job = yaml.safe_load_all((ROOT / "manifests" / f"{profile}.yaml").read_text())
    assert "PersistentVolumeClaim" not in {item["kind"] for item in with_job}
    text = (ROOT / "manifests" / f"{profile}-claim.yaml").read_text()
    assert text.startswith("# WARNING: whoever deletes this object deletes every run")
    [claim] = yaml.safe_load_all(text)
    assert claim["metadata"]["name"] == "grpo-runs" and "annotations" not in claim["metadata"]


def test_the_package_holds_the_schema(tmp_path: Path) -> None:
    subprocess.run([HELMS[0], "package", str(CHART), "-d", str(tmp_path)], check=True, capture_output=True)
    names = charts.package_names(next(tmp_path.glob("*.tgz")))
    assert {"grpo/values.schema.json", "grpo/README.md", "grpo/templates/NOTES.txt"} <= set(names)
