"""Whether a model can be loaded from here: the files of a folder, or what is known of one on the hub."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from grpo.config import Config
from grpo.config.architecture import check_model_config
from grpo.config.paths import is_hub_model
from grpo.config.snapshot import WEIGHTS
from grpo.config.text import first_line
from grpo.data.generation import load_generation_config
from grpo.errors import ConfigError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelFiles:
    """`problem` is "" if nothing is known to be wrong; `identity` is the same where the files are."""

    found: str
    problem: str = ""
    identity: str = ""
    cached: bool = True
    """False for a model on the hub that has to be downloaded."""


def look_at_model(config: Config, weights: bool = True) -> ModelFiles:
    """The model as it is seen from here; without `weights` only what the tokenizer needs."""
    path = config.model.path
    if is_hub_model(path):
        return _look_at_cache(config)
    folder = Path(path)
    if problem := unusable(config):
        return ModelFiles(f"{path} in {os.getcwd()}", problem)
    try:
        settings = (folder / "config.json").read_bytes()
        sizes = [(name, (folder / name).stat().st_size) for name in _weights(folder)] if weights else []
    except (OSError, ValueError, KeyError) as error:
        return ModelFiles(f"{path} in {os.getcwd()}", f"cannot be read: {first_line(error)}")
    if weights and not sizes:
        return ModelFiles(path, f"has no weights ({' or '.join(WEIGHTS)})")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return ModelFiles(path, f"has no tokenizer ({TOKENIZERS[0]})")
    if not weights:
        return ModelFiles(f"{path}: configuration and tokenizer")
    digest = hashlib.sha256(json.dumps([sizes, settings.hex()]).encode()).hexdigest()
    return ModelFiles(f"{path}: {len(sizes)} files of weights, {sum(size for _, size in sizes):,} bytes", "", digest)


def _weights(folder: Path) -> list[str]:
    """Names of the files with weights that will be read: those of an index, whether they are there or not."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            whole = not name.endswith(".json")
            return [name] if whole else sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
    return []


def unusable(config: Config, device: str | None = None) -> str:
    """What config.json says against the model in this run, or ""; with the device, generation_config.json too."""
    try:
        check_model_config(config, device)
        if device is not None:  # it loads torch, so not on every node
            load_generation_config(config)
    except ConfigError as error:
        return str(error)
    return ""


def _look_at_cache(config: Config) -> ModelFiles:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    path, revision = config.model.path, config.model.revision
    cached = isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str)
    name = f"{path} at {(revision or 'main')[:12]} on the hub"
    if not cached and HF_HUB_OFFLINE:
        return ModelFiles(name, "is not in the cache, and HF_HUB_OFFLINE forbids to load it", cached=False)
    problem = unusable(config) if cached else ""
    return ModelFiles(f"{name}, {'in the cache' if cached else 'to be downloaded'}", problem, cached=cached)
