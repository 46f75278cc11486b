"""Text to token ids: the tokenizer of the model and the prompt around a question.

Transformers is imported when a tokenizer is loaded, not before.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from grpo.config import Config
from grpo.config.paths import is_hub_model, is_local, unpinned
from grpo.config.text import first_line
from grpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROWS_PER_BATCH = 1024
"""Rows that are tokenised together: a fast tokenizer shares them among the cores."""


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


def tokenise(
    questions: Sequence[str], config: Config, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[int, ...]]:
    """Token ids of each question's prompt: made once, here and nowhere else.

    Raises: ConfigError for a system prompt without a chat template, and for a template that refuses the messages.
    """
    if config.data.system_prompt is not None and not tokenizer.chat_template:
        raise ConfigError(
            f"data.system_prompt: the tokenizer of {config.model.path} has no chat template; write the instruction "
            "into data.prompt_format"
        )
    texts = [config.data.prompt_format.replace("{question}", question) for question in questions]
    for start in range(0, len(texts), ROWS_PER_BATCH):
        yield from map(tuple, _encode(texts[start : start + ROWS_PER_BATCH], config, tokenizer))


def _encode(texts: list[str], config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """By the chat template up to the head of the assistant's turn; without one, with the tokenizer's own BOS rule."""
    if not tokenizer.chat_template:
        return cast("list[list[int]]", tokenizer(texts, verbose=False)["input_ids"])
    from jinja2 import TemplateError

    system = [{"role": "system", "content": config.data.system_prompt}] if config.data.system_prompt is not None else []
    chats = [[*system, {"role": "user", "content": text}] for text in texts]
    quiet = {"verbose": False}
    try:
        ids = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=False, tokenizer_kwargs=quiet
        )
    except TemplateError as error:
        raise ConfigError(
            f"data.system_prompt: the chat template of {config.model.path} refuses the prompt ({error}); put the "
            "instruction into data.prompt_format and remove data.system_prompt"
        ) from error
    return cast("list[list[int]]", ids)
