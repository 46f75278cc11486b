import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.checkpoint import Checkpoints
from grpo.checkpoint.commit import MANIFEST
from grpo.errors import CheckpointError, Fenced
from grpo.store import open_store
from tests.checkpoints import Held, checkpoints, config, save

POINTS = ["begin", "written", "manifest", "renamed", "pointer", "done"]
FILES = [
    "manifest.json",
    "state.json",
    "metrics.jsonl",
    "policy/config.json",
    "policy/model.safetensors",
    "optimizer-00000.safetensors",
    "optimizer-00001.safetensors",
    "rng-00000.json",
    "rng-00001.json",
]


def folder(run: Path, name: str = "") -> Path:
    return run / "checkpoints" / name


def listing(run: Path) -> list[str]:
    return sorted(path.name for path in folder(run).iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    run = tmp_path_factory.mktemp("template")
    for step in (10, 20):
        save(checkpoints(run), step)
    return run


@pytest.fixture
def two(template, tmp_path):
    """A run with whole checkpoints of the steps 10 and 20."""
    return shutil.copytree(template, tmp_path / "run")


def test_what_was_committed_is_read_back(tmp_path):
    made = save(checkpoints(tmp_path, attempt=3), 40, score=0.5)
    found = checkpoints(tmp_path, attempt=4).newest()
    assert found == made
    assert (found.step, found.attempt, found.score) == (40, 3, 0.5)
    assert found.folder == str(folder(tmp_path, "step_000040"))
    assert found.state == {"progress": {"step": 40, "prompts": {"fingerprint": "abc"}}}
    assert found.config == config(tmp_path).model_dump(mode="json")
    assert sorted(file.name for file in found.files) == sorted(set(FILES) - {MANIFEST})
    assert found.read("metrics.jsonl") == b'{"step": 40}\n'
    assert folder(tmp_path, "latest").read_text() == "step_000040"
    manifest = json.loads(folder(tmp_path, "step_000040/manifest.json").read_text())
    assert manifest["world_size"] == 1
    assert manifest["data_fingerprint"] == "abc"
    assert manifest["versions"]["grpo"] and manifest["versions"]["ray"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoints(tmp_path).newest() is None
    folder(tmp_path).mkdir()
    assert checkpoints(tmp_path).newest() is None


def test_a_score_that_is_not_finite_is_none(tmp_path):
    assert save(checkpoints(tmp_path), 1, score=float("nan")).score is None


def test_a_file_that_changed_later_is_not_read(tmp_path):
    made = save(checkpoints(tmp_path), 1)
    flip(folder(tmp_path, "step_000001/metrics.jsonl"))
    with pytest.raises(CheckpointError, match="metrics.jsonl"):
        made.read("metrics.jsonl")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_leads_to_the_checkpoint_before(two, name, damage):
    writer = checkpoints(two)
    DAMAGE[damage](folder(two, f"step_000020/{name}"))
    assert writer.newest().step == 10
    [(skipped, reason)] = writer.skipped
    assert skipped == "step_000020"
    assert f"step_000020/{name}" in reason
    if name != MANIFEST:
        word = {"flipped": "sha256", "cut": "bytes instead of", "deleted": "missing", "empty": "0 bytes instead"}
        assert word[damage] in reason


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_pointer_is_not_trusted(two, damage):
    writer = checkpoints(two)
    DAMAGE[damage](folder(two, "latest"))
    assert writer.newest().step == 20
    assert writer.skipped == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_none_whole_is_an_error_and_never_step_0(two, damage):
    writer = checkpoints(two)
    for name in ("step_000010/manifest.json", "step_000020/policy/model.safetensors"):
        DAMAGE[damage](folder(two, name))
    with pytest.raises(CheckpointError, match="step_000020/policy.*step_000010/manifest") as caught:
        writer.newest()
    assert caught.value.exit_code == 14


@pytest.mark.parametrize("lost", ["files", "folders"])
def test_lost_checkpoints_are_an_error(tmp_path, lost):
    writer = checkpoints(tmp_path)
    save(writer, 10)
    shutil.rmtree(folder(tmp_path, "step_000010"))
    if lost == "files":
        folder(tmp_path, "step_000010").mkdir()
        folder(tmp_path, "latest").unlink()
    with pytest.raises(CheckpointError, match="step 0"):
        writer.newest()


def test_a_file_that_is_not_listed_is_ignored(tmp_path):
    writer = checkpoints(tmp_path)
    save(writer, 10)
    folder(tmp_path, "step_000010/stranger.pkl").write_bytes(b"x")
    assert "stranger.pkl" not in [file.name for file in writer.newest().files]


def test_the_last_and_the_best_are_kept(tmp_path):
    writer = checkpoints(tmp_path, keep=2)
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.9), (5, 0.1), (6, 0.2), (7, 0.3)):
        save(writer, step, score)
    assert listing(tmp_path) == ["latest", "step_000004", "step_000006", "step_000007"]
    save(checkpoints(tmp_path, keep=1, keep_best=False), 8)
    assert listing(tmp_path) == ["latest", "step_000008"]


def test_the_older_one_stays_if_the_newer_does_not_verify(tmp_path, monkeypatch):
    writer = checkpoints(tmp_path, keep=1)
    save(writer, 1)
    rename = type(writer.store).rename

    def tear(store, old, new):
        flip(Path(store.path(old), "policy/model.safetensors"))
        rename(store, old, new)

    monkeypatch.setattr(type(writer.store), "rename", tear)
    with pytest.raises(CheckpointError, match="step_000002/policy/model.safetensors"):
        save(writer, 2)
    monkeypatch.undo()
    assert writer.newest().step == 1
    assert [name for name, _ in writer.skipped] == ["step_000002"]
    save(checkpoints(tmp_path, attempt=2, keep=1), 2)
    assert listing(tmp_path) == ["latest", "step_000002"]


def test_one_that_cannot_be_read_goes_when_enough_newer_ones_are_there(two):
    flip(folder(two, "step_000020/manifest.json"))
    writer = checkpoints(two, attempt=2)
    for step, left in ((30, (10, 20, 30)), (40, (30, 40))):
        save(writer, step)
        assert listing(two) == ["latest", *(f"step_{step:06d}" for step in left)]


def test_a_damaged_newer_one_does_not_count_as_kept(tmp_path):
    writer = checkpoints(tmp_path, keep=2)
    for step in (1, 2, 9):
        save(writer, step)
    flip(folder(tmp_path, "step_000009/state.json"))
    again = checkpoints(tmp_path, attempt=2, keep=2)
    assert again.newest().step == 2
    save(again, 3)
    assert listing(tmp_path) == ["latest", "step_000002", "step_000003", "step_000009"]
    save(again, 9)
    assert listing(tmp_path) == ["latest", "step_000003", "step_000009"]
    assert again.newest().attempt == 2


def test_leftovers_of_this_and_older_attempts_go_and_a_newer_ones_stays(tmp_path):
    save(checkpoints(tmp_path), 1)
    for name in ("step_000002.tmp-1", "step_000003.tmp-2", "step_000001.attempt-1.tmp-1", "step_000002.tmp-3"):
        folder(tmp_path, name).mkdir()
        folder(tmp_path, name).joinpath("x").write_text("x")
    folder(tmp_path, "mine").mkdir()
    checkpoints(tmp_path, attempt=2).begin(4)
    assert listing(tmp_path) == ["latest", "mine", "step_000001", "step_000002.tmp-3", "step_000004.tmp-2"]


def test_begin_gives_an_empty_folder_each_time(tmp_path):
    writer = checkpoints(tmp_path)
    Path(writer.begin(1), "x").write_text("x")
    assert list(Path(writer.begin(1)).iterdir()) == []


class Overtaken(Held):
    """Loses the lease at the n-th check."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.checks = checks

    def check(self) -> None:
        self.checks -= 1
        if self.checks < 0:
            raise Fenced("run.dir: overtaken; let the newer one run")


def test_an_overtaken_writer_commits_nothing(tmp_path):
    save(checkpoints(tmp_path), 1)
    for checks in range(3):  # begin, before the manifest, before the rename
        writer = Checkpoints(config(tmp_path), tmp_path, Overtaken(checks))
        with pytest.raises(Fenced):
            save(writer, 2)
        assert (folder(tmp_path, "step_000002.tmp-1/manifest.json").exists()) == (checks == 2)
        assert checkpoints(tmp_path).newest().step == 1
        assert folder(tmp_path, "latest").read_text() == "step_000001"


def test_an_overtaken_writer_removes_nothing(tmp_path):
    save(checkpoints(tmp_path, keep=1), 1)
    with pytest.raises(Fenced):
        save(Checkpoints(config(tmp_path, keep=1), tmp_path, Overtaken(3)), 2)
    assert listing(tmp_path) == ["latest", "step_000001", "step_000002"]


def test_an_overtaken_writer_whose_folder_is_gone_is_fenced(tmp_path):
    old = Checkpoints(config(tmp_path), tmp_path, Overtaken(2))
    old.begin(2)
    checkpoints(tmp_path, attempt=2).begin(2)
    with pytest.raises(Fenced):
        old.commit(2, [], {}, None, {})


def run(tmp_path: Path, attempt: int, *steps: int, faults: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"GRPO_FAULTS": faults, "GRPO_FAULT_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.checkpoints", str(tmp_path / "run"), str(attempt), *map(str, steps)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_this_checkpoint_or_the_one_before(tmp_path, point):
    assert run(tmp_path, 1, 10, 20, faults=f"save.{point}@20:kill").returncode == -9
    after = checkpoints(tmp_path / "run", attempt=2)
    assert after.newest().step == (20 if point in ("renamed", "pointer", "done") else 10)
    assert after.skipped == []
    for step in (20, 30):
        assert save(after, step).attempt == 2
    assert after.newest().step == 30
    assert listing(tmp_path / "run") == ["latest", "step_000020", "step_000030"]


@pytest.mark.parametrize("point", POINTS)
def test_a_disk_that_fails_at_any_point_is_a_typed_error_and_the_one_before_is_whole(tmp_path, monkeypatch, point):
    monkeypatch.setenv("GRPO_FAULTS", f"save.{point}@20:raise")
    monkeypatch.setenv("GRPO_FAULT_DIR", str(tmp_path))
    writer = checkpoints(tmp_path)
    save(writer, 10)
    with pytest.raises(CheckpointError, match="step 20"):
        save(writer, 20)
    assert writer.newest().step == (20 if point in ("renamed", "pointer", "done") else 10)
    assert save(writer, 20).step == 20
    assert listing(tmp_path) == ["latest", "step_000010", "step_000020", "struck-save." + point + "@20_raise"][:3]


def test_a_kill_while_a_taken_name_is_replaced(tmp_path, monkeypatch):
    """The folder that stood there was moved aside, ours is not in its place yet: what stood there still counts."""
    save(checkpoints(tmp_path), 10)
    writer = checkpoints(tmp_path, attempt=2)
    rename = type(writer.store).rename

    def stop(store, old, new):
        if ".tmp-" in old:
            raise OSError(errno.EIO, "killed")
        rename(store, old, new)

    monkeypatch.setattr(type(writer.store), "rename", stop)
    with pytest.raises(CheckpointError):
        save(writer, 10)
    monkeypatch.undo()
    assert listing(tmp_path) == ["latest", "step_000010.attempt-1", "step_000010.tmp-2"]
    assert checkpoints(tmp_path, attempt=3).newest().attempt == 1
    assert save(checkpoints(tmp_path, attempt=3), 10).attempt == 3
    assert listing(tmp_path) == ["latest", "step_000010"]


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]).returncode:
        pytest.skip("this container may not mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk(small_disk):
    writer = checkpoints(small_disk)
    save(writer, 10)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 1024)
    with pytest.raises(CheckpointError, match=r"0 bytes are free, at least \d+ are needed"):
        save(writer, 20)
    filler.unlink()
    assert writer.newest().step == 10
    assert save(writer, 20).step == 20


def test_a_full_disk_during_the_writing_of_a_rank(small_disk):
    store = open_store(checkpoints(small_disk).begin(10))
    message = r"0 bytes are free, at least \d{5,} are needed"
    with (
        pytest.raises(CheckpointError, match=message),
        store.workspace("") as work,
        (work / "optimizer").open("wb", buffering=0) as file,
    ):
        while True:
            file.write(b"x" * 1024)
    assert list(Path(store.url).iterdir()) == []


def test_a_file_size_limit_without_root(tmp_path):
    program = (
        "import resource, signal, sys; from pathlib import Path; from tests.checkpoints import checkpoints, save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); writer = checkpoints(Path(sys.argv[1])); save(writer, 10)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); save(writer, 20)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert "CheckpointError" in result.stderr and "are needed" in result.stderr
    assert checkpoints(tmp_path).newest().step == 10


def test_pruning_takes_a_link_away_and_not_what_it_points_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for step in (1, 2):
        save(checkpoints(tmp_path, keep=1), step)
        if step == 1:
            folder(tmp_path, "step_000001").rename(elsewhere)
            folder(tmp_path, "step_000001").symlink_to(elsewhere)
    assert not os.path.lexists(folder(tmp_path, "step_000001"))
    assert {"manifest.json", "state.json", "policy"} <= set(os.listdir(elsewhere))
    assert os.listdir(elsewhere / "policy")


@pytest.mark.parametrize("name", ["step_000009.tmp-1", "step_000001.tmp-1"])
def test_a_link_that_looks_like_a_leftover_goes_alone(tmp_path, name):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "manifest.json").write_text("kept")
    folder(tmp_path, "").mkdir()
    folder(tmp_path, name).symlink_to(kept)
    save(checkpoints(tmp_path), 1)
    assert (kept / "manifest.json").read_text() == "kept"
    assert not folder(tmp_path, name).is_symlink()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "policy/model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_damages_the_checkpoint_and_keeps_nobody_waiting(tmp_path, name, make):
    for step in (1, 2):
        save(checkpoints(tmp_path), step)
    folder(tmp_path, f"step_000002/{name}").unlink()
    make(folder(tmp_path, f"step_000002/{name}"))
    reader = checkpoints(tmp_path)
    assert reader.newest().step == 1
    assert [skipped for skipped, _ in reader.skipped] == ["step_000002"]


def test_a_file_that_was_blown_up_is_not_read_to_its_end(tmp_path):
    save(checkpoints(tmp_path), 1)
    os.truncate(folder(tmp_path, "step_000001/policy/model.safetensors"), 1 << 40)
    with pytest.raises(CheckpointError, match=f"has {1 << 40} bytes instead of 100"):
        checkpoints(tmp_path).newest()
