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


PLAIN = {
    ("llama", "TokenizersBackend"): "PreTrainedTokenizerFast",
    **{
        (model_type, name): "Qwen2Tokenizer"
        for model_type in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
        for name in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    },
}
"""What AutoTokenizer chooses, by `model_type` and `tokenizer_class` of a folder."""


def _tokenizer_class(folder: Path) -> "type[PreTrainedTokenizerFast] | type[AutoTokenizer]":
    """What AutoTokenizer would choose; not asked where that is plain, as its import brings torch (seconds)."""
    import transformers

    files = [folder / "config.json", folder / "tokenizer_config.json"]
    if all(file.is_file() for file in files) and _entry(files[1], "auto_map") is None:
        found = _entry(files[0], "model_type"), _entry(files[1], "tokenizer_class")
        if name := next((name for plain, name in PLAIN.items() if plain == found), ""):
            plainly: type[PreTrainedTokenizerFast] = getattr(transformers, name)
            return plainly
    return transformers.AutoTokenizer


def _entry(path: Path, key: str) -> object:
    found = json.loads(path.read_bytes())
    return found.get(key) if isinstance(found, dict) else None
