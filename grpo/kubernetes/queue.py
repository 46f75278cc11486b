"""Kueue, where it decides when a run has its pods: the workload that it makes of the RayJob."""

from grpo.config.text import clean
from grpo.kubernetes.release import Release
from grpo.kubernetes.tools import Object

WORKLOADS = "workloads.kueue.x-k8s.io"


def queued(release: Release) -> bool:
    """Whether Kueue decides when it runs."""
    return "kueue.x-k8s.io/queue-name" in (release.job["metadata"].get("labels") or {})


def workload(release: Release) -> Object | None:
    """What Kueue has made of the RayJob, None before that."""
    uid = release.job["metadata"].get("uid")
    for one in release.cluster.objects(WORKLOADS):
        if any(owner.get("uid") == uid for owner in one["metadata"].get("ownerReferences") or []):
            return one
    return None


def active(one: Object) -> bool:
    """Whether Kueue may admit it: not after somebody has stopped it."""
    return bool((one.get("spec") or {}).get("active", True))


def waits_for(one: Object) -> str:
    """Kueue's words for what it has no quota for."""
    for condition in (one.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "QuotaReserved" and condition.get("status") != "True":
            return clean(" ".join(str(condition.get("message") or "").split()))
    return ""
