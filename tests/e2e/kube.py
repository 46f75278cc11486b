"""A cluster as a test sees it: kubectl and helm as commands, objects as dictionaries, waits with a deadline."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "grpo"
POLL_SECONDS = 1.0

Object = dict[str, Any]
T = TypeVar("T")


def run(command: Sequence[str], seconds: float = 120, stdin: str | None = None, check: bool = True) -> str:
    """What the command prints. An error shows both of its streams."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command[:12])}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def fails(command: Sequence[str], seconds: float = 120, stdin: str | None = None) -> str:
    """The error of a command that has to fail."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=seconds)
    assert done.returncode != 0, f"{' '.join(command[:12])} succeeded: {done.stdout}"
    return done.stdout + done.stderr


def eventually(look: Callable[[], T], what: str, seconds: float, describe: Callable[[], str] | None = None) -> T:
    """The first true answer of `look`. Raises AssertionError with the last answer once the time is over."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            more = f"\n{describe()}" if describe else ""
            raise AssertionError(f"{what}: not within {seconds:g} s; the last answer was {found!r}{more}")
        time.sleep(POLL_SECONDS)


class Namespace:
    """One namespace of the cluster in KUBECONFIG."""

    def __init__(self, name: str) -> None:
        self.name = name

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return run(["kubectl", "-n", self.name, *arguments], **options)

    def helm(self, *arguments: str, **options: Any) -> str:
        return run(["helm", "-n", self.name, *arguments], **options)

    def create(self, level: str = "restricted") -> None:
        run(["kubectl", "create", "namespace", self.name])
        run(["kubectl", "label", "namespace", self.name, f"pod-security.kubernetes.io/enforce={level}"])

    def delete(self) -> None:
        run(["kubectl", "delete", "namespace", self.name, "--ignore-not-found", "--timeout=170s"], seconds=180)

    def objects(self, kind: str, selector: str = "") -> list[Object]:
        chosen = ["-l", selector] if selector else []
        found: list[Object] = json.loads(self.kubectl("get", kind, "-o", "json", *chosen))["items"]
        return found

    def job(self) -> Object:
        """The only RayJob; {} if there is none."""
        jobs = self.objects("rayjobs.ray.io")
        assert len(jobs) <= 1, [job["metadata"]["name"] for job in jobs]
        return jobs[0] if jobs else {}

    def job_status(self, key: str = "jobStatus") -> str:
        return str(self.job().get("status", {}).get(key, ""))

    def pods(self, group: str = "") -> list[Object]:
        """Pods of a Ray group (headgroup, rollout, trainer) or all of them; those that are going away are left out."""
        found = self.objects("pods", f"ray.io/group={group}" if group else "ray.io/cluster")
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def pod(self, group: str) -> str:
        """Name of the only pod of a Ray group, "" if there is none."""
        names = [pod["metadata"]["name"] for pod in self.pods(group)]
        assert len(names) <= 1, names
        return names[0] if names else ""

    def ready(self, group: str) -> str:
        """Name of the group's pod once it is ready, else ""."""
        for pod in self.pods(group):
            conditions = pod.get("status", {}).get("conditions", [])
            if any(one["type"] == "Ready" and one["status"] == "True" for one in conditions):
                return str(pod["metadata"]["name"])
        return ""

    def claim_volume(self, claim: str) -> str:
        """Path on the host of a claim's volume, "" while it has none."""
        volume = self.kubectl("get", "pvc", claim, "-o", "jsonpath={.spec.volumeName}").strip()
        return run(["kubectl", "get", "pv", volume, "-o", "jsonpath={.spec.hostPath.path}"]).strip() if volume else ""

    def execute(self, pod: str, *command: str, check: bool = True, seconds: float = 60) -> str:
        return self.kubectl("exec", pod, "--", *command, check=check, seconds=seconds)

    def rows(self, run_dir: str) -> list[Object]:
        """metrics.jsonl of a run, read in the head's pod; [] while there is none."""
        head = self.ready("headgroup")
        text = self.execute(head, "cat", f"{run_dir}/metrics.jsonl", check=False) if head else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def step(self, run_dir: str) -> int:
        """The last finished step."""
        return max((row["step"] for row in self.rows(run_dir) if row["event"] == "step"), default=0)

    def describe(self) -> str:
        """What a person would look at when something does not happen."""
        parts = [self.kubectl("get", "rayjobs,pods", "-o", "wide", check=False)]
        status = self.job().get("status", {})
        keys = ("jobDeploymentStatus", "jobStatus", "reason", "message", "failed")
        parts.append(json.dumps({key: status.get(key) for key in keys}))
        parts.append(self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-3000:])
        head = self.ready("headgroup")
        if head:
            logs = "tail -n 25 /tmp/ray/session_latest/logs/job-driver-*"
            parts.append(self.execute(head, "bash", "-c", logs, check=False))
        return "\n".join(parts)


class Prometheus:
    """Prometheus' HTTP API through the API server, so that no port has to be open."""

    def __init__(self) -> None:
        namespace, service = os.environ.get("E2E_PROMETHEUS", "monitoring/prometheus:9090").split("/")
        self.path = f"/api/v1/namespaces/{namespace}/services/{service}/proxy/api/v1"

    def _get(self, path: str) -> Any:
        return json.loads(run(["kubectl", "get", "--raw", f"{self.path}/{path}"]))["data"]

    def query(self, expression: str) -> list[Object]:
        found: list[Object] = self._get(f"query?query={quote(expression, safe='')}")["result"]
        return found

    def value(self, expression: str) -> float | None:
        """The only value of an expression, None if it has none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    def rules(self) -> dict[str, Object]:
        """Alerting rules by name and namespace of the rule file."""
        groups = self._get("rules?type=alert")["groups"]
        return {f"{rule['name']}/{group['file']}": rule for group in groups for rule in group["rules"]}

    def firing(self, alert: str, namespace: str) -> list[Object]:
        alerts = self._get("alerts")["alerts"]
        return [
            one
            for one in alerts
            if one["state"] == "firing"
            and one["labels"]["alertname"] == alert
            and one["labels"].get("namespace") == namespace
        ]


def nodes() -> dict[str, Object]:
    found = json.loads(run(["kubectl", "get", "nodes", "-o", "json"]))["items"]
    return {item["metadata"]["name"]: item for item in found}


def cluster_tool(name: str) -> Path | None:
    """A tool of the cluster that `python -m tests.e2e` brought up (up, down, load-image); None on any other cluster."""
    folder = os.environ.get("E2E_CLUSTER_TOOLS")
    return Path(folder, name) if folder else None
