"""A saved policy of a run -> a Hugging Face folder of its own that transformers and vLLM load."""

import json
import re
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from grpo.errors import CheckpointError, ConfigError
from grpo.runfolder import POLICY


def export(run_dir: Path, out: Path, step: int | None = None) -> Path:
    """Copies the policy of `step`, or the newest one, to the new folder `out` and returns it.

    The copy appears whole or not at all. Raises ConfigError if `out` exists and CheckpointError if there is no such
    policy, if it is damaged, or if it cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"OUT: the folder must be new, but {out} exists; choose another or delete it")
    policy = find_policy(run_dir, step)
    check_policy(policy)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside its goal: a rename works only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            copy = shutil.copytree(policy, Path(scratch) / out.name)
            copy.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"OUT: {policy} must be copied to {out}, but: {error}; free space or choose another folder"
        ) from error
    return out


def find_policy(run_dir: Path, step: int | None = None) -> Path:
    """The folder `policy/step_000040` of a step, or of the newest one. Raises CheckpointError if there is none."""
    policies = {
        int(path.name.removeprefix("step_")): path
        for path in (run_dir / POLICY).glob("step_*")
        if path.is_dir() and re.fullmatch(r"step_[0-9]+", path.name)
    }
    if not policies:
        raise CheckpointError(
            f"a run to export must have saved a policy, but {run_dir / POLICY} holds none; let the run save one "
            "(checkpoint.every, and at its end) or give the run.dir of another run"
        )
    if step is None:
        return policies[max(policies)]
    if step not in policies:
        saved = ", ".join(str(step) for step in sorted(policies))
        raise CheckpointError(f"--step: step {step} must be a saved one, but {run_dir} holds {saved}; choose of them")
    return policies[step]


def check_policy(folder: Path) -> None:
    """Reads config.json and every safetensors header. Raises CheckpointError for what is missing or damaged."""
    config = _read_json(folder / "config.json")
    if "model_type" not in config:
        raise CheckpointError(f"{folder / 'config.json'}: must name a model_type, but does not; export another step")
    index = folder / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map", {}) if index.exists() else {}
    for name in sorted(set(weight_map.values())) or ["model.safetensors"]:
        missing = {tensor for tensor, file in weight_map.items() if file == name} - _tensor_names(folder / name)
        if missing:
            raise CheckpointError(f"{folder / name}: must hold {min(missing)}, but does not; export another step")


def _tensor_names(path: Path) -> set[str]:
    """The library compares the header with the size of the file, so that a cut file is found without reading it all."""
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: must be a whole safetensors file, but: {error}; export another step") from error


def _read_json(path: Path) -> dict[str, dict[str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: must be readable JSON, but: {error}; export another step") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be a JSON object, but is not; export another step")
    return content
