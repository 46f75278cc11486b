"""The policy of a checkpoint -> a Hugging Face folder of its own that transformers and vLLM load."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from grpo.checkpoint.commit import ADAPTER, POLICY, checkpoints_url, committed, order, read_manifest
from grpo.config.yaml import read
from grpo.errors import CheckpointError, ConfigError
from grpo.run.layout import CONFIG
from grpo.store import MOST_READ, Store, open_store, record_of
from grpo.store.files import read_regular
from grpo.types import FileRecord


class PartMissing(CheckpointError):
    """A checkpoint without the part that is asked for: no second try finds it."""


def export(run_dir: Path, out: Path, step: int | None = None, part: str = POLICY) -> Path:
    """Copies the policy of the checkpoint of `step`, or of the newest one, to the new folder `out` and returns it.

    `part` is what of it: POLICY, whole and merged, or ADAPTER, as PEFT's folder.

    The copy appears whole or not at all, and every byte is as the checkpoint's manifest says. Raises ConfigError if
    `out` exists, CheckpointError if there is no such policy, if it is damaged, or if it cannot be written, StoreLost if
    the bucket that holds it does not answer.
    """
    if os.path.lexists(out):
        raise ConfigError(f"OUT: the folder must be new, but {out} exists; choose another or delete it")
    store = open_store(checkpoints_url(checkpoint_dir(run_dir), run_dir))
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(store.url)):
        raise ConfigError(f"OUT: must lie outside of the run's checkpoints, but is {out}; choose another folder")
    name = find_checkpoint(store, step)
    files = [
        replace(file, name=f"{name}/{file.name}")
        for file in read_manifest(store, name).files
        if file.name.startswith(f"{part}/")
    ]
    if not files:
        raise PartMissing(lacks(name, part))
    with store.fetch("", [file.name for file in files]) as source, _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside its goal: a rename works only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            copy = Path(scratch, out.name)
            for file in files:
                _copy(source, file, copy / file.name.removeprefix(f"{name}/{part}/"))
            (check_policy if part == POLICY else check_adapter)(copy)
            copy.rename(out)
    return out


def policy_of(path: Path) -> Path:
    """The folder of the policy that a path means: of a model, of a warm-up's result, or of a run's newest checkpoint.

    Raises ConfigError for what is none of these, CheckpointError for a run without a whole checkpoint.
    """
    for folder in (path, path / POLICY):
        if os.path.isfile(folder / "config.json"):  # Path.is_file raises for a name that is too long or closed to us
            return folder
    if not os.path.isfile(path / CONFIG):
        raise ConfigError(f"{path}: must be the folder of a run or of a model (config.json), but is none; correct it")
    store = open_store(checkpoints_url(checkpoint_dir(path), path))
    if not store.renames:
        raise ConfigError(
            f"{path}: a policy is loaded from a folder, but its checkpoints lie in {store.url}; copy one with "
            f"`grpo export {path} OUT` and give OUT"
        )
    name = find_checkpoint(store)
    folder = Path(store.path(name), POLICY)
    if not folder.exists():
        raise PartMissing(lacks(name, POLICY))
    check_policy(folder)
    return folder


def checkpoint_dir(run_dir: Path) -> str | None:
    """`checkpoint.dir` of the run. Nothing else of its configuration counts here, least of all what it would start."""
    section = read(run_dir / CONFIG).get("checkpoint")
    directory = section.get("dir") if isinstance(section, dict) else None
    if directory is not None and not isinstance(directory, str):
        raise ConfigError(f"{run_dir / CONFIG}: checkpoint.dir must be text, but is none; correct it")
    return directory or None


def find_checkpoint(store: Store, step: int | None = None) -> str:
    """Name of the checkpoint of a step, or of the newest one. Raises CheckpointError if there is none."""
    names = {order(name)[0]: name for name in committed(store)}
    if not names:
        raise CheckpointError(
            f"a run to export must have saved a checkpoint, but {store.url} holds none; let the run save one "
            "(checkpoint.every, and at its end) or give the run.dir of another run"
        )
    if step is not None and step not in names:
        saved = ", ".join(map(str, sorted(names)))
        raise CheckpointError(f"--step: step {step} must be a saved one, but {store.url} holds {saved}; choose of them")
    return names[max(names) if step is None else step]


def _copy(source: Path, file: FileRecord, goal: Path) -> None:
    goal.parent.mkdir(parents=True, exist_ok=True)
    whole = (source / file.name).stat().st_size == file.size
    if whole:  # else it may be of any size
        shutil.copyfile(source / file.name, goal)
    if not whole or record_of(goal, file.name) != file:
        raise CheckpointError(
            f"{file.name}: must have the bytes that its manifest says, but has not; export another step"
        )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"OUT: the policy must be copied to {out}, but: {error}; free space or choose another folder"
        ) from error


def check_policy(folder: Path) -> None:
    """Reads config.json and every safetensors header. Raises CheckpointError for what is missing or damaged."""
    config = _read_json(folder / "config.json")
    if "model_type" not in config:
        raise CheckpointError("config.json: must name a model_type, but does not; export another step")
    index = folder / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map", {}) if index.exists() else {}
    for name in sorted(set(weight_map.values())) or ["model.safetensors"]:
        missing = {tensor for tensor, file in weight_map.items() if file == name} - _tensor_names(folder / name)
        if missing:
            raise CheckpointError(f"{name}: must hold {min(missing)}, but does not; export another step")


def check_adapter(folder: Path) -> None:
    """Reads adapter_config.json and the safetensors header. Raises CheckpointError for what is missing or damaged."""
    if "peft_type" not in _read_json(folder / "adapter_config.json"):
        raise CheckpointError("adapter_config.json: must name a peft_type, but does not; export another step")
    _tensor_names(folder / "adapter_model.safetensors")


def lacks(name: str, part: str) -> str:
    """Why a checkpoint has nothing of a kind, and the way out."""
    if part == ADAPTER:
        return f"only a run with train.lora has an adapter, but {name} holds none; leave --adapter out"
    return (
        f"{name}: holds no whole policy, as its run keeps the adapter alone (checkpoint.merged: false); export it with "
        "--adapter, or let the run go on for a step with checkpoint.merged=true"
    )


def _tensor_names(path: Path) -> set[str]:
    """The library compares the header with the size of the file, so that a cut file is found without reading it all."""
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.name}: must be a whole safetensors file, but: {error}; export another step"
        ) from error


def _read_json(path: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(read_regular(path, MOST_READ))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: must be readable JSON, but: {error}; export another step") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: must be a JSON object, but is not; export another step")
    return content
