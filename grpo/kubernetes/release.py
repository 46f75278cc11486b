"""Which release of the chart is meant, and how its RayJob and its pods are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from grpo.config.load import load_config
from grpo.config.text import clean
from grpo.errors import ConfigError
from grpo.kubernetes.tools import Cluster, Object

JOBS = "rayjobs.ray.io"
PART_OF, INSTANCE, COMPONENT, RUN = (
    "app.kubernetes.io/part-of",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/component",
    "grpo.dev/run",
)
HEAD_CONTAINER = "ray-head"
SUCCEEDED = "SUCCEEDED"
OVER = ("Complete", "Failed", "ValidationFailed")
STOPPED = ("Suspended", "Suspending")
LONGEST_TEXT = 300


@dataclass(frozen=True)
class Pod:
    """A pod of the run: `state` is its phase, or why it does not run; `started` whether its log can be read."""

    name: str
    role: str
    state: str
    node: str
    restarts: int
    started: bool


@dataclass(frozen=True)
class Release:
    """A release by its RayJob, as it was when it was asked for."""

    cluster: Cluster
    job: Object

    @property
    def name(self) -> str:
        """The release's."""
        return _label(self.job, INSTANCE)

    @property
    def job_name(self) -> str:
        """The RayJob's."""
        return str(self.job["metadata"]["name"])

    @property
    def run(self) -> str:
        """Of the run, which is also the name of its folder."""
        return _label(self.job, RUN)

    @cached_property
    def _status(self) -> Object:
        return self.job.get("status") or {}

    @property
    def deployment(self) -> str:
        """KubeRay's: New, Initializing, Running, Complete, Failed, Retrying, Suspended ..."""
        return str(self._status.get("jobDeploymentStatus") or "New")

    @property
    def status(self) -> str:
        """Ray's: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; or KubeRay's where Ray knows nothing."""
        return str(self._status.get("jobStatus") or self.deployment)

    @property
    def message(self) -> str:
        """What KubeRay says of the state: the reason, then the last lines of the run where it failed."""
        parts = [str(self._status.get(key) or "") for key in ("reason", "message")]
        return "\n".join(part for part in parts if part)

    @property
    def short_message(self) -> str:
        """The same on one line: its first and its last words."""
        text = clean(" ".join(self.message.split()))
        return text if len(text) <= LONGEST_TEXT else f"{text[:100]} ... {text[-LONGEST_TEXT + 105 :]}"

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.deployment in OVER

    @property
    def succeeded(self) -> bool:
        """Whether the run is done."""
        return self.over and self._status.get("jobStatus") == SUCCEEDED

    @property
    def suspended(self) -> bool:
        """Whether it was stopped, and can go on."""
        return self.deployment in STOPPED

    @property
    def debugged(self) -> bool:
        """Whether job.debug starts no run in the pods."""
        return str(self.spec.get("entrypoint", "")).startswith("sleep")

    @property
    def spec(self) -> Object:
        """The RayJob's."""
        return self.job.get("spec") or {}

    @property
    def attempts(self) -> tuple[int, int]:
        """Those that have failed, and how many may."""
        return int(self._status.get("failed") or 0), int(self.spec.get("backoffLimit") or 0)

    def again(self) -> "Release":
        """The same release as it is now."""
        return find(self.cluster, self.name)

    def pods(self) -> list[Pod]:
        """Those that are there, the head first; not those that are going away."""
        selector = f"{INSTANCE}={self.name},{RUN}={self.run},{COMPONENT} in (head,rollout,trainer)"
        found = self.cluster.objects("pods", "-l", selector)
        pods = [_pod(pod) for pod in _newest_first(found) if "deletionTimestamp" not in pod["metadata"]]
        return sorted(pods, key=lambda pod: ("head", "rollout", "trainer").index(pod.role))

    def leaving(self) -> list[str]:
        """Names of all its pods that are still there, also of those that are going away."""
        selector = f"{INSTANCE}={self.name},{RUN}={self.run},{COMPONENT} in (head,rollout,trainer)"
        return [str(pod["metadata"]["name"]) for pod in self.cluster.objects("pods", "-l", selector)]

    def head(self) -> Pod | None:
        """The head's pod, the newest if an older one is still there."""
        return next((pod for pod in self.pods() if pod.role == "head"), None)

    def __str__(self) -> str:
        state = " ".join(dict.fromkeys([self.deployment, self.status]))
        return f"run {self.run} of release {self.name}: {state}"


def find(cluster: Cluster, name: str | None) -> Release:
    """The release of that name, or of a run or RayJob of that name; None: the only one of the namespace.

    Raises ConfigError where there is none or more than one, and what kubectl raises.
    """
    jobs = cluster.objects(JOBS, "-l", f"{PART_OF}=grpo")
    newest: dict[str, Object] = {}
    for job in _newest_first(jobs):
        if "deletionTimestamp" not in job["metadata"]:
            newest.setdefault(_label(job, INSTANCE), job)
    matching = [job for job in newest.values() if name in (None, *_names(job))]
    if len(matching) == 1:
        return Release(cluster, matching[0])
    where, known = cluster.namespace_name(), ", ".join(sorted(newest)) or "none"
    if matching or (newest and name is None):
        raise ConfigError(f"one release must be meant, but namespace {where} has several: {known}; name one of them")
    if name is None:
        raise ConfigError(
            f"a release of the chart must be in namespace {where}, but there is no RayJob of one; name another "
            "namespace with -n, or install one: `grpo k8s values RUN.yaml` begins with the command"
        )
    raise ConfigError(
        f"release {clean(name)} must be in namespace {where}, but there is only: {known}; name one of them"
    )


def release_named(name: str | None) -> str | None:
    """What a person names: a release, or the file of a run, whose release is named as the run."""
    if name is None or not name.endswith((".yaml", ".yml")):
        return name
    return load_config(Path(name)).run.name


def _names(job: Object) -> Sequence[str]:
    return _label(job, INSTANCE), _label(job, RUN), str(job["metadata"]["name"])


def _label(item: Object, key: str) -> str:
    return str((item["metadata"].get("labels") or {}).get(key) or "")


def _newest_first(items: Sequence[Object]) -> list[Object]:
    return sorted(items, key=lambda item: str(item["metadata"].get("creationTimestamp") or ""), reverse=True)


def _pod(pod: Object) -> Pod:
    status = pod.get("status") or {}
    containers = (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or [])
    main = [one for one in containers if one.get("name") in (HEAD_CONTAINER, "ray-worker")]
    started = any({"running", "terminated"} & set(one.get("state") or {}) for one in main)
    return Pod(
        name=str(pod["metadata"]["name"]),
        role=_label(pod, COMPONENT),
        state=_state(status, containers),
        node=str((pod.get("spec") or {}).get("nodeName") or "no node"),
        restarts=sum(int(one.get("restartCount") or 0) for one in main),
        started=started,
    )


def _state(status: Object, containers: Sequence[Object]) -> str:
    """The phase, and if that is not all: what the first container waits for, or why no node takes the pod."""
    phase = str(status.get("phase") or "Unknown")
    conditions = {one.get("type"): one for one in status.get("conditions") or []}
    if phase == "Running" and (conditions.get("Ready") or {}).get("status") == "True":
        return "Running"
    why = [(one.get("state") or {}).get("waiting") or {} for one in containers]
    why += [conditions.get("PodScheduled") or {}] if phase == "Pending" else []
    for one in why:
        if one.get("reason") and one.get("reason") != "PodInitializing" and one.get("status") != "True":
            text = " ".join(filter(None, [str(one["reason"]), str(one.get("message") or "")]))
            return clean(f"{phase}: {text}"[:LONGEST_TEXT])
    return f"{phase}, not ready" if phase == "Running" else phase
