"""The tokenizer of the model.

Transformers is imported when a tokenizer is loaded, not before.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from grpo.config import Config
from grpo.config.paths import is_hub_model, is_local, unpinned
from grpo.config.text import first_line
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer of `model.path`, which may be a folder or a model on the hub; never code that comes with it.

    Raises: ConfigError for a model that has none or cannot be reached.
    """
    path = config.model.path
    if is_local(path) and not Path(path).is_dir():
        raise ConfigError(f"model.path: there is no folder {path} in {Path.cwd()}; correct it")
    if config.model.revision is None and is_hub_model(path):
        raise ConfigError(unpinned("model.path", path))
    try:
        loader = _tokenizer_class(Path(path))
        tokenizer = loader.from_pretrained(path, revision=config.model.revision or "main", trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged tokenizer.json
        raise ConfigError(
            f"model.path: no tokenizer can be loaded from {path} ({first_line(error)}); give a folder with "
            "tokenizer.json and tokenizer_config.json, or the id of a model on the hub or in its cache here"
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def _tokenizer_class(folder: Path) -> "type[PreTrainedTokenizerFast] | type[AutoTokenizer]":
    """What AutoTokenizer would choose; not asked where that is plain, as its import brings torch (seconds)."""
    plain = {"config.json": ("model_type", "llama"), "tokenizer_config.json": ("tokenizer_class", "TokenizersBackend")}
    if all((folder / file).is_file() and _entry(folder / file, key) == value for file, (key, value) in plain.items()):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _entry(path: Path, key: str) -> object:
    return json.loads(path.read_bytes()).get(key)
