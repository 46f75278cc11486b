import math
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo.errors import CheckpointError, ConfigError
from grpo.observe import rows
from grpo.observe.recorder import RunRecorder
from grpo.observe.rows import read_rows
from tests.observe.recorders import log_step, make_recorder, rewound, rows_of
from tests.runs import make_config, make_group, make_stats, quiet_progress, write_run


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with make_recorder(tmp_path / "run") as recorder:
        log_step(recorder, 1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/entropy": 1.0})
    row = rows_of(tmp_path / "run")[1]
    assert (row["train/loss"], row["train/grad_norm"], row["train/entropy"]) == (None, None, 1.0)


def test_samples_keep_the_first_groups_of_a_step(tmp_path):
    groups = [make_group([1.0, 0.0], row=row, text="text", truncated=1) for row in range(5)]
    with (
        make_recorder(tmp_path / "run", metrics={"completions_per_step": 2}) as recorder,
        recorder.step(1),
        recorder.phase("rollout"),
    ):
        recorder.log_step(1, groups, make_stats(1))
    rows = rows_of(tmp_path / "run", "samples.jsonl")
    assert [row["prompt_id"] for row in rows] == ["fake:0", "fake:1"]
    assert rows[0] == {
        "event": "step",
        "step": 1,
        "prompt_id": "fake:0",
        "question": "Question 0: what is 2 + 2?",
        "answer": "4",
        "completions": ["text (0)", "text (1)"],
        "rewards": [1.0, 0.0],
        "finish_reasons": ["length", "stop"],
        "versions": [0, 0],
        "newest_versions": [0, 0],
    }


def test_tensorboard_shows_the_same_numbers(tmp_path):
    write_run(tmp_path / "run", steps=3, eval_every=3)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    rows = rows_of(tmp_path / "run")
    numbers = {key for row in rows for key, value in row.items() if "/" in key and value is not None}
    assert set(events.Tags()["tensors"]) == numbers
    for key in ("reward/mean", "eval/accuracy", "phase/train"):
        shown = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(key)]
        assert shown == [(row["step"], pytest.approx(row[key])) for row in rows if key in row]


@pytest.mark.parametrize("trace", ["metrics.jsonl", "config.yaml", "samples.jsonl", "checkpoints/"])
def test_a_folder_that_holds_a_run_is_refused_and_untouched_if_the_user_says_so(tmp_path, trace):
    (tmp_path / trace).mkdir() if trace.endswith("/") else (tmp_path / trace).write_text("kept")
    recorder = make_recorder(tmp_path, run={"name": "fake", "steps": 3, "resume": "never"})
    with pytest.raises(ConfigError, match=f"run.dir.*never.*{trace.strip('/')}.*auto"), recorder:
        pass
    assert [path.name for path in tmp_path.iterdir()] == [trace.strip("/")]
    assert trace.endswith("/") or (tmp_path / trace).read_text() == "kept"


def test_going_back_takes_rows_and_samples_and_scalars_of_the_lost_steps_out(tmp_path):
    rewound(tmp_path)
    assert [(row["event"], row["step"]) for row in rows_of(tmp_path)] == [
        *(("start", 0), ("step", 1), ("step", 2)),
        *(("step", 3), ("end", 3)),
    ]
    assert rows_of(tmp_path)[3]["reward/mean"] == 1.0
    assert [row["step"] for row in rows_of(tmp_path, "samples.jsonl")] == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("reward/mean")] == [1, 2, 3]


def test_rows_that_are_taken_out_are_kept_elsewhere(tmp_path):
    rewound(tmp_path)
    assert [row["step"] for row in rows_of(tmp_path, "superseded/metrics-0000.jsonl")] == [3, 4]
    assert [row["step"] for row in rows_of(tmp_path, "superseded/samples-0000.jsonl")] == [3, 4]


def test_the_next_start_goes_on_with_the_rows_of_the_checkpoint_and_an_older_writer_is_cut_off(tmp_path):
    with make_recorder(tmp_path) as zombie:
        zombie.rewind(0, {})
        log_step(zombie, 1)
        attachments = zombie.attachments()
        log_step(zombie, 2)
        recorder = RunRecorder(make_config(), tmp_path, quiet_progress(make_config()), ["grpo"], attempt=2)
        with recorder:
            recorder.rewind(1, attachments)
            log_step(zombie, 3)
            log_step(recorder, 2)
        rows = [(row["event"], row["step"], row.get("attempt")) for row in rows_of(tmp_path)]
    assert rows == [("start", 0, "1"), ("step", 1, None), ("start", 0, "2"), ("step", 2, None), ("end", 2, None)]


def test_two_runs_have_equal_digests_where_they_did_the_same(tmp_path):
    for name, rewards_G in (("a", (1.0, 0.0)), ("b", (1.0, 0.0)), ("c", (1.0, 0.0, 0.0))):
        with make_recorder(tmp_path / name) as recorder, recorder.step(1):
            with recorder.phase("weight_sync"):
                recorder.log_sync({}, "abcd")
            recorder.log_step(1, [make_group(rewards_G)], make_stats(1))
    a, b, c = (
        {key: row[key] for key in ("prompts", "tokens", "weights")}
        for row in (rows_of(tmp_path / name)[1] for name in "abc")
    )
    assert a == b and a["weights"] == "abcd"
    assert c["prompts"] == a["prompts"] and c["tokens"] != a["tokens"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="run.dir.*file/run"), make_recorder(tmp_path / "file/run"):
        pass


def test_a_full_disk_is_a_typed_error(tmp_path):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"), make_recorder(tmp_path / "run") as recorder:
        recorder._folder._metrics = Full()
        log_step(recorder, 1)


def test_read_rows_leaves_out_the_half_line_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "step": 2}\n{"st')
    assert [row["step"] for row in read_rows(path)] == [1, 2]


NO_ROWS = [
    '{"st',
    "[1]",
    "",
    "\x00\x00",
    "{}",
    '{"event": "step"}',
    '{"step": 1}',
    '{"event": ["step"], "step": 1}',
    '{"event": "step", "step": "1"}',
    '{"event": "step", "step": NaN}',
    '{"event": "step", "step": 1e999}',
    '{"event": "step", "step": -1}',
    '{"event": "step", "step": true}',
    '{"event": "step", "step": ' + "9" * 5000 + "}",
    "[" * 100_000,
]


@pytest.mark.parametrize("line", NO_ROWS, ids=lambda line: line[:40] or "empty")
def test_read_rows_names_a_damaged_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "step", "step": 1}}\n{line}\n{{"event": "step", "step": 2}}\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl:2"):
        list(read_rows(path))


def test_read_rows_of_no_file(tmp_path):
    assert list(read_rows(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_pipe_in_the_place_of_rows_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="must be a regular file, but is a pipe.*; take it away"):
        list(read_rows(tmp_path / name))
    for reader in (False, True):  # with a reader a pipe opens at once, and then takes the rows
        opened = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK) if reader else None
        with pytest.raises(CheckpointError, match="must be a regular file, but is a pipe"), make_recorder(tmp_path):
            pass
        if opened:
            os.close(opened)


def test_a_file_of_zeros_without_end_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LINE", 1 << 16)
    (tmp_path / "metrics.jsonl").touch()
    os.truncate(tmp_path / "metrics.jsonl", 1 << 40)
    with pytest.raises(CheckpointError, match="metrics.jsonl:1: a row must be"):
        list(read_rows(tmp_path / "metrics.jsonl"))
