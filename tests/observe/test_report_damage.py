"""`grpo report` on folders that somebody has edited, cut or filled with other things: a page or a sentence."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from grpo.checkpoint.export import export
from grpo.cli import app
from grpo.errors import CheckpointError, GrpoError
from grpo.observe import report
from grpo.observe.report import write_report
from tests.runs import write_run

NAMES = ("metrics.jsonl", "samples.jsonl", "config.yaml")
VALUES = [
    *(None, True, "", "x", -1, 0, 0.5, 10**400, -(10**30), float("nan"), float("inf"), 1e308, 2**63),
    *([], {}, [None], {"a": [1]}, "\ud800\x1b\u202e", "9" * 5000, [[[]]]),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("whole") / "run", steps=3, eval_every=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "get_plotlyjs", lambda: "")


def copied(whole: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("tensorboard", "checkpoints"))
    return folder


def reported(run_dir: Path) -> str:
    """The page, or "" where a sentence refuses; whatever else is raised fails the test."""
    try:
        return write_report(run_dir).read_text(errors="replace")
    except GrpoError as error:
        assert str(error).count("\n") == 0 and len(str(error)) < 2000
        return ""


def edited(path: Path, choose: random.Random, value: object) -> None:
    """One value of one row becomes another, also deep inside, or goes."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    place = choose.choice(rows)
    while True:
        key = choose.choice(list(place) if isinstance(place, dict) else range(len(place)))
        below = place[key]
        if isinstance(below, list | dict) and below and choose.random() < 0.5:
            place = below
            continue
        break
    if choose.random() < 0.2:
        del place[key]
    else:
        place[key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), errors="surrogatepass")


QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(st.sampled_from(NAMES[:2]), st.randoms(use_true_random=False), st.sampled_from(VALUES))
def test_any_edited_value(whole: Path, tmp_path: Path, name: str, choose: random.Random, value: object) -> None:
    run_dir = copied(whole, tmp_path / "run")
    for _ in range(choose.randint(1, 3)):
        edited(run_dir / name, choose, value)
    reported(run_dir)


@QUICK
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.binary(max_size=60), st.booleans())
def test_any_cut_or_overwritten_file(whole: Path, tmp_path: Path, name: str, at: int, new: bytes, cut: bool) -> None:
    run_dir = copied(whole, tmp_path / "run")
    data = (run_dir / name).read_bytes()
    at %= len(data)
    (run_dir / name).write_bytes(data[:at] + new + (b"" if cut else data[at + len(new) :]))
    reported(run_dir)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "run: {name: *i, steps: *i}\nmodel: {path: *i}\n",
        "run: {name: 0x" + "f" * 5000 + ", steps: 0x" + "f" * 5000 + "}",
        "run: [1]\nmodel: 3",
        "run: {name: {a: b}, steps: 1:30}",
        "x: " * 5000,
        "[" * 50_000,
        "run: &r {name: *r}",
        "\x00\xff",
        "a: b\n" * 100_000,
        "? [1]\n: 2",
        "run: !!python/object:os.system {}",
        "2026-01-01",
    ],
    ids=lambda text: text[:20].strip(),
)
def test_any_configuration(whole: Path, tmp_path: Path, text: str) -> None:
    run_dir = copied(whole, tmp_path / "run")
    (run_dir / "config.yaml").write_text(text)
    assert "fake" in reported(run_dir) or "run" in reported(run_dir)
    with pytest.raises(GrpoError):
        export(run_dir, tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file(whole: Path, tmp_path: Path, name: str, make: object) -> None:
    run_dir = copied(whole, tmp_path / "run")
    (run_dir / name).unlink()
    make(run_dir / name)
    with pytest.raises(CheckpointError, match=name):
        write_report(run_dir)


def test_a_file_without_end(whole: Path, tmp_path: Path) -> None:
    run_dir = copied(whole, tmp_path / "run")
    os.truncate(run_dir / "config.yaml", 1 << 40)
    with pytest.raises(CheckpointError, match=r"config.yaml: .* at most \d+ bytes"):
        write_report(run_dir)


@pytest.mark.parametrize("arguments", [["report"], ["export"]])
@pytest.mark.parametrize("place", ["none", "file", "a\0b", "empty", "loop", "x" * 300])
def test_what_is_no_folder_of_a_run(tmp_path: Path, arguments: list[str], place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    out = [str(tmp_path / "out")] if arguments == ["export"] else []
    result = CliRunner().invoke(app, [*arguments, f"{tmp_path}/{place}", *out])
    assert result.exit_code in (2, 14) and "error: " in result.output.lower() and "Traceback" not in result.output


def test_a_row_that_cannot_be_shown_is_named(whole: Path, tmp_path: Path) -> None:
    run_dir = copied(whole, tmp_path / "run")
    text = (run_dir / "samples.jsonl").read_text()
    (run_dir / "samples.jsonl").write_text(text.replace('"rewards"', '"rewarded"', 1))
    with pytest.raises(CheckpointError, match=r"samples.jsonl: a row of step 0 must have .*; take it out"):
        write_report(run_dir)
