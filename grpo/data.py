"""Prompts: every row of a data set is checked and tokenised before anything heavy starts; then an exactly-once stream.

Errors read `file:row: field: what, and what to do`. Transformers is imported when a tokenizer is loaded, not before.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from grpo.arithmetic import MAX_ROWS
from grpo.config import Config
from grpo.errors import ConfigError, DataError
from grpo.sources import Problem, Source, missing_column, place, read
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_PROBLEMS = 5
ROWS_PER_BATCH = 1024
"""Rows that are tokenised together: a fast tokenizer shares them among the cores."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The prompts of a split, in the order of its rows, and how many bad rows `data.on_bad_row: skip` left out."""

    prompts: tuple[Prompt, ...]
    skipped: int


class _Row(NamedTuple):
    number: int
    question: str
    answer: str


def train_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Loaded:
    """All prompts of `data.source`. Raises: DataError, ConfigError."""
    return load_prompts(_train_source(config), config, tokenizer)


def eval_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Loaded:
    """At most `eval.prompts` held-out prompts: the rows with the lowest hash of their text, whatever the run's seed.

    The whole split is checked all the same. Raises: DataError; ConfigError, also where training would see these rows.
    """
    held_out = config.eval
    if held_out.prompts == 0:
        return Loaded((), 0)
    train = _train_source(config)
    source = replace(train, section="eval", split=held_out.split, size=min(held_out.prompts, MAX_ROWS))
    if held_out.source is not None:
        source = replace(source, name=held_out.source, subset=held_out.subset)
    elif place(source) == place(train):
        raise ConfigError(
            f"eval.source: held-out prompts must not be those of the training, but both are {place(train)}; set "
            "eval.source or eval.split, write {split} in data.source, or evaluate nothing with eval.prompts: 0"
        )
    loaded = load_prompts(source, config, tokenizer)
    texts = [[prompt.question, prompt.answer] for prompt in loaded.prompts]
    ranked = sorted(range(len(texts)), key=lambda index: (_digest(texts[index]), index))
    chosen = sorted(ranked[: held_out.prompts])
    return Loaded(tuple(loaded.prompts[index] for index in chosen), loaded.skipped)


def _train_source(config: Config) -> Source:
    data = config.data
    return Source("data", data.source, data.subset, data.split, data.size, (data.question_column, data.answer_column))


def load_prompts(source: Source, config: Config, tokenizer: "PreTrainedTokenizerBase") -> Loaded:
    """Reads, checks and tokenises every row of the source.

    Raises: DataError that lists the first bad rows, unless `data.on_bad_row` is "skip" and some rows are good;
    DataError or ConfigError for a source that cannot be read.
    """
    checked = {number: _check_row(number, row, config) for number, row in read(source)}
    rows = [row for row in checked.values() if isinstance(row, _Row)]
    source_id = _fingerprint(rows, config, tokenizer)
    prompts = []
    for row, ids_T in zip(rows, _tokenise(rows, config, tokenizer), strict=True):
        if problem := _check_length(len(ids_T), config):
            checked[row.number] = problem
        else:
            prompts.append(Prompt(f"{source_id}:{row.number}", row.question, row.answer, ids_T))
    problems = {number: row for number, row in checked.items() if isinstance(row, Problem)}
    if not prompts or (problems and config.data.on_bad_row == "fail"):
        raise DataError(_report(place(source), problems, rows=len(checked)))
    return Loaded(tuple(prompts), skipped=len(problems))


def _check_row(number: int, row: object, config: Config) -> _Row | Problem:
    """The question and the answer of a row: both must be there and be text that is not blank."""
    if isinstance(row, Problem):
        return row
    if not isinstance(row, dict):
        return Problem("row", f"must be an object, found {_kind(row)}; write one object for each row")
    texts = []
    for key in ("question_column", "answer_column"):
        column: str = getattr(config.data, key)
        if column not in row:
            return Problem(column, missing_column(key, list(row)))
        value = row[column]
        if not isinstance(value, str):
            return Problem(column, f"must be text, found {_kind(value)}; write it in quotes")
        if not value.strip():
            return Problem(column, "is empty; fill it in or remove the row")
        texts.append(value)
    return _Row(number, *texts)


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def _check_length(tokens: int, config: Config) -> Problem | None:
    """A prompt must leave room for a whole completion; an engine refuses one without tokens."""
    room = config.model.max_length - config.rollout.max_tokens
    if tokens == 0:
        return Problem(config.data.question_column, "its prompt has no tokens; fill it in or set data.prompt_format")
    if tokens > room:
        return Problem(
            config.data.question_column,
            f"its prompt has {tokens} tokens, model.max_length - rollout.max_tokens leaves {room}; shorten the row, "
            "raise model.max_length or lower rollout.max_tokens",
        )
    return None


def _report(name: str, problems: Mapping[int, Problem], rows: int) -> str:
    if rows == 0:
        return f"{name}: has no rows; give a source with at least one"
    shown = list(problems.items())[:SHOWN_PROBLEMS]
    lines = [f"{name}:{number}: {problem.field}: {problem.text}" for number, problem in shown]
    way_out = "correct them" if len(problems) == rows else "correct them, or leave them out with data.on_bad_row: skip"
    return "\n".join([*lines, f"{len(problems)} of {rows} rows of {name} cannot be used; {way_out}"])


def _tokenise(rows: Sequence[_Row], config: Config, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[int, ...]]:
    """Token ids of each row's prompt: chat template or bare format, tokenised once, here and nowhere else."""
    texts = [config.data.prompt_format.replace("{question}", row.question) for row in rows]
    encode = _encode_chat if tokenizer.chat_template else _encode_text
    for start in range(0, len(texts), ROWS_PER_BATCH):
        yield from map(tuple, encode(texts[start : start + ROWS_PER_BATCH], config, tokenizer))


def _encode_text(texts: list[str], config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """With the special tokens that the tokenizer adds by itself (BOS, if it does)."""
    return cast("list[list[int]]", tokenizer(texts, verbose=False)["input_ids"])


def _encode_chat(texts: list[str], config: Config, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The template writes the special tokens, up to the header of the assistant's turn."""
    from jinja2 import TemplateError

    system = [{"role": "system", "content": config.data.system_prompt}] if config.data.system_prompt is not None else []
    chats = [[*system, {"role": "user", "content": text}] for text in texts]
    try:
        ids = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=False, tokenizer_kwargs={"verbose": False}
        )
    except TemplateError as error:
        raise ConfigError(
            f"data.system_prompt: the chat template of {config.model.path} refuses the prompt ({error}); put the "
            "instruction into data.prompt_format and remove data.system_prompt"
        ) from error
    return cast("list[list[int]]", ids)


def _fingerprint(rows: Iterable[_Row], config: Config, tokenizer: "PreTrainedTokenizerBase") -> str:
    """12 hex digits that change with any row, the format, the system prompt or the chat template."""
    digest = hashlib.sha256()
    for part in ([config.data.prompt_format, config.data.system_prompt, tokenizer.chat_template], *rows):
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()[:12]


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer of `model.path`, which may be a folder or a model on the hub; never code that comes with it.

    Raises: ConfigError for a model that has none or cannot be reached.
    """
    path = config.model.path
    folder = Path(path)
    if not folder.is_dir() and (path.count("/") > 1 or folder.is_absolute() or folder.parent.is_dir() and "/" in path):
        raise ConfigError(f"model.path: there is no folder {path} in {Path.cwd()}; correct it")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=config.model.revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged tokenizer.json
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(
            f"model.path: no tokenizer can be loaded from {path} ({cause}); give a folder with tokenizer.json and "
            "tokenizer_config.json, or the id of a model that the hub (or its cache on this machine) has"
        ) from error


class PromptStream:
    """Endless: every epoch is a permutation of all prompts that follows from the seed and the epoch's number alone."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        assert prompts, "load_prompts returns at least one prompt"
        self.prompts = prompts
        self.seed = seed
        self.fingerprint = _digest([prompt.id for prompt in prompts])
        self._start(epoch=0, position=0)

    def _start(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = sorted(range(len(self.prompts)), key=lambda index: _digest([self.seed, epoch, index]))

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, across the ends of epochs where need be."""
        taken: list[Prompt] = []
        while len(taken) < count:
            if self.position == len(self.prompts):
                self._start(self.epoch + 1, position=0)
            indices = self._order[self.position : self.position + count - len(taken)]
            taken += [self.prompts[index] for index in indices]
            self.position += len(indices)
        return taken

    def state(self) -> dict[str, str | int]:
        """Where the stream is, for JSON: what was taken before does not come again after `restore`."""
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def _identity(self) -> dict[str, str | int]:
        return {"fingerprint": self.fingerprint, "size": len(self.prompts), "seed": self.seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken. Raises DataError for a state of other prompts, or of another seed."""
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise DataError(
                    f"data: the saved order belongs to {name} {state.get(name)!r}, these prompts have {own!r}; go on "
                    "with the same data section, data files, model and run.seed, or start a new run"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not (type(epoch) is int and type(position) is int and epoch >= 0 and 0 <= position <= len(self.prompts)):
            raise DataError(f"data: the saved order is damaged (epoch {epoch!r}, row {position!r}); start a new run")
        self._start(epoch, position)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
