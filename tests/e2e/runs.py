"""Runs of the cpu-smoke profile on the cluster, and what can be asked of one."""

import json
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.e2e.kube import CHART, ROOT, Namespace, Object, cluster_tool, eventually

SMOKE = CHART / "ci" / "cpu-smoke-values.yaml"
GUIDE = (ROOT / "docs" / "kubernetes.md").read_text()
START_SECONDS = 420  # three pods, their imports, an engine and a trainer, on two cores


@dataclass(frozen=True)
class Run:
    """A RayJob and the run that it does."""

    space: Namespace
    job: str
    name: str
    dir: str

    def step(self) -> int:
        return self.space.step(self.dir)

    def at_step(self, step: int, seconds: float = START_SECONDS) -> int:
        """Waits until the run has finished a step."""
        what = f"step {step} of {self.name}"
        return eventually(lambda: max(0, self.step() + 1 - step), what, seconds, self.space.describe)

    def succeeded(self, seconds: float = START_SECONDS) -> None:
        def over() -> str:
            status = self.space.job_status()
            deployment = self.space.job_status("jobDeploymentStatus")
            assert deployment != "Failed", self.space.describe()
            return "yes" if (status, deployment) == ("SUCCEEDED", "Complete") else ""

        eventually(over, f"SUCCEEDED of {self.job}", seconds, self.space.describe)

    def rows(self, event: str = "step") -> list[Object]:
        return [row for row in self.space.rows(self.dir) if row["event"] == event]

    def digests(self) -> dict[int, tuple[str, str]]:
        """What each step consumed and sampled, by step."""
        return {row["step"]: (row["prompts"], row["tokens"]) for row in self.rows()}


def install(space: Namespace, *options: str) -> Run:
    space.helm("install", "grpo", str(CHART), "-f", str(SMOKE), *options)
    open_volume(space)
    return current(space)


def upgrade(old: Run, *options: str) -> Run:
    """Upgrades the release to values that make another job of it."""
    old.space.helm("upgrade", "grpo", str(CHART), "-f", str(SMOKE), *options)

    def replaced() -> bool:
        names = [job["metadata"]["name"] for job in old.space.objects("rayjobs.ray.io")]
        return len(names) == 1 and names != [old.job]

    eventually(replaced, "the new RayJob instead of the old one", 60, old.space.describe)
    return current(old.space)


def open_volume(space: Namespace, name: str = "") -> None:
    """Lets the run's user write to a volume: folders of a host have no owner that Kubernetes would change.

    That of the claim with this name, or of the only one.
    """
    if cluster_tool("up") is None:
        return
    if not name:
        claims = eventually(lambda: space.objects("persistentvolumeclaims"), "a volume claim", 30)
        name = claims[0]["metadata"]["name"]
    volume = eventually(lambda: space.claim_volume(name), f"a volume for {name}", 60)
    folder = Path(os.environ["CLUSTER_STATE"], "volumes", Path(volume).name)
    eventually(folder.is_dir, f"{folder}", 30)
    folder.chmod(0o777)


def current(space: Namespace) -> Run:
    """The run of the only RayJob in the namespace."""
    job = eventually(space.job, "a RayJob", 30)
    maps = [one for one in space.objects("configmaps") if "run.yaml" in one.get("data", {})]
    newest = max(maps, key=lambda one: str(one["metadata"]["creationTimestamp"]))
    config = yaml.safe_load(newest["data"]["run.yaml"])
    return Run(space, job["metadata"]["name"], config["run"]["name"], config["run"]["dir"])


def block(language: str, part: str) -> str:
    """The guide's block of that language with this part in it."""
    found = re.findall(rf"^[ 0-9.]*```{language}\n(.*?)^ *```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
    (one,) = [text for text in found if part in text]
    return textwrap.dedent(one)


def show(figures: dict[str, object]) -> None:
    """One line of figures, which `pytest -s` and CI's log show."""
    print(f"\nfigures: {json.dumps(figures)}", flush=True)


def options(config: dict[str, object]) -> Sequence[str]:
    """--set-json options for keys of the configuration, such as {"run.steps": 60}."""
    return [part for key, value in config.items() for part in ("--set-json", f"config.{key}={json.dumps(value)}")]


UNDISTURBED: dict[int, tuple[str, str]] = {}
"""Digests by step of a cpu-smoke run to which nothing happened; filled by the first test that has one."""
