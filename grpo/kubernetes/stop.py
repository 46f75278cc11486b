"""`grpo k8s stop`: the run commits its last step, then its pods go; it can go on later.

KubeRay takes a suspended RayJob's pods away at once, engines and ranks beside the driver that has to commit. So the
driver is told first, by `grpo drain` in its pod: SIGTERM and the wait for its commit. Then the job is suspended, before
KubeRay takes its end for a failure and makes the next attempt.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack

from grpo.errors import ClusterError, ConfigError, DeadlineExceeded, GrpoError
from grpo.kubernetes.logs import Say, lines_of, opened, shown
from grpo.kubernetes.queue import WORKLOADS, queued, workload
from grpo.kubernetes.release import HEAD_CONTAINER, Release
from grpo.kubernetes.status import resume_command
from grpo.kubernetes.tools import Object

LOOK_SECONDS = 1.0
GRACE_SECONDS = 30
"""A pod's, where its template says nothing."""
MORE_SECONDS = 90.0
"""What KubeRay and kubelets need around the grace period."""


def stop(release: Release, say: Say, seconds: float | None = None) -> None:
    """Suspends the RayJob, says what the driver says until the last pod is gone, and how the run goes on.

    Raises ConfigError for a run that is over or cannot be suspended, DeadlineExceeded for pods that stay.
    """
    if release.over:
        raise ConfigError(f"stop is for a run that goes on, but {release}; `grpo k8s status` says what there is to do")
    if not release.spec.get("shutdownAfterJobFinishes"):
        raise ConfigError(
            f"KubeRay suspends only a job whose cluster it may delete, but {release} has job.deletionStrategy; "
            f"`helm{release.cluster.told()} uninstall {release.name}` ends it, with a commit, and keeps its runs"
        )
    limit = seconds or grace(release) + MORE_SECONDS
    head = None if release.suspended else release.head()
    with ExitStack() as stack:
        lines: Iterator[str | None] = iter(())
        if head and head.started:
            follow = ("logs", head.name, "-c", HEAD_CONTAINER, "-f", "--tail=1")
            errors = stack.enter_context(tempfile.TemporaryFile())
            child = stack.enter_context(opened(release.cluster.command("kubectl", *follow), errors))
            lines = lines_of(child)
            commit(release, head.name, say, limit)
        queued_as = suspend(release)
        _until_gone(release, lines, say, limit)
    say(f"run {release.run} is stopped and its pods are gone. To go on: {resume_command(release, queued_as)}")


def commit(release: Release, head: str, say: Say, seconds: float) -> None:
    """The driver commits and ends while its workers are there. If it cannot be told, its pod has a hook of its own."""
    try:
        release.cluster.kubectl("exec", head, "-c", HEAD_CONTAINER, "--", "grpo", "drain", seconds=seconds)
    except GrpoError as error:
        say(f"warning: the driver could not be told to commit before its pods go: {error}")


def grace(release: Release) -> float:
    """Seconds between SIGTERM and SIGKILL, of the pods that have most."""
    cluster = release.spec.get("rayClusterSpec") or {}
    groups = [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])]
    pods = [((group.get("template") or {}).get("spec") or {}) for group in groups]
    return float(max(int(pod.get("terminationGracePeriodSeconds") or GRACE_SECONDS) for pod in pods))


def suspend(release: Release) -> Object | None:
    """By Kueue where that decides when the job runs, whose workload it returns, else by the RayJob itself."""
    if not queued(release):
        _patch(release, "rayjobs.ray.io", release.job_name, {"spec": {"suspend": True}})
        return None
    found = workload(release)
    if found is None:
        raise ClusterError(f"Kueue must have a workload of {release}, but has none yet; try again")
    _patch(release, WORKLOADS, str(found["metadata"]["name"]), {"spec": {"active": False}})
    return found


def _patch(release: Release, kind: str, name: str, patch: Object) -> None:
    release.cluster.kubectl("patch", kind, name, "--type", "merge", "-p", json.dumps(patch))


def _until_gone(release: Release, lines: Iterator[str | None], say: Say, seconds: float) -> None:
    end, looked = time.monotonic() + seconds, 0.0
    while True:
        for line in lines:
            if line is not None:
                say(shown(line))
            if time.monotonic() > looked + LOOK_SECONDS:
                break
        else:
            time.sleep(LOOK_SECONDS)
        looked = time.monotonic()
        left = release.leaving()
        now = release.again()
        if now.over:
            raise ConfigError(f"stop is for a run that goes on, but it came to its end meanwhile: {now}")
        if now.deployment == "Suspended" and not left:
            for line in lines:
                if line is None:
                    break
                say(shown(line))
            return
        if looked > end:
            raise DeadlineExceeded(
                f"the run must end within {seconds:g} s, but {now}, with {len(left)} pods left ({', '.join(left)}); "
                "it still ends: look at `grpo k8s status`, or wait longer with --seconds"
            )
