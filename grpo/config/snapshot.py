"""A model on the hub is the one at the commit that was asked for: compared, and not left to a library and its cache."""

from pathlib import Path

from grpo.config.paths import is_hub_model
from grpo.config.schema import Config
from grpo.errors import ConfigError

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, in its order."""


def check_snapshot(config: Config) -> None:
    """After a model was loaded: its files must lie in the snapshot of model.revision. Raises ConfigError."""
    path, revision = config.model.path, config.model.revision
    if not is_hub_model(path):
        return
    from huggingface_hub import try_to_load_from_cache

    for names in (("config.json",), WEIGHTS):
        found = [
            file for name in names if isinstance(file := try_to_load_from_cache(path, name, revision=revision), str)
        ]
        commits = {Path(file).parent.name for file in found}
        if commits != {revision}:
            said = ", ".join(sorted(commits)) or "no such file in the cache"
            raise ConfigError(
                f"model.path = {path}: what was loaded must be of model.revision = {revision}, but {names[0]} is of: "
                f"{said}; delete this model's folder in the hub's cache (HF_HOME) and start again"
            )
