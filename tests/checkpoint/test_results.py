"""Results of a finished run: whole, replaced as a whole, and a failure that loses nothing."""

import hashlib
import json
from pathlib import Path

import pytest

from grpo.checkpoint import results as module
from grpo.checkpoint.results import deliver
from grpo.config import Config
from grpo.errors import ConfigError, GrpoError, Interrupted, ResultsError, StoreLost
from tests.checkpoint.test_export import save_policy


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.html").write_text("<html>")
    (run / "metrics.jsonl").write_text("{}\n")

    def exported(_run: Path, out: Path, step: int | None = None, part: str = "policy") -> Path:
        out.mkdir(parents=True)
        (out / "model.safetensors").write_bytes((run / "weights").read_bytes() if (run / "weights").exists() else b"w")
        return out

    monkeypatch.setattr(module, "export", exported)  # tests/checkpoint/test_export.py has the real one
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    return run


def config(place: object, seconds: float = 0.2) -> Config:
    tree = {"model": {"path": "/m"}, "run": {"name": "mine", "results": place and str(place)}}
    return Config.model_validate(tree | {"deadlines": {"save": seconds}})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_nowhere_is_nothing(run_dir: Path) -> None:
    assert deliver(config(None), run_dir) == ""


def test_a_folder(run_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "results"
    assert deliver(config(place), run_dir) == str(place / "mine")
    found = tree(place / "mine")
    manifest = json.loads(found.pop("manifest.json"))
    assert found == {"policy/model.safetensors": b"w", "report.html": b"<html>", "metrics.jsonl": b"{}\n"}
    assert {file["name"]: file["sha256"] for file in manifest["files"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in found.items()
    }
    assert [path.name for path in place.iterdir()] == ["mine"]


def test_an_adapter_goes_along_or_alone(run_dir: Path, tmp_path: Path) -> None:
    for merged, wanted in ((True, {"policy", "adapter"}), (False, {"adapter"})):
        changes = {"train": {"lora": {}}, "checkpoint": {"merged": merged}}
        made = Config.model_validate(config(tmp_path / f"{merged}").model_dump() | changes)
        deliver(made, run_dir)
        assert {path.name for path in (tmp_path / f"{merged}/mine").iterdir() if path.is_dir()} == wanted


def test_a_later_start_replaces_all_of_it(run_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "results"
    deliver(config(place), run_dir)
    same = (place / "mine").stat().st_ino
    deliver(config(place), run_dir)
    assert (place / "mine").stat().st_ino == same
    (place / "mine" / "left-over").write_text("x")
    (run_dir / "weights").write_bytes(b"new")
    deliver(config(place), run_dir)
    assert tree(place / "mine")["policy/model.safetensors"] == b"new" and "left-over" not in tree(place / "mine")
    assert [path.name for path in place.iterdir()] == ["mine"]


def test_a_place_that_comes_back_is_tried_again(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, failures = module._copy, [StoreLost("away"), StoreLost("away")]

    def flaky(*arguments: object) -> str:
        if failures:
            raise failures.pop()
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_copy", flaky)
    deliver(config(tmp_path / "results", seconds=60), run_dir)
    assert capsys.readouterr().out.count("run.results: away; once more") == 2 and (tmp_path / "results/mine").is_dir()


@pytest.mark.parametrize("error", [ConfigError("wrong"), Interrupted("stop")])
def test_what_no_second_try_mends_ends_at_once(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: GrpoError
) -> None:
    calls: list[object] = []

    def fails(*given: object) -> str:
        calls.append(given)
        raise error

    monkeypatch.setattr(module, "_copy", fails)
    with pytest.raises(type(error)) as end:
        deliver(config(tmp_path / "results", seconds=60), run_dir)
    assert end.value is error and len(calls) == 1


def test_a_policy_that_the_run_has_not_kept_is_refused_at_once_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that kept its adapter alone, started again with checkpoint.merged: true."""
    save_policy(tmp_path / "run", 5, lambda policy: policy.rename(policy.parent / "adapter"))
    made = config(tmp_path / "results", seconds=60).model_dump() | {"train": {"lora": {}}}
    with pytest.raises(ConfigError, match="not kept all .* step with checkpoint.merged=true; or, .*merged=false"):
        deliver(Config.model_validate(made), tmp_path / "run")
    assert not capsys.readouterr().out and not list((tmp_path / "results").iterdir())


def test_a_place_that_stays_away_has_an_exit_code_of_its_own(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        ResultsError, match="the run is done and whole in .*, but its results could not be copied"
    ) as end:
        deliver(config(tmp_path / "file" / "results"), run_dir)
    assert end.value.exit_code == 19 and isinstance(end.value, GrpoError) and not end.value.fatal
    assert (run_dir / "report.html").exists()
