"""What lies in .github/: workflows that actionlint takes, verbs and versions that exist, no registry of anybody."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.generate import docs
from grpo import __version__

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
ACTIONLINT = "github.com/rhysd/actionlint/cmd/actionlint@v1.7.7"


def jobs() -> list[tuple[str, dict[str, Any]]]:
    files = [yaml.safe_load(path.read_text()) for path in WORKFLOWS]
    return [(name, job) for file in files for name, job in file["jobs"].items()]


@pytest.mark.slow
@pytest.mark.skipif(docs.go() is None, reason="actionlint is a Go program, and there is no Go")
def test_actionlint_finds_nothing() -> None:
    command = [docs.go() or "go", "run", ACTIONLINT, "-no-color", *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"GOFLAGS": "-mod=mod"})
    if "actionlint" in done.stderr and not done.stdout:
        pytest.skip(f"actionlint cannot be had: {done.stderr[-200:]}")
    assert (done.returncode, done.stdout) == (0, "")


def test_every_job_ends_and_has_few_rights() -> None:
    assert [name for name, _ in jobs()] == ["lint", "test", "e2e", "ci", "release"]
    for name, job in jobs():
        assert "uses" in job or job["timeout-minutes"] <= 180, name
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    rights = {name: job["permissions"] for name, job in jobs() if "permissions" in job}
    assert rights == {"release": {"contents": "write", "id-token": "write", "packages": "write"}}


def test_workflows_run_verbs_of_the_makefile() -> None:
    verbs = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    lines = [step["run"] for _, job in jobs() for step in job.get("steps", ()) if "run" in step]
    called = {verb for line in lines for words in re.findall(r"\bmake ([a-z0-9 -]+)", line) for verb in words.split()}
    assert called and called <= verbs
    assert set(re.findall(r"^make ([a-z0-9-]+)$", (ROOT / ".ci/run").read_text(), flags=re.M)) <= called


def test_a_release_has_one_number() -> None:
    chart = yaml.safe_load((ROOT / "charts/grpo/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert re.findall(r"^## (\d[\d.]*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[0] == __version__


def test_no_registry_is_named_but_examples() -> None:
    for path in (*WORKFLOWS, *(ROOT / "examples/kubernetes").glob("*.yaml"), ROOT / "SECURITY.md"):
        assert not re.search(r"\b(ghcr|quay|docker)\.io\b|gcr\.io|amazonaws\.com/", path.read_text()), path
