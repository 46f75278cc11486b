"""`grpo fetch`: whole or absent, verified, once."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from grpo.checkpoint import results
from grpo.config import Config
from grpo.errors import ConfigError, DiskError, StoreLost
from grpo.store import fetch as module
from grpo.store.fetch import MANIFEST, Item, fetch, items_of
from grpo.store.origins import BucketOrigin, Entry, open_origin
from tests.store.hub import COMMIT, hub

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(5000), "sub/more.txt": b"more"}


class Shelf:
    """An origin in memory; `broken` gets lose their way, `spoiled` ones bring other bytes, each once."""

    url = "s3://shelf/x"

    def __init__(self, files: dict[str, bytes] | None = None, digests: bool = True) -> None:
        self.files, self.digests = dict(FILES if files is None else files), digests
        self.broken: list[str] = []
        self.spoiled: list[str] = []
        self.got: list[str] = []
        self.after: dict[str, bytes] = {}
        self.barrier: threading.Barrier | None = None
        self.slow: threading.Event | None = None

    def entries(self) -> list[Entry]:
        return [
            Entry(
                name,
                len(data),
                f"sha256:{hashlib.sha256(data).hexdigest()}" if self.digests else "",
                hashlib.md5(data).hexdigest(),
            )
            for name, data in sorted(self.files.items())
        ]

    def get(self, entry: Entry, folder: Path) -> None:
        self.got.append(entry.name)
        if self.slow:
            self.slow.wait(10)
        if self.barrier:
            self.barrier.wait(10)
        goal = folder / entry.name
        goal.parent.mkdir(parents=True, exist_ok=True)
        data = self.files[entry.name]
        if entry.name in self.broken:
            self.broken.remove(entry.name)
            goal.write_bytes(data[: len(data) // 2])
            raise StoreLost("broke off")
        if entry.name in self.spoiled:
            self.spoiled.remove(entry.name)
            data = bytes(len(data))
        goal.write_bytes(data)
        self.files |= self.after


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


def bring(shelf: Shelf, folder: Path, *include: str) -> list[str]:
    said: list[str] = []
    fetch(Item(url=shelf.url, folder=str(folder), include=include), said.append, lambda url: shelf)
    return said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name != MANIFEST}


def test_a_folder_comes_whole_and_once(tmp_path):
    shelf = Shelf()
    said = bring(shelf, tmp_path / "cache" / "model")
    assert tree(tmp_path / "cache" / "model") == FILES
    assert names(tmp_path / "cache") == ["model"]
    assert said[0].startswith("fetch: 3 files, 5,006 bytes of s3://shelf/x") and said[-1].endswith(
        "whole: 3 files, 5,006 bytes"
    )
    manifest = json.loads((tmp_path / "cache" / "model" / MANIFEST).read_text())
    assert {one["name"]: one["sha256"] for one in manifest["files"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }
    shelf.got.clear()
    assert "is there" in bring(shelf, tmp_path / "cache" / "model")[0] and shelf.got == []


def test_patterns(tmp_path):
    bring(Shelf(), tmp_path / "m", "*.json", "sub/*")
    assert sorted(tree(tmp_path / "m")) == ["config.json", "sub/more.txt"]
    with pytest.raises(ConfigError, match="no file of 3 matches \\*.parquet; the first is config.json"):
        bring(Shelf(), tmp_path / "n", "*.parquet")
    with pytest.raises(ConfigError, match="holds s3://shelf/x"):
        bring(Shelf(), tmp_path / "m")


@pytest.mark.parametrize("fault", ["broken", "spoiled"])
def test_a_transfer_that_fails_is_made_again(tmp_path, fault):
    shelf = Shelf()
    setattr(shelf, fault, ["model.safetensors"] * 3)
    bring(shelf, tmp_path / "m")
    assert tree(tmp_path / "m") == FILES and shelf.got.count("model.safetensors") == 4


@pytest.mark.parametrize("fault", ["broken", "spoiled"])
def test_a_half_one_never_counts_and_the_next_start_goes_on(tmp_path, fault):
    shelf = Shelf()
    setattr(shelf, fault, ["model.safetensors"] * module.ATTEMPTS)
    with pytest.raises(StoreLost):
        bring(shelf, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    shelf.got.clear()
    bring(shelf, tmp_path / "m")
    assert tree(tmp_path / "m") == FILES and names(tmp_path) == ["m"]
    assert "config.json" not in shelf.got


def test_what_changes_meanwhile_is_refused_and_not_mixed(tmp_path):
    shelf = Shelf(digests=False)
    shelf.after = {"config.json": b"[]"}
    with pytest.raises(StoreLost, match="has changed while it was read"):
        bring(shelf, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    shelf.after = {}
    bring(shelf, tmp_path / "m")
    assert tree(tmp_path / "m")["config.json"] == b"[]"


def test_a_damaged_folder_is_fetched_again_and_a_foreign_one_refused(tmp_path):
    bring(Shelf(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut")
    assert "was not whole" in " ".join(bring(Shelf(), tmp_path / "m"))
    assert tree(tmp_path / "m") == FILES
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    with pytest.raises(ConfigError, match="not by `grpo fetch`"):
        bring(Shelf(), tmp_path / "mine")
    assert tree(tmp_path / "mine") == {"x": b"x"}


def test_two_at_a_time_fetch_once(tmp_path):
    shelf = Shelf({"a": b"1" * 100})
    shelf.slow = threading.Event()
    errors: list[Exception] = []

    def one() -> None:
        try:
            bring(shelf, tmp_path / "m")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(2)]
    [thread.start() for thread in threads]
    shelf.slow.wait(0.1)
    shelf.slow.set()
    [thread.join() for thread in threads]
    assert errors == [] and tree(tmp_path / "m") == {"a": b"1" * 100} and names(tmp_path) == ["m"]
    assert shelf.got == ["a"]


def test_without_locks_two_at_a_time_do_no_harm_either(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    shelf = Shelf()
    shelf.barrier = threading.Barrier(2)
    shelf.files = {"a": b"1" * 100}
    threads = [threading.Thread(target=bring, args=(shelf, tmp_path / "m")) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert tree(tmp_path / "m") == {"a": b"1" * 100} and shelf.got == ["a", "a"]
    shelf.barrier = None
    bring(shelf, tmp_path / "m")


def test_who_waits_for_another_start_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.store.turns.STALLED", 0.0)
    with open(tmp_path / ".m.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreLost, match="another start fetches it, but nothing has come for"):
            bring(Shelf(), tmp_path / "m")


def test_a_volume_without_room_is_named_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(DiskError, match="needs 5,006 bytes more, but 100 are free"):
        bring(Shelf(), tmp_path / "m")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("hf://owner/name", "with the commit's 40 hex digits"),
        ("hf://owner/name@main", "with the commit's 40 hex digits"),
        ("hf://a/b/c@" + "0" * 40, "must be hf://owner/name@commit"),
        ("s3://key:secret@bucket/x", "without credentials"),
        ("s3://bucket/../x?y", "plain names"),
        ("s3://B/x", "plain names"),
        ("https://example.com/x", "plain names"),
        ("", "plain names"),
    ],
)
def test_urls_that_name_nothing(url, sentence):
    with pytest.raises(ConfigError, match=sentence) as refused:
        open_origin(url)
    assert "secret" not in str(refused.value)


def test_what_the_command_line_asks_for(tmp_path):
    assert items_of("s3://b/x", Path("out"), ["*.json"]) == [Item(url="s3://b/x", folder="out", include=("*.json",))]
    listed = tmp_path / "fetch.yaml"
    listed.write_text(yaml.safe_dump({"fetch": [{"url": "s3://b/x", "folder": "/m", "include": []}]}))
    assert items_of(str(listed), None, []) == [Item(url="s3://b/x", folder="/m")]
    with pytest.raises(ConfigError, match="grpo fetch s3://b/x OUT"):
        items_of("s3://b/x", None, [])
    for text in ("fetch: 3", "[]", "fetch: [{url: x}]", "{", "fetch: [{url: x, folder: y, more: z}]"):
        listed.write_text(text)
        with pytest.raises(ConfigError, match="a file with a list `fetch`"):
            items_of(str(listed), None, [])


def on_the_hub(url: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    known = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    known |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(root)}
    code = "import sys; from grpo.cli import main; main()"
    command = [sys.executable, "-c", code, "fetch", url, str(folder)]
    return subprocess.run(command, env=known | environ, capture_output=True, text=True, timeout=120, cwd=root)


def test_a_model_of_the_hub_at_its_commit(tmp_path):
    files = FILES | {".gitattributes": b"x", "pytorch_model.bin": b"copy", "original/params.pth": b"copy"}
    with hub("owner/name", files, {"model.safetensors"}) as server:
        server.spoiled = {"model.safetensors"}
        done = on_the_hub(f"hf://owner/name@{COMMIT}", tmp_path / "m", HF_ENDPOINT=server.url)
        assert done.returncode == 0, done.stderr
        assert tree(tmp_path / "m") == FILES
        assert sorted(server.sent) == ["config.json", "model.safetensors", "model.safetensors", "sub/more.txt"]
        other = on_the_hub(f"hf://owner/name@{'f' * 40}", tmp_path / "n", HF_ENDPOINT=server.url)
        assert other.returncode == 2 and "no such repository, commit or file" in other.stderr, other.stderr
        assert "Traceback" not in other.stderr and not (tmp_path / "n").exists()


def test_a_data_set_of_the_hub_and_an_offline_shell(tmp_path):
    with hub("datasets/owner/rows", {"train.jsonl": b"{}\n", "README.md": b"#"}) as server:
        url = f"hf://datasets/owner/rows@{COMMIT}"
        refused = on_the_hub(url, tmp_path / "d", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")
        assert refused.returncode == 2 and "HF_HUB_OFFLINE forbids to fetch it" in refused.stderr, refused.stderr
        done = on_the_hub(url, tmp_path / "d", HF_ENDPOINT=server.url)
        assert done.returncode == 0, done.stderr
        assert sorted(tree(tmp_path / "d")) == ["README.md", "train.jsonl"]


@pytest.mark.slow
def test_a_bucket(client, server, tmp_path):
    for name, data in FILES.items():
        client.put_object(Bucket="models", Key=f"base/x/{name}", Body=data)
    client.put_object(Bucket="models", Key="base/xylophone/config.json", Body=b"other")
    client.put_object(Bucket="models", Key="base/rows.jsonl", Body=b"{}\n")
    client.put_object(Bucket="models", Key="base/x/", Body=b"")  # what consoles make of a folder
    server.times(2, "cut", "GET", "model.safetensors")
    fetch(Item(url="s3://models/base/x", folder=str(tmp_path / "m")))
    assert tree(tmp_path / "m") == FILES
    fetch(Item(url="s3://models/base/rows.jsonl", folder=str(tmp_path / "rows")))
    assert tree(tmp_path / "rows") == {"rows.jsonl": b"{}\n"}
    with pytest.raises(ConfigError, match="must hold files, but there are none"):
        fetch(Item(url="s3://models/base/nothing", folder=str(tmp_path / "n")))
    with pytest.raises(ConfigError, match="no such bucket|may not be read"):
        BucketOrigin("s3://absent-bucket/x").entries()


@pytest.mark.slow
def test_results_in_a_bucket_are_replaced_as_a_whole(client, tmp_path, monkeypatch):
    for name in ("report.html", "metrics.jsonl"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(
        results, "export", lambda run, out, part: (out.mkdir(), (out / "model.safetensors").write_bytes(b"w"))
    )
    config = Config.model_validate({"model": {"path": "/m"}, "run": {"name": "mine", "results": "s3://models/results"}})
    assert results.deliver(config, tmp_path) == "s3://models/results/mine"
    client.put_object(Bucket="models", Key="results/mine/policy/old-shard", Body=b"x")
    results.deliver(config, tmp_path)
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="models")["Contents"]]
    names = ["manifest.json", "metrics.jsonl", "policy/model.safetensors", "report.html"]
    assert keys == [f"results/mine/{name}" for name in names]
