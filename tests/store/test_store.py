import errno
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from grpo.errors import CheckpointError, ConfigError, NonFiniteError
from grpo.store import Store, clean_name
from grpo.store.volume import Volume
from grpo.types import FileRecord


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def record(name: str, data: bytes) -> FileRecord:
    return FileRecord(name, len(data), hashlib.sha256(data).hexdigest())


def below(store: Store) -> list[str]:
    """Every file that is really there."""
    return sorted(str(path.relative_to(store.url)) for path in Path(store.url).rglob("*") if path.is_file())


def test_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("a/../b")
    assert store.url == str(tmp_path / "b")
    monkeypatch.chdir("/")
    assert store.path("x/y") == str(tmp_path / "b/x/y")
    assert store.path("") == store.url


def test_write_read_names_delete(store):
    store.write("b/c.txt", b"1")
    store.write("a.txt", b"2")
    store.write("a.txt", b"3")
    assert store.read("a.txt") == b"3"
    assert store.names() == ["a.txt", "b/c.txt"]
    assert store.names("b") == ["b/c.txt"]
    assert store.folders() == ["b"]
    assert (store.exists("a.txt"), store.exists("b"), store.exists("c")) == (True, True, False)
    assert (store.size("a.txt"), store.size("c")) == (1, None)
    assert (store.record("b/c.txt"), store.record("b/d")) == (record("b/c.txt", b"1"), None)
    store.rename("b", "d")
    for name in ("a.txt", "d", "not there"):
        store.delete(name)
    assert below(store) == []


def test_an_empty_store(store):
    assert (store.names(), store.folders(), store.names("x")) == ([], [], [])
    with pytest.raises(CheckpointError, match="must read x"):
        store.read("x")


def test_a_link_is_deleted_and_not_what_it_leads_to(store, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("kept")
    store.make_folder("a")
    Path(store.path("a/link")).symlink_to(tmp_path / "other")
    Path(store.path("b")).symlink_to(tmp_path / "other")
    store.delete("a")
    store.delete("b")
    assert (tmp_path / "other/file").read_text() == "kept"


def test_write_new_makes_one_winner(store):
    assert store.write_new("a", b"1")
    assert not store.write_new("a", b"2")
    assert store.read("a") == b"1"


def test_write_new_of_many_processes(store):
    program = "import sys; from grpo.store import Store; print(Store(sys.argv[1]).write_new('a', sys.argv[2].encode()))"
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


def test_ranks_publish_into_one_folder(store):
    with store.workspace("step") as first, store.workspace("step") as second:
        (first / "policy").mkdir()
        (first / "policy/w").write_bytes(b"w")
        (second / "optimizer-1").write_bytes(b"half")
        assert store.publish(first, "step") == (record("policy/w", b"w"),)
        assert store.names("step") == ["step/policy/w"], "what another rank still writes is not there"
        (second / "optimizer-1").write_bytes(b"whole")
        assert store.publish(second, "step") == (record("optimizer-1", b"whole"),)
    assert below(store) == ["step/optimizer-1", "step/policy/w"]
    with store.fetch("step", ["policy/w"]) as folder:
        assert folder == Path(store.path("step"))


def test_fetch_needs_every_name(store):
    store.write("step/a", b"1")
    with pytest.raises(CheckpointError, match="must hold b"), store.fetch("step", ["a", "b"]):
        pass


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "quota"), SafetensorError("IO: No space left on device")])
def test_a_disk_that_fills_up_in_a_workspace(store, error):
    with pytest.raises(CheckpointError, match="at least 5 are needed"), store.workspace("step") as work:
        (work / "a").write_bytes(b"12345")
        raise error
    assert below(store) == []


def test_other_errors_pass_through_a_workspace(store):
    with pytest.raises(NonFiniteError), store.workspace("step"):
        raise NonFiniteError("a model that is not finite")
    assert below(store) == []


def test_a_store_travels_to_another_process(store):
    again = pickle.loads(pickle.dumps(store))
    assert type(again) is Volume
    assert again.url == store.url


BAD_NAMES = ["/x", "..", "../x", "x/../y", "./x", "x/", "x//y", "\\x", "x\ny", "x\0y", ".", "x/..", "a\u202eb"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_lead_elsewhere(store, name):
    for call in (store.read, store.exists, store.names, store.delete, store.record, store.make_folder):
        with pytest.raises(CheckpointError, match="relative"):
            call(name)
    with pytest.raises(CheckpointError, match="relative"), store.fetch("", [name]):
        pass


@given(st.text(alphabet=st.sampled_from("ab./\\ \0\n~*é"), max_size=12))
def test_a_name_that_is_accepted_stays_inside(name):
    try:
        accepted = clean_name(name)
    except CheckpointError:
        return
    assert accepted == name
    assert name == "" or os.path.normpath(f"/store/{name}") == f"/store/{name}"


@pytest.mark.parametrize(
    "url", ["gs://bucket/x", "http://host/x", "file:///tmp/x", "memory://x", "://x", "S3://bucket", "s3:/bucket"]
)
def test_other_kinds_of_store_are_refused(url):
    with pytest.raises(ConfigError, match="checkpoint.dir"):
        Store(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///x",
        "s3://AKIAKEY:hidden@bucket/x",
        "s3://KEY@bucket",
        "s3://bucket:9000/x",
        "s3://a",
        "s3://bucket/../x",
        "s3://bucket//x",
        "s3://bucket/x?versionId=1",
        "s3://bucket/x/*",
        "s3://-bucket",
    ],
)
def test_buckets_that_are_refused_and_secrets_are_not_repeated(url):
    with pytest.raises(ConfigError, match="checkpoint.dir") as caught:
        Store(url)
    assert "hidden" not in str(caught.value)


def test_a_bucket_without_s3fs_traffic():
    assert Store("s3://bucket").url == "s3://bucket"
    assert Store("s3://bucket/runs/a/").path("step/x") == "s3://bucket/runs/a/step/x"
