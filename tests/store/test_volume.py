"""What only a volume promises: names by rename after a flush, links, full disks."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.errors import CheckpointError
from grpo.store import Store, open_store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def below(store: Store) -> list[str]:
    """Every file that is really there."""
    return sorted(str(path.relative_to(store.url)) for path in Path(store.url).rglob("*") if path.is_file())


def test_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("a/../b")
    assert store.url == str(tmp_path / "b")
    monkeypatch.chdir("/")
    assert store.path("x/y") == str(tmp_path / "b/x/y")
    assert store.path("") == store.url


def test_a_link_is_deleted_and_not_what_it_leads_to(store, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("kept")
    store.make_folder("a")
    Path(store.path("a/link")).symlink_to(tmp_path / "other")
    Path(store.path("b")).symlink_to(tmp_path / "other")
    store.delete("a")
    store.delete("b")
    assert (tmp_path / "other/file").read_text() == "kept"


def test_write_new_of_many_processes(store):
    program = """
import sys
from grpo.store import open_store
print(open_store(sys.argv[1]).write_new('a', sys.argv[2].encode()))
"""
    command = [sys.executable, "-c", program, store.url]
    started = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(8)]
    said = [process.communicate()[0].strip() for process in started]
    assert sorted(said) == ["False"] * 7 + ["True"]
    assert store.read("a") == str(said.index("True")).encode()


@pytest.mark.parametrize("verb", ["write", "write_new"])
def test_a_write_that_fails_leaves_nothing(store, monkeypatch, verb):
    store.make_folder("")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"\d+ bytes are free, at least 3 are needed"):
        getattr(store, verb)("a", b"123")
    assert below(store) == []


def test_a_disk_that_is_full_before_the_folder_is_there(store, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(CheckpointError, match=r"\d+ bytes are free, at least 3 are needed"):
        store.write("a", b"123")


def test_a_write_that_fails_keeps_the_old_content(store, monkeypatch):
    store.write("a", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(CheckpointError, match="broken"):
        store.write("a", b"new")
    assert store.read("a") == b"old"
    assert below(store) == ["a"]


def test_what_is_written_is_flushed_before_it_gets_its_name(store, monkeypatch):
    store.make_folder("")
    events = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle):
        events.append("flush " + Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".")[0])
        fsync(handle)

    def named(old, new):
        events.append(f"name {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    store.write("a", b"1")
    assert events == ["flush ", "name a", "flush store"]
    events.clear()
    with store.workspace("") as work:
        (work / "policy").mkdir()
        (work / "policy/x").write_text("1")
        store.publish(work, "")
    assert events == ["flush x", "flush store", "name x", "flush policy"]


def test_a_folder_is_renamed_and_a_fetch_is_the_folder_itself(store):
    store.write("b/c.txt", b"1")
    store.rename("b", "d")
    assert below(store) == ["d/c.txt"]
    with store.fetch("d", ["c.txt"]) as folder:
        assert folder == Path(store.path("d"))


def test_a_delete_leaves_alone_what_a_link_points_to(store, tmp_path):
    kept = tmp_path / "kept"
    (kept / "deep").mkdir(parents=True)
    for name in ("manifest.json", "deep/file"):
        (kept / name).write_text("kept")
    store.make_folder("real")
    for link in ("link", "real/inside"):
        Path(store.path(link)).symlink_to(kept)
    for name in ("link/manifest.json", "link/deep", "real/inside/manifest.json", "link", "real"):
        store.delete(name)
    assert not os.path.lexists(store.path("link")) and not os.path.lexists(store.path("real"))
    assert sorted(path.name for path in kept.rglob("*")) == ["deep", "file", "manifest.json"]


@pytest.mark.parametrize("verb", ["read", "record"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused_at_once(store, verb, make):
    store.make_folder("")
    make(store.path("manifest.json"))
    if verb == "record":
        assert store.record("manifest.json") is None and store.size("manifest.json") is None
        return
    with pytest.raises(CheckpointError, match="must be a regular file, but is a (pipe|folder).*; take it away"):
        store.read("manifest.json")


def test_a_file_without_end_is_not_read(store):
    store.write("manifest.json", b"")
    os.truncate(store.path("manifest.json"), 1 << 40)
    with pytest.raises(CheckpointError, match="at most 1073741824 bytes"):
        store.read("manifest.json")
