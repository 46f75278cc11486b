import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo.checkpoint import Checkpoints
from grpo.checkpoint.export import check_policy, export, policy_of
from grpo.config.load import dump_config
from grpo.errors import CheckpointError, ConfigError
from grpo.store import open_store
from tests.checkpoints import Held
from tests.checkpoints import config as make_config


def make_policy(folder, value):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": np.full(4, value, np.float32)}, folder / "model.safetensors")


def save_policy(run_dir, step, change=lambda policy: None, directory=None):
    """Commits a checkpoint whose policy was changed before; returns the folder of the policy."""
    run_dir.mkdir(exist_ok=True)
    config = make_config(run_dir, dir=directory, keep=9)
    (run_dir / "config.yaml").write_text(dump_config(config))
    writer = Checkpoints(config, run_dir, Held())
    store = open_store(writer.begin(step))
    with store.workspace("") as work:
        make_policy(work / "policy", step)
        change(work / "policy")
        (work / "trainer.json").write_text("{}")
        records = store.publish(work, "")
    return Path(writer.commit(step, records, {}, None, {}).folder, "policy")


def shard(folder):
    """The same policy in two files with an index, as large ones are saved."""
    (folder / "model.safetensors").unlink()
    for number, name in enumerate("ab", start=1):
        save_file({name: np.ones(2, np.float32)}, folder / f"model-0000{number}-of-00002.safetensors")
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate("ab", start=1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_the_newest_policy_is_copied(tmp_path):
    for step in (5, 40, 100000):
        save_policy(tmp_path / "run", step)
    (tmp_path / "run/checkpoints/step_200000.tmp-1").mkdir()
    out = export(tmp_path / "run", tmp_path / "new/out")
    assert out == tmp_path / "new/out"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_file(out / "model.safetensors")["w"].tolist() == [100000.0] * 4
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing else may be left"


def test_a_step_can_be_chosen(tmp_path):
    for step in (5, 40):
        save_policy(tmp_path / "run", step)
    export(tmp_path / "run", tmp_path / "out", step=5)
    assert load_file(tmp_path / "out/model.safetensors")["w"][0] == 5.0


def test_a_sharded_policy(tmp_path):
    save_policy(tmp_path / "run", 5, shard)
    export(tmp_path / "run", tmp_path / "out")
    assert load_file(tmp_path / "out/model-00002-of-00002.safetensors")["b"].tolist() == [1.0, 1.0]


def test_an_unknown_step_lists_those_there_are(tmp_path):
    for step in (40, 5):
        save_policy(tmp_path / "run", step)
    with pytest.raises(CheckpointError, match="step 6 .*holds 5, 40"):
        export(tmp_path / "run", tmp_path / "out", step=6)


def test_a_run_without_a_policy(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("checkpoint:")
    with pytest.raises(CheckpointError, match="checkpoint.every"):
        export(tmp_path / "run", tmp_path / "out")


def test_a_folder_that_holds_no_run(tmp_path):
    with pytest.raises(ConfigError, match="config.yaml"):
        export(tmp_path, tmp_path / "out")


def test_checkpoints_that_are_elsewhere(tmp_path):
    save_policy(tmp_path / "run", 5, directory=str(tmp_path / "elsewhere"))
    assert not (tmp_path / "run/checkpoints").exists()
    assert check_policy(export(tmp_path / "run", tmp_path / "out")) is None


def test_a_checkpoint_that_is_no_model_path_of_this_machine(tmp_path, monkeypatch):
    """The run's configuration may name a model that only its own machine has."""
    save_policy(tmp_path / "run", 5)
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("path: /model", "path: models/gone"))
    monkeypatch.chdir(tmp_path)
    export(Path("run"), Path("out"))


@pytest.mark.parametrize("make", ["folder", "file", "dangling link"])
def test_an_existing_goal_is_refused(tmp_path, make):
    save_policy(tmp_path / "run", 5)
    out = tmp_path / "out"
    if make == "folder":
        out.mkdir()
    elif make == "file":
        out.write_text("kept")
    else:
        out.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="OUT.*exists"):
        export(tmp_path / "run", out)


def cut_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def zero_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\x00" * 16 + data[16:])


def lose_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_a_tensor(folder):
    shard(folder)
    save_file({"other": np.ones(2, np.float32)}, folder / "model-00002-of-00002.safetensors")


DAMAGE = [
    (cut_weights, "model.safetensors"),
    (zero_header, "model.safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    (lose_a_shard, "model-00002-of-00002"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
]
WRONG = [
    *DAMAGE,
    (lose_a_tensor, "must hold b"),
    (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
]


@pytest.mark.parametrize(("change", "what"), WRONG)
def test_a_policy_that_was_saved_wrong_is_named_and_nothing_is_written(tmp_path, change, what):
    save_policy(tmp_path / "run", 5, change)
    with pytest.raises(CheckpointError, match=what):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("damage", "what"), [case for case in DAMAGE if case[0] is not lose_a_shard])
def test_a_policy_that_was_damaged_is_named_and_nothing_is_written(tmp_path, damage, what):
    policy = save_policy(tmp_path / "run", 5)
    damage(policy)
    with pytest.raises(CheckpointError, match=what):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_one_bit_of_a_weight_is_found(tmp_path):
    """The header and the size are right, so that no library would see it."""
    path = save_policy(tmp_path / "run", 5) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    check_policy(path.parent)
    with pytest.raises(CheckpointError, match="model.safetensors.*manifest"):
        export(tmp_path / "run", tmp_path / "out")


def test_what_is_no_policy_is_not_exported(tmp_path):
    policy = save_policy(tmp_path / "run", 5)
    (policy / "stranger.bin").write_text("not in the manifest")
    out = export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    save_policy(tmp_path / "run", 5)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo.checkpoint.export.shutil.copyfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_transformers_loads_an_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    save_policy(tmp_path / "run", 1, model.save_pretrained)
    export(tmp_path / "run", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    input_ids_BT = torch.arange(8)[None]
    assert torch.equal(loaded(input_ids_BT).logits, model(input_ids_BT).logits)


@pytest.mark.parametrize("out", ["run/checkpoints/step_000099", "link/new", "run/../run/checkpoints/x"])
def test_the_checkpoints_of_the_run_are_no_place_for_an_export(tmp_path, out):
    save_policy(tmp_path / "run", 5)
    (tmp_path / "link").symlink_to(tmp_path / "run/checkpoints")
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match="^OUT: "):
        export(tmp_path / "run", tmp_path / out)
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("out", ["loop/x", "link/", "link/."])
def test_a_link_or_a_loop_is_no_new_folder(tmp_path, out):
    save_policy(tmp_path / "run", 5)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises((ConfigError, CheckpointError), match="^OUT: "):
        export(tmp_path / "run", tmp_path / out)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_another_size_or_a_pipe_is_not_copied(tmp_path, name):
    policy = save_policy(tmp_path / "run", 5)
    os.truncate(policy / name, 1 << 40)
    with pytest.raises(CheckpointError, match="must have the bytes that its manifest says"):
        export(tmp_path / "run", tmp_path / "out")
    (policy / name).unlink()
    os.mkfifo(policy / name)
    with pytest.raises(CheckpointError, match=name):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000], ids=["name", "path"])
def test_what_is_too_long_for_a_folder_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="must be the folder of a run or of a model"):
        policy_of(tmp_path / name)
    save_policy(tmp_path / "run", 1)
    with pytest.raises(CheckpointError, match="OUT: .* too long"):
        export(tmp_path / "run", tmp_path / name)


def test_the_policy_of_a_model_a_warm_up_and_a_run(tmp_path):
    policy = save_policy(tmp_path / "run", 3)
    assert policy_of(tmp_path / "run") == policy == policy_of(policy)
    make_policy(tmp_path / "sft" / "policy", 1)
    assert policy_of(tmp_path / "sft") == tmp_path / "sft" / "policy"


def adapter(policy):
    """Beside the policy, as a run with train.lora saves it."""
    folder = policy.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": np.ones(2, np.float32)}, folder / "adapter_model.safetensors")


def alone(policy):
    adapter(policy)
    for path in policy.iterdir():
        path.unlink()
    policy.rmdir()


def test_an_adapter_is_copied_alone_or_its_policy_merged(tmp_path):
    save_policy(tmp_path / "run", 1, adapter)
    out = export(tmp_path / "run", tmp_path / "out", part="adapter")
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_file(export(tmp_path / "run", tmp_path / "policy") / "model.safetensors")["w"].tolist() == [1.0] * 4


def test_what_a_checkpoint_does_not_hold_is_not_exported(tmp_path):
    save_policy(tmp_path / "whole", 1)
    with pytest.raises(CheckpointError, match="only a run with train.lora has an adapter"):
        export(tmp_path / "whole", tmp_path / "out", part="adapter")
    save_policy(tmp_path / "alone", 1, alone)
    for take in (lambda: export(tmp_path / "alone", tmp_path / "out"), lambda: policy_of(tmp_path / "alone")):
        with pytest.raises(CheckpointError, match=r"checkpoint.merged: false.*--adapter"):
            take()
    assert not (tmp_path / "out").exists()
