"""The generation_config.json that a model may come with: read as transformers and vLLM read it, before either does."""

from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import Config
from grpo.config.paths import is_hub_model
from grpo.config.text import first_line
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"


def load_generation_config(config: Config) -> "GenerationConfig | None":
    """What the file says; None where there is none. Raises ConfigError for one that cannot be read or makes no sense.

    Loaded with a model, such a file would either be passed over in silence or fail without its name.
    """
    path, revision = config.model.path, config.model.revision
    if not _exists(path, revision):
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path, revision=revision or "main")
    except Exception as error:  # a value may be of any kind, and transformers does what it likes with it
        raise ConfigError(
            f"model.path = {path}: {FILE} must hold settings that transformers can read, but: {first_line(error)}; "
            "correct the file or remove it"
        ) from error


def _exists(path: str, revision: str | None) -> bool:
    """A hub model's file is looked at once it is in the cache; whoever downloads it meets what it says."""
    if not is_hub_model(path):
        return Path(path, FILE).exists()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, FILE, revision=revision), str)
