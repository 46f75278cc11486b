import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import CheckpointError
from grpo.observe import timeline
from grpo.observe.lanes import Span
from grpo.observe.rows import read_rows
from grpo.observe.timeline import STRETCH, Timeline, thinned
from tests.observe.recorders import log_step, make_recorder


def span(step, lane="trainer", what="train", track=0, start=None):
    start = 1.8e9 + step if start is None else start
    return Span(lane, what, step, track, start, start + 0.5)


def spans_of(run_dir):
    return [(row["lane"], row["what"], row["step"]) for row in read_rows(run_dir / "timeline.jsonl")]


def load_trace(run_dir):
    """As Chrome and Perfetto do: the array of a run that goes on is not closed."""
    text = (run_dir / "trace.json").read_text()
    assert text.startswith("[")
    return json.loads(text.rstrip().removesuffix(",") + "]")


def test_a_row_for_each_span_and_a_trace_that_loads_while_the_run_goes_on(tmp_path):
    made = Timeline(tmp_path, ahead=1, trace=True)
    assert load_trace(tmp_path) == []
    for each in (span(1), span(2, "rollout", "sample"), span(3, "rollout", "sample", track=1)):
        made.add(each)
    rows = list(read_rows(tmp_path / "timeline.jsonl"))
    where = {"lane": "trainer", "what": "train", "track": 0}
    assert rows[0] == {"event": "span", "step": 1, **where, "start": 1.8e9 + 1, "end": 1.8e9 + 1.5}
    events = load_trace(tmp_path)
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {100: "trainer", 0: "rollout", 1: "rollout 2"}
    slices = [event for event in events if event["ph"] == "X"]
    assert [(each["name"], each["tid"], each["args"], each["dur"]) for each in slices] == [
        ("train 1", 100, {"step": 1}, 500_000),
        ("sample 2", 0, {"step": 2}, 500_000),
        ("sample 3", 1, {"step": 3}, 500_000),
    ]
    assert slices[0]["ts"] == (1.8e9 + 1) * 1e6
    made.close()
    made.add(span(4))  # by a thread that outlives the run
    assert len(spans_of(tmp_path)) == 3


def test_without_the_key_there_is_no_trace(tmp_path):
    Timeline(tmp_path, ahead=0, trace=False).close()
    assert not (tmp_path / "trace.json").exists()


@pytest.mark.parametrize("ahead", [0, 2])
def test_going_back_keeps_what_a_checkpoint_holds_of_the_batches_drawn_ahead(tmp_path, ahead):
    made = Timeline(tmp_path, ahead, trace=True)
    for step in range(1, 6):
        made.add(span(step, "rollout", "sample"))
        made.add(span(step))
    made.rewind(2)
    made.add(span(3))
    drawn = {0: [], 2: [3, 4]}[ahead]
    kept = [("rollout", "sample", step) for step in (1, 2, *drawn)]
    assert [each for each in spans_of(tmp_path) if each[0] == "rollout"] == kept
    assert [step for lane, _, step in spans_of(tmp_path) if lane == "trainer"] == [1, 2, 3]
    assert len([event for event in load_trace(tmp_path) if event["ph"] == "X"]) == len(spans_of(tmp_path))
    made.rewind(0)  # no checkpoint holds anything
    assert spans_of(tmp_path) == []


def test_the_next_start_goes_on_behind_the_half_line_of_a_killed_one(tmp_path):
    made = Timeline(tmp_path, ahead=0, trace=True)
    made.add(span(1))
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write('{"event": "span", "st')
    after = Timeline(tmp_path, ahead=0, trace=True)
    after.add(span(2))
    made.add(span(9))  # the old start writes into a file that is no longer there
    assert [step for _, _, step in spans_of(tmp_path)] == [1, 2]
    assert len(load_trace(tmp_path)) == 4


def test_a_long_run_keeps_stretches_of_all_of_it_within_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "MOST_BYTES", 40_000)
    made = Timeline(tmp_path, ahead=0, trace=True)
    steps = 1500
    for step in range(1, steps + 1):
        made.add(span(step, "rollout", "sample"))
        made.add(span(step))
        assert made._size <= 40_000
    kept = sorted({step for _, _, step in spans_of(tmp_path)})
    assert (tmp_path / "timeline.jsonl").stat().st_size == made._size
    assert kept[: STRETCH - 1] == list(range(1, STRETCH)) and kept[-STRETCH:] == list(range(steps - 15, steps + 1))
    assert any(steps / 3 < step < 2 * steps / 3 for step in kept)
    assert len([event for event in load_trace(tmp_path) if event["ph"] == "X"]) == len(spans_of(tmp_path))


@given(st.lists(st.integers(0, 10_000), max_size=60), st.integers(0, 3000))
def test_thinned_is_bounded_whatever_the_lines_are(steps, most):
    lines = [json.dumps({"event": "span", "step": step}).encode() + b"\n" for step in steps] + [b"no row\n"]
    left = thinned(lines, most)
    assert sum(map(len, left)) <= most
    assert set(left) <= set(lines) and b"no row\n" not in left


def test_many_threads_write_whole_rows_and_whole_events(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "MOST_BYTES", 20_000)
    made = Timeline(tmp_path, ahead=0, trace=True)
    threads = [
        threading.Thread(target=lambda lane=lane: [made.add(span(step, lane)) for step in range(200)])
        for lane in ("rollout", "trainer")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    made.close()
    rows = list(read_rows(tmp_path / "timeline.jsonl"))
    assert len([event for event in load_trace(tmp_path) if event["ph"] == "X"]) == len(rows) > 0


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "timeline.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="must be able to write"):
        Timeline(tmp_path, ahead=0, trace=False)


def test_a_run_leaves_a_timeline_in_every_mode(tmp_path):
    for staleness in (0, 1):
        run_dir = tmp_path / str(staleness)
        with make_recorder(run_dir, rollout={"max_staleness": staleness}, metrics={"trace": True}) as recorder:
            log_step(recorder, 1)
            with recorder.lane("rollout", "sample", 2), recorder.phase("checkpoint"):
                pass
        assert ("trainer", "commit", 1) in spans_of(run_dir) and ("rollout", "sample", 2) in spans_of(run_dir)
        assert (("rollout", "sample", 1) in spans_of(run_dir)) == (staleness == 0)
        assert load_trace(run_dir)
