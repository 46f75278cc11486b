"""Prompts: every row of a data set is checked and tokenised before anything heavy starts; then an exactly-once stream.

Errors read `file:row: field: what, and what to do`.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from grpo.config import Config
from grpo.data.arithmetic import MAX_ROWS
from grpo.data.sources import Problem, Source, missing_column, place, read
from grpo.data.tokenizer import load_tokenizer, tokenise
from grpo.errors import ConfigError, DataError
from grpo.rewards.built_in import answer_problem
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Loaded", "PromptStream", "eval_prompts", "load_prompts", "load_tokenizer", "train_prompts"]

SHOWN_PROBLEMS = 5
CHARACTERS_PER_TOKEN = 1000
"""More than any token stands for: a row of many megabytes is refused before it is tokenised."""


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
    return load_prompts(train_source(config), config, tokenizer)


def eval_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Loaded:
    """At most `eval.prompts` held-out prompts: the rows with the lowest hash of their text, whatever the run's seed.

    The whole split is checked all the same. Raises: DataError; ConfigError, also where training would see these rows.
    """
    source = eval_source(config)
    if source is None:
        return Loaded((), 0)
    loaded = load_prompts(source, config, tokenizer)
    texts = [[prompt.question, prompt.answer] for prompt in loaded.prompts]
    ranked = sorted(range(len(texts)), key=lambda index: (_digest(texts[index]), index))
    chosen = sorted(ranked[: config.eval.prompts])
    return Loaded(tuple(loaded.prompts[index] for index in chosen), loaded.skipped)


def train_source(config: Config) -> Source:
    """Where the prompts of the training come from."""
    data = config.data
    columns = (data.question_column, data.answer_column)
    return Source("data", data.source, data.subset, data.revision, data.split, data.size, columns)


def eval_source(config: Config) -> Source | None:
    """Where the held-out prompts come from; None without an evaluation. Raises ConfigError if training sees them."""
    held_out = config.eval
    if held_out.prompts == 0:
        return None
    train = train_source(config)
    source = replace(train, section="eval", split=held_out.split, size=min(held_out.prompts, MAX_ROWS))
    if held_out.source is not None:
        source = replace(source, name=held_out.source, subset=held_out.subset, revision=held_out.revision)
    elif place(source) == place(train):
        raise ConfigError(
            f"eval.source: held-out prompts must not be those of the training, but both are {place(train)}; set "
            "eval.source or eval.split, write {split} in data.source, or evaluate nothing with eval.prompts: 0"
        )
    return source


def load_prompts(source: Source, config: Config, tokenizer: "PreTrainedTokenizerBase") -> Loaded:
    """Reads, checks and tokenises every row of the source.

    Raises: DataError that lists the first bad rows, unless `data.on_bad_row` is "skip" and some rows are good;
    DataError or ConfigError for a source that cannot be read.
    """
    checked = {number: _check_row(number, row, config) for number, row in read(source)}
    rows = [row for row in checked.values() if isinstance(row, _Row)]
    source_id = _fingerprint(rows, config, tokenizer)
    token_ids = tokenise([row.question for row in rows], config, tokenizer)
    prompts = []
    for row, ids_T in zip(rows, token_ids, strict=True):
        if not ids_T:
            checked[row.number] = Problem(
                config.data.question_column, "its prompt has no tokens; set data.prompt_format"
            )
        elif problem := _check_length(len(ids_T), config):
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
            return Problem(column, missing_column(key, column, list(row)))
        value = row[column]
        if not isinstance(value, str):
            return Problem(column, f"must be text, found {_kind(value)}; write it in quotes")
        if not value.strip():
            return Problem(column, "is empty; fill it in or remove the row")
        if "\0" in value:
            return Problem(column, "holds a null character, as damaged files do; write the row again")
        texts.append(value)
    if problem := answer_problem(config.rewards, texts[1]):
        return Problem(config.data.answer_column, problem)
    return _check_length(len(texts[0]) // CHARACTERS_PER_TOKEN, config, "over ") or _Row(number, *texts)


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def _check_length(tokens: int, config: Config, about: str = "") -> Problem | None:
    """A prompt must leave room for a whole completion."""
    room = config.model.max_length - config.rollout.max_tokens
    if tokens > room:
        return Problem(
            config.data.question_column,
            f"its prompt has {about}{tokens} tokens, model.max_length - rollout.max_tokens leaves {room}; shorten the "
            "row, raise model.max_length or lower rollout.max_tokens",
        )
    return None


def _report(name: str, problems: Mapping[int, Problem], rows: int) -> str:
    if rows == 0:
        return f"{name}: has no rows; give a source with at least one"
    shown = list(problems.items())[:SHOWN_PROBLEMS]
    lines = [f"{name}:{number}: {problem.field}: {problem.text}" for number, problem in shown]
    way_out = "correct them" if len(problems) == rows else "correct them, or leave them out with data.on_bad_row: skip"
    return "\n".join([*lines, f"{len(problems)} of {rows} rows of {name} cannot be used; {way_out}"])


def _fingerprint(rows: Iterable[_Row], config: Config, tokenizer: "PreTrainedTokenizerBase") -> str:
    """12 hex digits that change with any row, the format, the system prompt or the chat template."""
    digest = hashlib.sha256()
    for part in ([config.data.prompt_format, config.data.system_prompt, tokenizer.chat_template], *rows):
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()[:12]


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

    def restore(self, state: Mapping[str, object]) -> None:
        """Resumes where `state` was taken. Raises DataError for a state of other prompts, or of another seed."""
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise DataError(
                    f"data: the saved order belongs to {name} {state.get(name)!r}, these prompts have {own!r}; resume "
                    "with the same data section, data files, model and run.seed, or start a new run"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not (type(epoch) is int and type(position) is int and epoch >= 0 and 0 <= position <= len(self.prompts)):
            raise DataError(f"data: the saved order is damaged (epoch {epoch!r}, row {position!r}); start a new run")
        self._start(epoch, position)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
