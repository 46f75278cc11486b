import json
import os

import pytest

from grpo.checkpoint.commit import read_manifest, seal
from grpo.errors import CheckpointError
from tests.checkpoint.test_checkpoints import folder
from tests.checkpoints import checkpoints, save


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path):
    writer = checkpoints(tmp_path)
    save(writer, 10)
    path = folder(tmp_path, "step_000010/manifest.json")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            read_manifest(writer.store, "step_000010")
    path.write_bytes(whole)
    assert writer.newest().step == 10


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "policy/../../out", "a//b", "a\\..\\b", "a\nb", "."])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    writer = checkpoints(tmp_path)
    save(writer, 10)
    path = folder(tmp_path, "step_000010/manifest.json")
    body = json.loads(path.read_text())
    del body["digest"]
    body["files"][0]["name"] = name
    path.write_bytes(seal(body))
    with pytest.raises(CheckpointError, match="relative"):
        writer.newest()


@pytest.mark.parametrize(
    "change",
    [
        {"step": 11},
        {"files": []},
        {"files": None},
        {"files": [{"name": "state.json"}]},
        {"files": [{"name": 1, "size": "1", "sha256": None}]},
        {"config": None},
    ],
)
def test_a_sealed_manifest_of_another_shape_is_refused(tmp_path, change):
    writer = checkpoints(tmp_path)
    save(writer, 10)
    path = folder(tmp_path, "step_000010/manifest.json")
    body = json.loads(path.read_text()) | change
    del body["digest"]
    path.write_bytes(seal(body))
    with pytest.raises(CheckpointError, match="manifest.json"):
        writer.newest()


def test_order_is_by_step_and_never_by_time(tmp_path):
    writer = checkpoints(tmp_path, keep=9)
    for step in (1, 2, 1000000):
        save(writer, step)
        for path in folder(tmp_path, f"step_{step:06d}").rglob("*"):
            os.utime(path, (1e9 - step, 1e9 - step))
    os.utime(folder(tmp_path, "step_1000000"), (0, 0))
    assert writer.newest().step == 1000000
