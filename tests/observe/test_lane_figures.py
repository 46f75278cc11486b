import json

import pytest

from grpo.errors import CheckpointError
from grpo.observe.lane_figures import WORDS, lane_figures, read_spans
from grpo.observe.lanes import Span
from grpo.observe.report import write_report
from tests.runs import write_run


def run_of(steps, overlapped):
    """Sampling and training take a second each."""
    spans = []
    for step in range(1, steps + 1):
        start = step - 1 if overlapped else 2 * (step - 1)
        spans.append(Span("rollout", "sample", step, 0, start, start + 1))
        spans.append(Span("trainer", "train", step, 0, start + 1, start + 2))
    return spans


@pytest.mark.parametrize("overlapped", [False, True])
def test_the_first_steps_some_in_the_middle_and_the_last_ones_are_shown(overlapped):
    shown = list(lane_figures(run_of(31, overlapped)))
    assert [each["title"].partition(", ")[2] for each in shown] == ["steps 1 to 3", "steps 15 to 17", "steps 29 to 31"]
    last = shown[-1]["figure"]
    sample, train = last["data"]
    assert (sample["name"], set(sample["y"])) == ("sample", {"engines"})
    assert (train["name"], train["text"], train["y"]) == ("train", ["29", "30", "31"], ["trainer"] * 3)
    seconds = 3.0 if overlapped else 6.0
    assert last["layout"]["xaxis"]["range"] == [0, seconds]
    assert train["base"] == ([0.0, 1.0, 2.0] if overlapped else [1.0, 3.0, 5.0])
    assert sample["text"] == (["30", "31"] if overlapped else ["29", "30", "31"])
    assert last["layout"]["yaxis"]["categoryarray"] == ["trainer", "engines"]


def test_steps_that_were_taken_out_of_a_long_run_leave_no_hole_in_a_picture():
    spans = [span for span in run_of(42, overlapped=True) if not 16 <= span.step <= 31]
    shown = [each["title"].partition(", ")[2] for each in lane_figures(spans)]
    assert shown == ["steps 1 to 3", "steps 12 to 14", "steps 40 to 42"]
    spans = [span for span in spans if not 11 <= span.step <= 14]  # 10, 15 and 32 are in the middle of what is left
    assert [each["title"].partition(", ")[2] for each in lane_figures(spans)][1] == "steps 8 to 10"


def test_each_of_the_usual_words_has_a_colour_of_its_own():
    spans = [*run_of(1, overlapped=True), *(Span("rollout", word, 1, 0, 0.0, 2.0) for word in WORDS)]
    (picture,) = lane_figures(spans)
    colors = {trace["name"]: trace["marker"]["color"] for trace in picture["figure"]["data"]}
    assert set(colors) == set(WORDS) and len(set(colors.values())) == len(WORDS)


def test_bars_end_at_the_edges_of_the_picture_and_say_their_whole_length():
    spans = [*run_of(9, overlapped=True), Span("rollout", "sample", 12, 1, 0.5, 60.0)]
    (bar,) = (
        (base, length, seconds)
        for trace in list(lane_figures(spans))[1]["figure"]["data"]
        for base, length, seconds, text in zip(
            trace["base"], trace["x"], trace["customdata"], trace["text"], strict=True
        )
        if text == "12"
    )
    assert bar == (0.0, 3.0, 59.5)


@pytest.mark.parametrize(("steps", "pictures"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (9, 3), (1000, 3)])
def test_short_runs_are_shown_as_a_whole(steps, pictures):
    assert len(list(lane_figures(run_of(steps, overlapped=True)))) == pictures


def test_the_report_of_a_run_has_its_lanes_and_one_without_a_timeline_goes_without(tmp_path):
    write_run(tmp_path, steps=3)
    page = write_report(tmp_path).read_text()
    assert "What each pool did, steps 1 to 3" in page and "Idle pools" in page
    (tmp_path / "timeline.jsonl").unlink()
    assert "What each pool did" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"lane": "gpu"},
        {"lane": ["rollout"]},
        {"what": 3},
        {"start": None},
        {"start": "1"},
        {"end": 1e400},
        {"end": 0.5},
        {"track": -1},
        {"track": None},
    ],
)
def test_a_row_that_is_no_span_is_named(tmp_path, change):
    row = {"event": "span", "step": 4, "lane": "rollout", "what": "sample", "track": 0, "start": 1.0, "end": 2.0}
    path = tmp_path / "timeline.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert read_spans(tmp_path) == [Span("rollout", "sample", 4, 0, 1.0, 2.0)]
    path.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(CheckpointError, match=r"timeline.jsonl: a row of step 4 must have a lane"):
        read_spans(tmp_path)


def test_a_word_of_somebody_else_is_shown_harmlessly(tmp_path):
    write_run(tmp_path, steps=2)
    hostile = {"event": "span", "step": 1, "lane": "rollout", "what": "<script>alert(1)</script>\u202e", "track": 0}
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write(json.dumps(hostile | {"start": 0.0, "end": 4e9}) + "\n")
    page = write_report(tmp_path).read_text()
    assert "<script>alert" not in page and "\u202e" not in page
