"""The snapshot of a hub model against the commit that was asked for; the hub's cache is made by hand."""

from pathlib import Path

import pytest

from grpo.config import Config
from grpo.config.snapshot import check_snapshot
from grpo.errors import ConfigError

ASKED, OTHER = "a" * 40, "b" * 40
CONFIG = Config.model_validate({"model": {"path": "owner/tiny", "revision": ASKED}})


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in (ASKED, OTHER):
        folder = tmp_path / "models--owner--tiny" / "snapshots" / commit
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(commit)
    return tmp_path / "models--owner--tiny"


def test_the_commit_that_was_asked_for(repo: Path) -> None:
    check_snapshot(CONFIG)


def test_a_folder_has_no_commit(tmp_path: Path) -> None:
    check_snapshot(Config.model_validate({"model": {"path": str(tmp_path)}}))


@pytest.mark.parametrize(
    ("name", "missing"), [("config.json", "config.json"), ("model.safetensors", "model.safetensors")]
)
def test_files_that_are_not_of_the_commit(repo: Path, name: str, missing: str) -> None:
    (repo / "snapshots" / ASKED / name).unlink()
    with pytest.raises(ConfigError, match=rf"must be of model.revision = {ASKED}, but {missing} is of: no such file"):
        check_snapshot(CONFIG)


def test_a_cache_that_gives_another_commit_is_not_believed(repo: Path) -> None:
    """A file in `refs` of that name sends the library elsewhere."""
    (repo / "refs").mkdir()
    (repo / "refs" / ASKED).write_text(OTHER)
    with pytest.raises(ConfigError, match=f"config.json is of: {OTHER}"):
        check_snapshot(CONFIG)
