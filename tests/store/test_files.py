"""What may stand in the place of a file, and what a delete must not follow."""

import os
import socket
import stat
from pathlib import Path

import pytest

from grpo.store import files
from grpo.store.files import NotAFile, mounts_below, open_append, open_regular, read_regular, remove_tree


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


PLANTED = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    PLANTED[kind](tmp_path / "x")
    for opened in (open_regular, open_append, lambda path: read_regular(path, 10)):
        with pytest.raises(NotAFile, match=f"must be a regular file, but is {kind}"):
            opened(tmp_path / "x")


def test_a_pipe_that_comes_between_the_look_and_the_open_is_refused_too(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    regular, stat = os.stat(tmp_path / "file"), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kwargs: regular if str(path).endswith("pipe") else stat(path))
    with pytest.raises(NotAFile, match="a pipe"):
        open_regular(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(NotAFile, match="a pipe"):
        open_append(tmp_path / "pipe")
    os.close(reader)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert read_regular(path, 10) == b"0123456789"
    with pytest.raises(NotAFile, match="at most 9 bytes"):
        read_regular(path, 9)
    os.truncate(path, 1 << 40)
    with pytest.raises(NotAFile, match="at most 100 bytes"):
        read_regular(path, 100)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 1)


def test_appending_makes_the_file_and_keeps_what_it_holds(tmp_path):
    for _ in range(2):
        descriptor = open_append(tmp_path / "x")
        os.write(descriptor, b"ab")
        os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == b"abab"


@pytest.fixture
def treasure(tmp_path):
    folder = tmp_path / "treasure"
    folder.mkdir()
    (folder / "manifest.json").write_text("kept")
    return folder


@pytest.mark.parametrize("place", ["", "inside", "deep/er"])
def test_a_delete_takes_the_link_and_not_what_it_points_to(tmp_path, treasure, place):
    top = tmp_path / "top"
    link = top / place if place else top
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(treasure)
    remove_tree(top)
    assert not os.path.lexists(top)
    assert (treasure / "manifest.json").read_text() == "kept"


def test_a_delete_ends_in_a_loop_and_takes_dangling_links_and_files(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    (top / "loop").symlink_to(top)
    (top / "self").symlink_to("self")
    (top / "none").symlink_to("/nowhere/at/all")
    remove_tree(top)
    remove_tree(top)
    assert not top.exists()
    (tmp_path / "file").touch()
    remove_tree(tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_what_is_mounted_there_keeps_the_whole_folder(tmp_path, monkeypatch):
    folder = tmp_path / "a b"
    (folder / "in").mkdir(parents=True)
    line = f"31 1 8:1 / {str(folder).replace(' ', chr(92) + '040')}/in rw - ext4 /dev/sda1 rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: line)
    assert mounts_below(folder) == [f"{folder}/in"] == mounts_below(folder / "in")
    assert mounts_below(tmp_path / "a") == []
    with pytest.raises(OSError, match="while something is mounted at .*/in"):
        remove_tree(folder)
    assert (folder / "in").exists()


def test_real_mounts_are_seen():
    assert "/proc" in mounts_below("/")
    assert mounts_below("/proc")[0] == "/proc"


def test_nothing_else_in_the_house_deletes_folders():
    """`shutil.rmtree` knows no mounts; exempt are private folders of ours, and a process without this module."""
    sandbox = {"rewards/sandbox/supervisor.py", "rewards/sandbox/usage.py"}
    own = {"files.py", "run/watchdog.py", "rollout/core.py"} | sandbox
    top = Path(files.__file__).parent
    found = {path.relative_to(top).as_posix() for path in top.rglob("*.py") if "rmtree(" in path.read_text()}
    assert found <= own


def test_a_commit_by_rename_takes_the_place_of_no_device(tmp_path: Path) -> None:
    target, link, pipe, new = (tmp_path / name for name in ("target", "link", "pipe", "new"))
    target.write_text("old")
    link.symlink_to("/dev/full")
    os.mkfifo(pipe)
    for place in (link, target, new, pipe):
        (tmp_path / "scratch").write_text("made")
        files.replace(tmp_path / "scratch", place)
        assert place.read_text() == "made" and not place.is_symlink()
    (tmp_path / "scratch").write_text("made")
    with pytest.raises(NotAFile, match="a device"):
        files.replace(tmp_path / "scratch", "/dev/full")
    with pytest.raises(OSError):
        files.replace(tmp_path / "scratch", tmp_path)
    assert stat.S_ISCHR(os.lstat("/dev/full").st_mode)
