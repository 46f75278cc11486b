"""The folder of a local Ray: private, short, gone with its owner, and never another's."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.cluster import private_folder as module
from grpo.cluster.private_folder import LONGEST, PrivateFolder, check, remove_stale
from grpo.errors import ConfigError


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a short name, where only this test looks."""
    import tempfile

    made = tempfile.mkdtemp(prefix="t", dir="/tmp")
    monkeypatch.delenv("TMPDIR", raising=False)
    return made


def test_it_is_private_short_and_gone_at_the_end(place: str) -> None:
    umask = os.umask(0)
    try:
        with PrivateFolder("runs/x", [place]) as folder:
            assert os.path.dirname(folder.path) == place and len(folder.path) <= LONGEST
            assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700
            folder.offer("grpo.cluster")
            assert Path(folder.modules, "grpo", "errors.py").is_file()
            assert sorted(os.listdir(folder.modules)) == ["grpo", "sitecustomize.py"]
    finally:
        os.umask(umask)
    assert os.listdir(place) == []


def test_the_shells_folder_of_temporary_files_is_used_by_a_short_name(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / ("long" * 30)
    far.mkdir()
    monkeypatch.setenv("TMPDIR", str(far))
    with PrivateFolder("runs/x", [place]) as folder:
        assert folder.path.startswith(place) and os.path.realpath(folder.temporary) == str(far)
        Path(folder.temporary, "file").touch()
    assert os.listdir(far) == ["file"] and os.listdir(place) == []  # the link went, and nothing behind it


def test_a_folder_of_temporary_files_that_is_not_there_is_made_up_for(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    with PrivateFolder("runs/x", [place]) as folder:
        assert os.path.isdir(folder.temporary) and not os.path.islink(folder.temporary)


@pytest.mark.parametrize("kind", ["long", "missing", "file", "full", "readonly"])
def test_where_there_is_no_place_each_is_named_with_its_reason(
    place: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = {"long": place + "/" + "x" * 30, "missing": place + "/m", "file": place + "/f", "readonly": "/proc"}
    where = path.get(kind, place)
    if kind == "long":
        os.mkdir(where)
    Path(place, "f").touch()
    if kind == "full":
        monkeypatch.setattr(module, "LEAST_FREE", 2**70)
    reasons = {"long": "longer than", "missing": "No such file", "file": "Not a directory", "full": "MiB free"}
    with pytest.raises(ConfigError, match=f"{where}: .*{reasons.get(kind, '')}.*; set TMPDIR to a short path"):
        check(where, [])


OWNER = """
import sys, time
from grpo.cluster.private_folder import PrivateFolder
with PrivateFolder("x", [sys.argv[1]]) as folder:
    print(folder.path, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_start_has_left_is_removed_and_a_living_ones_is_not(place: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, place], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout
        path = owner.stdout.readline().strip()
        remove_stale(place)
        assert os.path.isdir(path)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    remove_stale(place)
    assert not os.path.exists(path)


def test_nothing_is_removed_that_is_not_ours_or_lies_behind_a_link(place: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    for folder in (kept, Path(place, "grpo.open"), Path(place, "grpo.unlocked"), Path(place, "other")):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.name != "grpo.unlocked":
            (folder / "lock").touch()
    Path(place, "grpo.open").chmod(0o755)
    Path(place, "grpo.link").symlink_to(kept)
    with PrivateFolder("x", [place]) as folder:
        Path(folder.path, "link").symlink_to(kept)
        names = sorted(os.listdir(place))
        remove_stale(place)
        assert sorted(os.listdir(place)) == names
    assert (kept / "lock").exists()


def test_a_lock_that_is_a_pipe_does_not_hold_the_start_up(place: str) -> None:
    folder = Path(place, "grpo.pipe")
    folder.mkdir(mode=0o700)
    os.mkfifo(folder / "lock")
    began = time.monotonic()
    remove_stale(place)
    assert time.monotonic() - began < 30
