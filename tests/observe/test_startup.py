"""What starts took, as people and machines see it."""

import json
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from grpo.observe.report import write_report
from grpo.observe.startup import start_line, start_table
from grpo.run.start import Phases
from tests.observe.recorders import make_recorder

ENGINES = {"engine 0": {"place": 0.2, "imports": 6.0, "weights": 1.0}, "engine 1": {"place": 0.5, "imports": 9.0}}
RANK = {"trainer rank 0": {"place": 0.1, "imports": 4.0, "warm_up": 2.0}}


def rows(folder: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["event"] == "startup"]


def test_a_start_is_rows_gauges_and_one_line(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    said: list[str] = []
    recorder.say = said.append  # type: ignore[method-assign]
    recorder._phases = Phases("process")
    with recorder:
        recorder.starting("actors")
        recorder.started("trainer", RANK)
        recorder.started("rollout", ENGINES)
        recorder.rewind(0, {})
        recorder.starting("sync")
        for _ in range(2):  # the second belongs to a trainer that was lost
            with recorder.phase("weight_sync"):
                recorder.log_sync({}, "digest")
        recorder.starting("self_test")
        series = generate_latest(recorder._prometheus.registry).decode()
    found = rows(tmp_path)
    assert [row["actor"] for row in found] == ["trainer rank 0", "engine 0", "engine 1", "driver"]
    assert [row["start/seconds"] for row in found[:3]] == [6.1, 7.2, 9.5]
    assert {key for key in found[3] if key.startswith("start/")} == {
        "start/seconds", "start/process", "start/actors", "start/sync"
    }  # fmt: skip
    assert found[3]["start/seconds"] == pytest.approx(
        sum(found[3][f"start/{at}"] for at in ("process", "actors", "sync"))
    )  # type: ignore[misc]
    assert 'grpo_start_seconds{phase="imports",role="rollout",run="fake"} 9.0' in series
    assert 'grpo_start_seconds{phase="warm_up",role="trainer",run="fake"} 2.0' in series
    assert len(said) == 1 and said[0].startswith("start ")
    assert "; trainer rank 0 6.1 s: imports 4.0, warm up 2.0; engine 1 9.5 s: imports 9.0, place 0.5" in said[0]


def test_a_replaced_engine_has_a_row_of_its_own_that_outlives_a_resume(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path)
    with recorder:
        recorder.started("rollout", {"engine 0": {"imports": 1.5}})
        recorder.rewind(0, {})
    assert [(row["actor"], row["start/imports"], row["role"]) for row in rows(tmp_path)] == [
        ("engine 0", 1.5, "rollout")
    ]


def test_the_line_and_the_table_take_the_slowest_of_each_role() -> None:
    many = {f"engine {index}": {"imports": float(index), "place": 0.01} for index in range(12)}
    assert start_line({**many, "driver": {"ray": 3.0, "actors": 9.0}}) == (
        "start 12.0 s: actors 9.0, ray 3.0; engine 11 11.0 s: imports 11.0"
    )
    assert start_line({}) == ""
    told = [{"event": "startup", "step": 0, "actor": name, "start/seconds": sum(of.values()), "start/imports": 1.0}
            for name, of in {**many, "driver": {"ray": 2.0}}.items()]  # fmt: skip
    table = start_table([*told, {"event": "startup", "step": 3, "actor": "engine 11", "start/seconds": 99.0}])
    assert [line["actor"] for line in table][:3] == ["driver", "engine 11", "engine 10"] and len(table) == 8
    assert table[1]["seconds"] == 99.0  # its last start


def test_the_report_shows_it_and_takes_what_somebody_has_written(tmp_path: Path) -> None:
    lines = [
        {
            "event": "startup",
            "step": 0,
            "actor": "engine 0",
            "start/seconds": 9.04,
            "start/warm_up": 5.5,
            "start/x": "?",
        },
        {"event": "startup", "step": 0, "actor": "<b>", "start/seconds": None},
        {"event": "startup", "step": 0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "<th>engine 0</th><td>9.0 s</td><td>warm up 5.5</td>" in page
    assert "&lt;b&gt;" in page and "<b>" not in page
