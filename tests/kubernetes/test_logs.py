"""`grpo k8s logs`: every line of the driver once, in order, whatever happens to the connection and to the head."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.text import clean
from grpo.errors import ClusterError, ConfigError, DeadlineExceeded
from grpo.kubernetes.logs import BANNER, LONGEST_BANNER, Seen, driver_lines, follow, show, stamped
from grpo.kubernetes.release import Release, find
from grpo.kubernetes.tools import Cluster
from tests.kubernetes.programs import BAD, DONE, RUNNING, SUSPENDED, Programs, job, pod

T = "2026-01-01T00:00:0"
RAY = [
    "Ray runtime started.",
    f"2026-11-29 16:41:34,640\tINFO scripts.py:1274 -- {BANNER}: /tmp/ray/session_x/logs/ray_process_exit.log",
]


def release(programs: Programs, *statuses: dict[str, str], **more: object) -> Release:
    programs.items("get rayjobs", *([job("mine", **status)] for status in statuses))
    return find(Cluster(), None)


def said(programs: Programs, one: Release, seconds: float = 5.0) -> list[str]:
    lines: list[str] = []
    follow(one, lines.append, seconds)
    return lines


def test_the_whole_log_without_rays_banner(programs: Programs) -> None:
    one = release(programs, RUNNING)
    programs.items("get pods", [pod("head")])
    programs.answer("logs", {"out": "\n".join([*RAY, "ok  ray", "step 1/2\x1b[2K"])})
    lines: list[str] = []
    show(one, lines.append)
    assert lines == ["ok  ray", "step 1/2\\x1b[2K"]
    assert programs.calls("logs") == [["kubectl", "logs", "pod-head", "-c", "ray-head", "--tail=-1"]]


@pytest.mark.parametrize(
    ("status", "kind", "part"),
    [
        ({}, ClusterError, "it has no head yet; try again, wait with -f"),
        (RUNNING, ClusterError, "it has no head yet"),
        (DONE, ConfigError, "Complete SUCCEEDED, so its pods are gone; its lines are in logs/ of the run's folder"),
        (BAD, ConfigError, "the last it said: exit code 2: a retry would end alike error: data.source"),
        (SUSPENDED, ConfigError, "so it has no pods"),
    ],
)
def test_no_log_is_a_sentence(status: dict[str, str], kind: type, part: str, programs: Programs) -> None:
    one = release(programs, status)
    programs.items("get pods", [])
    with pytest.raises(kind, match="the log is that of the head's pod, but run mine-grpo-1a of release mine") as raised:
        show(one, print)
    assert part in str(raised.value)


def test_a_head_that_is_not_up_says_why(programs: Programs) -> None:
    one = release(programs, {"jobDeploymentStatus": "Initializing"})
    programs.items("get pods", [pod("head", ready=False)])
    with pytest.raises(ClusterError, match="its head is Pending"):
        show(one, print)


def test_a_run_is_followed_over_a_lost_connection_and_a_new_head_to_its_end(programs: Programs) -> None:
    programs.items("get rayjobs", [job("mine", **RUNNING)], over=[job("mine", **DONE)])
    programs.items("get pods", [pod("head", "head-1")], moved=[pod("head", "head-2")])
    programs.answer(
        "logs head-1",
        {"out": f"{T}1Z {RAY[0]}\n{T}1.5Z {RAY[1]}\n{T}2.25Z step 1/3\n"},
        {"out": f"{T}2.25Z step 1/3\n{T}2.5Z step 2/3\n"},
        {"err": 'Error from server (NotFound): pods "head-1" not found', "code": 1, "then": "moved"},
    )
    programs.answer(
        "logs head-2",
        {"out": f"{T}8Z {RAY[1]}\n{T}9Z resumed\n"},
        {"then": "over"},
        {"out": f"{T}9Z resumed\n{T}9.1Z step 3/3\n"},
    )
    assert said(programs, find(Cluster(), None)) == ["step 1/3", "step 2/3", "resumed", "step 3/3"]
    calls = programs.calls("logs")
    assert [words[2] for words in calls[:4]] == ["head-1", "head-1", "head-1", "head-2"]
    assert calls[0][-3:] == ["-f", "--timestamps", "--tail=-1"] and calls[1][-1] == f"--since-time={T}2Z"
    assert "-f" not in calls[-1] and calls[-1][-1] == f"--since-time={T}9Z"


def test_the_end_of_a_run_ends_a_log_that_stays_open(programs: Programs) -> None:
    programs.items("get rayjobs", [job("mine", **RUNNING)], over=[job("mine", **DONE)])
    programs.items("get pods", [pod("head")])
    first = {"out": f"{T}1Z {RAY[1]}\n{T}2Z step 1/1\n", "then": "over", "seconds": 60}
    programs.answer("logs", first, {"out": f"{T}2Z step 1/1\n{T}3Z done\n"})
    assert said(programs, find(Cluster(), None)) == ["step 1/1", "done"]


def test_a_run_that_fails_is_an_error_with_its_last_words(programs: Programs) -> None:
    one = release(programs, BAD)
    programs.items("get pods", [])
    with pytest.raises(ClusterError, match="Complete STOPPED .it must be SUCCEEDED.: exit code 2.*helm upgrade"):
        follow(one, print, 5)


def test_one_that_does_not_start_is_waited_for_and_no_longer(programs: Programs) -> None:
    one = release(programs, {"jobDeploymentStatus": "Initializing"})
    programs.items("get pods", [], [pod("head", ready=False)])
    lines: list[str] = []
    with pytest.raises(DeadlineExceeded, match="its head is Pending.*waited --wait 4"):
        follow(one, lines.append, 4)
    assert lines == ["waiting for the head: no pod yet", "waiting for the head: Pending"]


def test_a_log_that_may_not_be_read_is_told_at_once(programs: Programs) -> None:
    one = release(programs, RUNNING)
    programs.items("get pods", [pod("head")])
    programs.answer("logs", {"err": 'pods "pod-head" is forbidden: cannot get resource "pods/log"', "code": 1})
    with pytest.raises(ConfigError, match="you must be allowed to kubectl logs pod-head"):
        follow(one, print, 30)


def test_a_moment_without_the_cluster_ends_nothing_but_a_long_one_does(programs: Programs) -> None:
    lost = {"err": "Unable to connect to the server: EOF", "code": 1}
    one = release(programs, RUNNING)
    good = programs._answers[0][1][0]
    programs.answer(
        "get rayjobs",
        lost,
        lost,
        {**good, "out": good["out"].replace('"Running"', '"Complete"').replace("RUNNING", "SUCCEEDED")},
    )
    programs.items("get pods", [])
    assert said(programs, one) == []
    programs.answer("get rayjobs", lost)
    with pytest.raises(ClusterError, match="the cluster must answer"):
        follow(one, print, 0.3)


def test_lines_of_the_same_moment_are_all_said_and_none_twice() -> None:
    seen = Seen("p")
    assert seen.options()[1] == "--tail=-1"
    lines = [
        f"2026-01-01T02:00:01.{part}+02:00 {text}" for part, text in [("5", BANNER), ("6", "a"), ("6", "b"), ("6", "c")]
    ]
    assert [line for raw in lines[:3] for line in seen.take(raw)] == ["a", "b"]
    assert seen.options()[1] == "--since-time=2026-01-01T02:00:01+02:00"
    assert [line for raw in lines for line in seen.take(raw)] == ["c"]
    assert seen.take("2026-01-01T02:00:00Z clock") == ["clock"]  # set back while it runs


def test_a_line_that_rewrites_itself_or_has_odd_ends_is_one(programs: Programs) -> None:
    programs.items("get rayjobs", [job("mine", **RUNNING)], over=[job("mine", **DONE)])
    programs.items("get pods", [pod("head")])
    text = f"{T}1Z {BANNER}\n{T}2Z load 1%\rload 99%\r\n{T}3Z a\u2028b\n"
    programs.answer("logs", {"out": text, "then": "over"}, {"out": text})
    assert said(programs, find(Cluster(), None)) == ["load 99%", "a\\u2028b"]


def test_a_connection_that_fails_after_a_long_time_is_made_again_and_one_that_always_fails_is_told(
    programs: Programs,
) -> None:
    programs.items("get rayjobs", [job("mine", **RUNNING)], over=[job("mine", **DONE)])
    programs.items("get pods", [pod("head")])
    lost = {"err": "error: unexpected EOF", "code": 1}
    first = {"out": f"{T}1Z {BANNER}\n{T}2Z step 1/2\n", "seconds": 3.0, **lost}
    programs.answer("logs", first, {"out": f"{T}3Z step 2/2\n", "then": "over"})
    assert said(programs, find(Cluster(), None), seconds=2.0) == ["step 1/2", "step 2/2"]
    (programs.folder / "over").unlink()
    programs.answer("logs", lost)
    with pytest.raises(
        DeadlineExceeded, match="the cluster must answer, but: error: unexpected EOF.*waited --wait 0.3"
    ):
        said(programs, find(Cluster(), None), seconds=0.3)


def test_job_debug_has_no_run_to_follow(programs: Programs) -> None:
    one = job("mine", **RUNNING)
    one["spec"]["entrypoint"] = "sleep infinity"
    programs.items("get rayjobs", [one])
    programs.items("get pods", [pod("head")])
    with pytest.raises(ConfigError, match="job.debug is true, so no run starts there"):
        follow(find(Cluster(), None), print, 5)


@given(
    st.lists(st.text(alphabet="ab \r", max_size=9), max_size=400),
    st.lists(st.text(alphabet="xy", max_size=3), max_size=9),
)
def test_a_banner_is_cut_and_without_one_nothing_is(before: list[str], after: list[str]) -> None:
    assert list(driver_lines([*before, *after])) == [*before, *after]
    cut = list(driver_lines([*before, f"  {BANNER}, x", *after]))
    assert cut == (after if len(before) <= LONGEST_BANNER else [*before, f"  {BANNER}, x", *after])


@given(st.datetimes(datetime(1000, 1, 1)), st.integers(0, 999_999_999), st.text(max_size=80))
def test_times_compare_whatever_their_digits(at: datetime, nanoseconds: int, text: str) -> None:
    fraction = f".{nanoseconds:09}".rstrip("0").rstrip(".")
    stamp, line = stamped(f"{at:%Y-%m-%dT%H:%M:%S}{fraction}Z {text}")
    assert stamp == f"{at:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09}Z" and line == clean(line)


@given(st.text())
def test_a_line_without_a_time_is_kept_whole(text: str) -> None:
    stamp, line = stamped(text.replace("\r", ""))
    assert stamp or len(line) >= len(text.replace("\r", ""))
