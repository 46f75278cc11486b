"""The contract of a store: one set of tests over both kinds. What only one kind promises is in its own file."""

import errno
import hashlib
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from grpo.errors import CheckpointError, ConfigError, NonFiniteError
from grpo.store import clean_name, open_store
from grpo.types import FileRecord

URL = "s3://models/runs/a"


@pytest.fixture(params=["volume", pytest.param("bucket", marks=pytest.mark.slow)])
def store(request, tmp_path):
    if request.param == "volume":
        return open_store(str(tmp_path / "store"))
    request.getfixturevalue("client")
    return open_store(URL)


def record(name: str, data: bytes) -> FileRecord:
    return FileRecord(name, len(data), hashlib.sha256(data).hexdigest())


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
    for name in ("a.txt", "b", "not there"):
        store.delete(name)
    assert (store.names(), store.folders()) == ([], [])


def test_a_name_is_not_a_prefix(store):
    for name in ("step_1/x", "step_10/x", "step_1.attempt-2/x"):
        store.write(name, b"1")
    store.delete("step_1")
    assert store.names() == ["step_1.attempt-2/x", "step_10/x"]
    assert store.names("step_1") == []


def test_an_empty_store(store):
    assert (store.names(), store.folders(), store.names("x")) == ([], [], [])
    with pytest.raises(CheckpointError, match="must read x"):
        store.read("x")


def test_write_new_makes_one_winner(store):
    assert store.write_new("a", b"1")
    assert not store.write_new("a", b"2")
    assert store.read("a") == b"1"


def test_ranks_publish_into_one_folder(store):
    with store.workspace("step") as first, store.workspace("step") as second:
        (first / "policy").mkdir()
        (first / "policy/w").write_bytes(b"w")
        (second / "optimizer-1").write_bytes(b"half")
        assert store.publish(first, "step") == (record("policy/w", b"w"),)
        assert store.names("step") == ["step/policy/w"], "what another rank still writes is not there"
        (second / "optimizer-1").write_bytes(b"whole")
        assert store.publish(second, "step") == (record("optimizer-1", b"whole"),)
    assert store.names() == ["step/optimizer-1", "step/policy/w"]
    with store.fetch("step", ["policy/w", "optimizer-1"]) as folder:
        assert (folder / "policy/w").read_bytes() == b"w" and (folder / "optimizer-1").read_bytes() == b"whole"


def test_fetch_needs_every_name(store):
    store.write("step/a", b"1")
    with pytest.raises(CheckpointError, match="must (hold b|read step)"), store.fetch("step", ["a", "b"]):
        pass


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "quota"), SafetensorError("IO: No space left on device")])
def test_a_disk_that_fills_up_in_a_workspace(store, error):
    with pytest.raises(CheckpointError, match="at least 5 are needed"), store.workspace("step") as work:
        (work / "a").write_bytes(b"12345")
        raise error
    assert store.names() == []


def test_other_errors_pass_through_a_workspace(store):
    with pytest.raises(NonFiniteError), store.workspace("step"):
        raise NonFiniteError("a model that is not finite")
    assert store.names() == []


def test_a_store_travels_to_another_process(store):
    store.write("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert type(again) is type(store) and again.url == store.url
    assert again.read("a") == b"1"


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
        open_store(url)


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
        open_store(url)
    assert "hidden" not in str(caught.value)


def test_a_bucket_without_s3fs_traffic():
    assert open_store("s3://bucket").url == "s3://bucket"
    assert open_store("s3://bucket/runs/a/").path("step/x") == "s3://bucket/runs/a/step/x"
