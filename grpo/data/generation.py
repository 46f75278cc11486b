"""The generation_config.json that a model may come with: read as transformers and vLLM read it, before either does."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.config import Config
from grpo.config.architecture import read_model_config
from grpo.config.paths import is_hub_model
from grpo.config.text import first_line
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

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


def end_tokens(config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens at which an engine ends a completion, the tokenizer's own end token first.

    Those of generation_config.json, or without one of config.json, as vLLM takes them. Raises ConfigError for a model
    whose completions nothing ends.
    """
    found = _settings(config).get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])]
    ends = list(dict.fromkeys(token for token in ids if type(token) is int))
    if not ends:
        raise ConfigError(
            f"model.path = {config.model.path}: a completion must end with a token that the engine stops at, but the "
            "model names none; set eos_token in its tokenizer_config.json or eos_token_id in its generation_config.json"
        )
    return ends


def _settings(config: Config) -> dict[str, Any]:
    """Without transformers, whose classes for it bring torch."""
    path, revision = config.model.path, config.model.revision
    try:
        if not is_hub_model(path):
            file = Path(path, FILE)
        else:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            try:
                file = Path(hf_hub_download(path, FILE, revision=revision))
            except EntryNotFoundError:  # also where neither hub nor cache has it
                file = Path(path, FILE)
        found = json.loads(file.read_bytes()) if file.is_file() else read_model_config(config)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"model.path = {path}: {FILE} must be readable JSON, but: {first_line(error)}; correct the file"
        ) from error
    return found if isinstance(found, dict) else {}
