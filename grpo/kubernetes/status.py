"""`grpo k8s status`: a release in a few lines."""

from collections.abc import Iterator

from grpo.config.text import clean
from grpo.errors import ClusterError
from grpo.kubernetes.logs import driver_lines, head_log
from grpo.kubernetes.queue import WORKLOADS, active, queued, waits_for, workload
from grpo.kubernetes.release import Pod, Release
from grpo.kubernetes.tools import Object

TAIL = 200
"""Lines of the head's log in which the newest step is looked for."""


def status_lines(release: Release) -> Iterator[str]:
    """The run, its attempts, what KubeRay says, each pod, and the newest line of the run's progress."""
    failed, allowed = release.attempts
    yield f"{release} (RayJob {release.job_name}; {failed} of {allowed} retries used)"
    pods = release.pods()
    yield from (f"  {clean(line)}" for line in release.message.splitlines() if line.strip())
    widths = [max((len(text) for text in column), default=0) for column in zip(*map(_cells, pods), strict=True)]
    for pod in pods:
        cells = [text.ljust(width) for text, width in zip(_cells(pod), widths, strict=True)]
        yield f"  {'  '.join([*cells, pod.state])}{f', {pod.restarts} restarts' if pod.restarts else ''}"
    yield from _next(release, pods)


def _cells(pod: Pod) -> tuple[str, str, str]:
    return pod.role, pod.name, pod.node


def _next(release: Release, pods: list[Pod]) -> Iterator[str]:
    """The newest line of progress, or what a person does now."""
    head = next((pod for pod in pods if pod.role == "head" and pod.started), None)
    options = f" {release.name}{release.cluster.told()}"
    if release.succeeded:
        yield f"  its report and model: grpo k8s fetch OUT{options}"
    elif release.over:
        yield "  once the cause is mended: helm upgrade, with another job.restart where the values stay the same"
    elif release.suspended:
        yield f"  {_held(release)}"
    elif release.debugged:
        yield "  job.debug is true: no run starts in these pods"
    elif head is None:
        yield "  it has not started: there is no head yet" if not pods else "  it has not started: see the pods"
    else:
        try:
            line = newest(driver_lines(head_log(release, head, f"--tail={TAIL}")))
        except ClusterError as error:  # the pod may just have gone
            line = clean(str(error))
        yield f"  {line or 'it has said nothing yet'}"


def newest(lines: Iterator[str]) -> str:
    """The last line of a step, else the last line at all."""
    said = [line for line in lines if line.strip()]
    return next((line for line in reversed(said) if line.startswith("step ")), said[-1] if said else "")


def _held(release: Release) -> str:
    """Why a suspended run has no pods: somebody has stopped it, or it waits for its turn."""
    found = workload(release) if queued(release) else None
    if queued(release) and (found is None or active(found)):
        return f"it waits in Kueue's queue: {waits_for(found or {}) or 'no reason is told yet'}"
    return f"it is stopped; to go on: {resume_command(release, found)}"


def resume_command(release: Release, queued_as: Object | None) -> str:
    """What lets a run that was stopped go on; `queued_as` is its workload where Kueue decides."""
    kind, name, spec = "rayjob", release.job_name, '{"spec": {"suspend": false}}'
    if queued_as:
        kind, name, spec = WORKLOADS, str(queued_as["metadata"]["name"]), '{"spec": {"active": true}}'
    return f"kubectl{release.cluster.told()} patch {kind} {name} --type merge -p '{spec}'"
