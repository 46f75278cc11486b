"""Which release is meant, and what its pods wait for."""

import pytest

from grpo.errors import ConfigError
from grpo.kubernetes.release import find, release_named
from grpo.kubernetes.tools import Cluster
from tests.kubernetes.programs import BAD, DONE, RUNNING, SUSPENDED, Programs, job, pod

JOBS = "get rayjobs.ray.io"


def test_the_only_release_needs_no_name(programs: Programs) -> None:
    programs.items(JOBS, [job("mine", **RUNNING)])
    assert find(Cluster(), None).name == "mine"
    assert programs.calls()[0][1:] == ["get", "rayjobs.ray.io", "-o", "json", "-l", "app.kubernetes.io/part-of=grpo"]


@pytest.mark.parametrize("name", ["b", "b-grpo-1a", "b-grpo-9f"])
def test_one_of_several_by_its_name_that_of_its_run_or_of_its_job(name: str, programs: Programs) -> None:
    programs.items(JOBS, [job("a", **DONE), job("b", **RUNNING)])
    assert find(Cluster(), name).name == "b"


def test_of_two_jobs_of_a_release_the_newer_one_counts_and_none_that_goes_away(programs: Programs) -> None:
    old, new, gone = job("a", "old"), job("a", "new"), job("a", "gone")
    new["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    gone["metadata"] |= {"creationTimestamp": "2026-01-03T00:00:00Z", "deletionTimestamp": "2026-01-03T00:00:01Z"}
    programs.items(JOBS, [old, new, gone])
    assert find(Cluster(), None).run == "new"


def test_none_several_or_another_are_a_sentence_each(programs: Programs) -> None:
    programs.answer("config view", {"out": ""})
    programs.items(JOBS, [])
    with pytest.raises(ConfigError, match="must be in namespace default, but there is no RayJob.*-n, or install one"):
        find(Cluster(), None)
    with pytest.raises(ConfigError, match="release x must be in namespace team, but there is only: none"):
        find(Cluster("team"), "x")
    programs.items(JOBS, [job("a"), job("b")])
    with pytest.raises(ConfigError, match="one release must be meant, but namespace default has several: a, b; name"):
        find(Cluster(), None)
    with pytest.raises(ConfigError, match="release c must be .* but there is only: a, b; name one of them"):
        find(Cluster(), "c")


def test_states(programs: Programs) -> None:
    found = {}
    for name, status in {"new": {}, "runs": RUNNING, "done": DONE, "bad": BAD, "rests": SUSPENDED}.items():
        programs.items(JOBS, [job("a", **status)])
        one = find(Cluster(), None)
        found[name] = (str(one), one.over, one.succeeded, one.suspended)
    what = "run a-grpo-1a of release a: "
    assert found == {
        "new": (f"{what}New", False, False, False),
        "runs": (f"{what}Running RUNNING", False, False, False),
        "done": (f"{what}Complete SUCCEEDED", True, True, False),
        "bad": (f"{what}Complete STOPPED", True, False, False),
        "rests": (f"{what}Suspended", False, False, True),
    }


def test_pods_say_what_they_wait_for(programs: Programs) -> None:
    programs.items(JOBS, [job("a", **RUNNING)])
    no_node = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes:\tno GPU"}
    pulling = {"name": "ray-worker", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no \x1b[31msuch"}}}
    leaving = pod("rollout", "old")
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z"
    programs.items(
        "get pods",
        [
            pod("trainer", ready=False, conditions=[no_node], containerStatuses=[]),
            pod("rollout", ready=False, containerStatuses=[pulling]),
            pod("head"),
            leaving,
        ],
    )
    found = find(Cluster(), None).pods()
    assert [(one.role, one.state, one.started) for one in found] == [
        ("head", "Running", True),
        ("rollout", "Pending: ImagePullBackOff no \\x1b[31msuch", False),
        ("trainer", "Pending: Unschedulable 0/3 nodes:\\tno GPU", False),
    ]


def test_the_file_of_a_run_stands_for_its_release() -> None:
    assert release_named("examples/gsm8k-one-gpu.yaml") == "gsm8k-one-gpu"
    assert release_named("mine") == "mine" and release_named(None) is None
