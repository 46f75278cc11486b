"""Against moto's S3 on the loopback, behind a layer that refuses, cuts off or drops requests."""

import os
from contextlib import ExitStack

import pytest

from grpo.checkpoint.export import export
from grpo.config.load import dump_config
from grpo.errors import CheckpointError, ClusterError, Fenced, StoreLost
from grpo.store import open_store
from grpo.store.bucket import ATTEMPTS, ROUNDS
from tests.checkpoint.test_checkpoints import FILES, Overtaken, run
from tests.checkpoints import checkpoints, config, save
from tests.store.test_store import record

pytestmark = pytest.mark.slow
URL = "s3://models/runs/a"


@pytest.fixture
def store(client):
    return open_store(URL)


def keys(client) -> list[str]:
    contents = client.list_objects_v2(Bucket="models", Prefix="runs/a/").get("Contents", [])
    return [entry["Key"].removeprefix("runs/a/") for entry in contents]


def folders(client) -> list[str]:
    return sorted({key.partition("/")[0] for key in keys(client)})


def test_listings_are_never_old(store, client):
    assert store.names() == []
    client.put_object(Bucket="models", Key="runs/a/x", Body=b"1")
    assert store.names() == ["x"]
    assert store.exists("x")
    assert store.fs is not open_store(URL).fs


def test_workspace_publish_fetch(store):
    data = {"policy/config.json": b"{}", "optimizer": os.urandom(1000), "empty": b""}
    with store.workspace("step") as work:
        (work / "policy").mkdir()
        for name, content in data.items():
            (work / name).write_bytes(content)
        records = store.publish(work, "step")
    assert not work.exists()
    assert records == tuple(record(name, data[name]) for name in sorted(data))
    with store.fetch("step", ["optimizer", "policy/config.json"]) as folder:
        assert sorted(path.name for path in folder.rglob("*")) == ["config.json", "optimizer", "policy"]
        assert (folder / "optimizer").read_bytes() == data["optimizer"]
    assert not folder.exists()
    with pytest.raises(CheckpointError), store.fetch("step", ["lost"]):
        pass


def test_a_file_of_several_parts(store, monkeypatch):
    data = os.urandom(11 << 20)
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    with store.workspace("step") as work:
        (work / "large").write_bytes(data)
        [made] = store.publish(work, "step")
    assert made == record("large", data)
    assert store.record("step/large") == record("step/large", data)


@pytest.mark.parametrize(
    ("verb", "fault", "count"),
    [("PUT", "500", ATTEMPTS), ("PUT", "503", ATTEMPTS), ("GET", "500", ATTEMPTS), ("GET", "cut", ROUNDS)],
)
def test_a_request_that_fails_is_sent_again(store, server, verb, fault, count):
    store.write("a", b"12345678")
    server.times(count - 1, fault, verb, "/runs/a/a")
    before = len(server.struck)
    if verb == "PUT":
        store.write("a", b"new")
    assert store.read("a") == (b"new" if verb == "PUT" else b"12345678")
    assert len(server.struck) == before + count - 1


@pytest.mark.parametrize("verb", ["read", "record", "fetch"])
def test_answers_that_always_break_off(store, server, verb):
    store.write("a", b"12345678")
    server.plan = lambda method, path: "cut" if method == "GET" else None
    with pytest.raises(StoreLost), ExitStack() as stack:
        if verb == "fetch":
            stack.enter_context(store.fetch("", ["a"]))
        else:
            getattr(store, verb)("a")


def test_a_bucket_that_answers_no_more_is_worth_a_retry(store, server, tmp_path):
    save(checkpoints(tmp_path, dir=URL), 10)
    server.plan = lambda method, path: "500"
    with pytest.raises(StoreLost, match="start again once the bucket answers") as caught:
        checkpoints(tmp_path, dir=URL).newest()
    assert (caught.value.exit_code, caught.value.fatal) == (10, False)
    assert isinstance(caught.value, ClusterError)
    server.plan = lambda method, path: None
    assert checkpoints(tmp_path, dir=URL).newest().step == 10


def test_no_server_at_all(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreLost) as caught:
        open_store(URL).read("a")
    assert "canary-secret" not in str(caught.value)


def test_no_bucket_and_no_credentials(client, monkeypatch):
    with pytest.raises(CheckpointError, match="bucket"):
        open_store("s3://not-there/x").write("a", b"1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(CheckpointError, match="no credentials in the environment"):
        open_store(URL).read("a")


def test_checkpoints_in_a_bucket(client, tmp_path):
    writer = checkpoints(tmp_path, dir=URL, keep=2)
    assert writer.newest() is None
    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
        made = save(writer, step, score)
    assert folders(client) == ["latest", "step_000001.attempt-1", "step_000003.attempt-1", "step_000004.attempt-1"]
    assert writer.newest() == made
    assert made.folder == f"{URL}/step_000004.attempt-1"
    assert made.read("metrics.jsonl") == b'{"step": 4}\n'
    assert client.get_object(Bucket="models", Key="runs/a/latest")["Body"].read() == b"step_000004.attempt-1"


def test_the_manifest_goes_last(client, tmp_path, server):
    puts = []
    server.plan = lambda method, path: puts.append(path.rpartition("/")[2]) if method == "PUT" else None
    save(checkpoints(tmp_path, dir=URL), 1)
    assert sorted(puts[:-2]) == sorted(name.rpartition("/")[2] for name in FILES if name != "manifest.json")
    assert puts[-2:] == ["manifest.json", "latest"]


def test_an_attempt_never_writes_to_anothers_files(client, tmp_path):
    """An upload of attempt 1 that goes on after attempt 2 has committed the same step harms nothing."""
    old = open_store(checkpoints(tmp_path, attempt=1, dir=URL).begin(5))
    made = save(checkpoints(tmp_path, attempt=2, dir=URL), 5)
    with old.workspace("") as work:
        (work / "optimizer-00000.safetensors").write_bytes(b"late")
        old.publish(work, "")
    late = checkpoints(tmp_path, attempt=3, dir=URL)
    assert late.newest() == made
    late.begin(6)
    assert folders(client) == ["latest", "step_000005.attempt-2"]


def test_an_overtaken_writer_puts_no_manifest(client, tmp_path):
    from grpo.checkpoint import Checkpoints

    save(checkpoints(tmp_path, dir=URL), 1)
    for checks in (0, 1):
        with pytest.raises(Fenced):
            save(Checkpoints(config(tmp_path, dir=URL), tmp_path, Overtaken(checks)), 2)
        assert checkpoints(tmp_path, dir=URL).newest().step == 1


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_damaged_object_leads_to_the_checkpoint_before(client, tmp_path):
    writer = checkpoints(tmp_path, dir=URL)
    save(writer, 10)
    save(writer, 20)
    for name in FILES:
        key = f"runs/a/step_000020.attempt-1/{name}"
        whole = client.get_object(Bucket="models", Key=key)["Body"].read()
        for body in (flipped(whole), None):
            if body is None:
                client.delete_object(Bucket="models", Key=key)
            else:
                client.put_object(Bucket="models", Key=key, Body=body)
            assert writer.newest().step == 10
            [(skipped, reason)] = writer.skipped
            assert skipped == "step_000020.attempt-1"
            assert f"step_000020.attempt-1/{name}" in reason
        client.put_object(Bucket="models", Key=key, Body=whole)
    assert writer.newest().step == 20


def test_none_whole_is_an_error_and_never_step_0(client, tmp_path):
    writer = checkpoints(tmp_path, dir=URL)
    save(writer, 10)
    client.delete_object(Bucket="models", Key="runs/a/step_000010.attempt-1/manifest.json")
    with pytest.raises(CheckpointError, match="step_000010.attempt-1/manifest.json is missing"):
        writer.newest()
    writer.store.delete("step_000010.attempt-1")
    with pytest.raises(CheckpointError, match="step 0"):
        writer.newest()


@pytest.mark.parametrize("point", ["begin", "written", "manifest", "pointer"])
def test_a_kill_at_any_point_leaves_this_checkpoint_or_the_one_before(client, tmp_path, monkeypatch, point):
    monkeypatch.setenv("CHECKPOINT_DIR", URL)
    assert run(tmp_path, 1, 10, 20, faults=f"save.{point}@20:kill").returncode == -9
    after = checkpoints(tmp_path, attempt=2, dir=URL)
    committed = point not in ("begin", "written")
    assert after.newest().step == (20 if committed else 10)
    assert after.skipped == []
    assert save(after, 30).attempt == 2
    kept = ["step_000020.attempt-1"] if committed else ["step_000010.attempt-1"]
    assert folders(client) == ["latest", *kept, "step_000030.attempt-2"]


def test_a_killed_upload_is_not_visible(client, tmp_path):
    """Half of the files are there, and half of the parts of the next one."""
    writer = checkpoints(tmp_path, dir=URL)
    save(writer, 10)
    store = open_store(writer.begin(20))
    store.write("policy/config.json", b"{}")
    key = "runs/a/step_000020.attempt-1/policy/model.safetensors"
    upload = client.create_multipart_upload(Bucket="models", Key=key)["UploadId"]
    client.upload_part(Bucket="models", Key=key, UploadId=upload, PartNumber=1, Body=b"half")
    after = checkpoints(tmp_path, attempt=2, dir=URL)
    assert after.newest().step == 10
    after.begin(20)
    assert folders(client) == ["latest", "step_000010.attempt-1"]
    client.abort_multipart_upload(Bucket="models", Key=key, UploadId=upload)


def test_export_from_a_bucket(client, tmp_path):
    made = config(tmp_path / "run", dir=URL)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump_config(made))
    save(checkpoints(tmp_path / "run", dir=URL), 10)
    with pytest.raises(CheckpointError, match="model_type"):
        export(tmp_path / "run", tmp_path / "out")
