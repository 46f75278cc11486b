"""Prompts: every row of a data set is checked, rendered and tokenised before anything heavy starts.

Errors read `file:row: field: what, and what to do`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from typing import TYPE_CHECKING

from grpo.config import Config
from grpo.config.data import DataRows
from grpo.data.arithmetic import MAX_ROWS
from grpo.data.comparison import check_copies, check_held_out
from grpo.data.completions import Completions
from grpo.data.problem import Problem
from grpo.data.proof import plain
from grpo.data.rendering import CHARACTERS_PER_TOKEN, Rendering
from grpo.data.rows import Row, check_row
from grpo.data.sources import Columns, Source, place, read
from grpo.data.stream import MixedStream, PromptStream, digest
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import ConfigError, DataError
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Loaded", "PromptStream", "eval_prompts", "load_data", "load_tokenizer", "prompt_stream", "train_prompts"]

SHOWN_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class Loaded:
    """Prompts in the order of their rows, and how many bad rows `data.on_bad_row: skip` left out.

    `contents` are digests of what each prompt asks; `notes` are sentences on what may not be meant.
    """

    prompts: tuple[Prompt, ...]
    skipped: int = 0
    contents: tuple[bytes, ...] = ()
    notes: tuple[str, ...] = ()


def load_data(config: Config, rendering: Rendering, completions: Completions | None = None) -> tuple[Loaded, Loaded]:
    """The prompts of the training and those held out, compared with each other. Raises DataError, ConfigError.

    `completions` makes what a supervised warm-up teaches behind them; rows whose completion is too long are left out.
    """
    train, held_out = _train(config, rendering, completions), _held_out(config, rendering, completions)
    where = ", ".join(map(place, eval_sources(config)))
    notes = check_held_out(train.contents, held_out.contents, held_out.prompts, where)
    return train, replace(held_out, notes=(*held_out.notes, *notes, *rendering.notes))


def train_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime | None = None) -> Loaded:
    """All prompts to train on. Raises: DataError, ConfigError."""
    rendering = Rendering(config, tokenizer, now)
    loaded = _train(config, rendering)
    return replace(loaded, notes=(*loaded.notes, *rendering.notes))


def eval_prompts(
    config: Config, tokenizer: "PreTrainedTokenizerBase", now: datetime | None = None, whole: bool = False
) -> Loaded:
    """At most `eval.prompts` held-out prompts: the rows with the lowest hash of their text, whatever the run's seed.

    The whole split is checked all the same, and `whole` taken, of the built-in task, which makes any number,
    `eval.prompts` rows. Raises: DataError; ConfigError, also where training would see these rows.
    """
    rendering = Rendering(config, tokenizer, now)
    loaded = _held_out(config, rendering, whole=whole)
    return replace(loaded, notes=(*loaded.notes, *rendering.notes))


def prompt_stream(config: Config, prompts: Sequence[Prompt], began: str = "") -> PromptStream | MixedStream:
    """The order in which a run takes its prompts. `began` is the time that its template sees, if it looks at it."""
    mixed = bool(config.data.sources)
    stream = _mixed(config, prompts, began) if mixed else PromptStream(prompts, config.run.seed, began)
    stream.follow(config.data.curriculum)
    return stream


def _mixed(config: Config, prompts: Sequence[Prompt], began: str) -> MixedStream:
    weights = {source.name: source.weight for source in config.data.sources}
    own = {name: [prompt for prompt in prompts if prompt.source == name] for name in weights}
    streams = {name: PromptStream(some, config.run.seed) for name, some in own.items()}
    return MixedStream(streams, weights, began)


def _train(config: Config, rendering: Rendering, completions: Completions | None = None) -> Loaded:
    return _all(train_sources(config), config, rendering, "data", completions)


def _held_out(
    config: Config, rendering: Rendering, completions: Completions | None = None, whole: bool = False
) -> Loaded:
    sources = eval_sources(config)
    if not sources:
        return Loaded(())
    loaded = _all(sources, config, rendering, "eval", completions)
    if whole:
        return loaded
    texts = [[prompt.question, prompt.answer] for prompt in loaded.prompts]
    ranked = sorted(range(len(texts)), key=lambda index: (digest(texts[index]), index))
    chosen = sorted(ranked[: config.eval.prompts])
    prompts = tuple(loaded.prompts[index] for index in chosen)
    return replace(loaded, prompts=prompts, contents=tuple(loaded.contents[index] for index in chosen))


def _all(
    sources: Sequence[Source], config: Config, rendering: Rendering, section: str, completions: Completions | None
) -> Loaded:
    parts = [load_prompts(source, config, rendering, completions) for source in sources]
    prompts = tuple(chain.from_iterable(part.prompts for part in parts))
    contents = tuple(chain.from_iterable(part.contents for part in parts))
    notes = check_copies(prompts, contents, config, section)
    told = tuple(chain.from_iterable(part.notes for part in parts))
    return Loaded(prompts, sum(part.skipped for part in parts), contents, (*told, *notes))


def _source(section: str, source: DataRows, label: str = "") -> Source:
    columns = Columns(section, source.question_column, source.answer_column, source.input_column)
    return Source(section, source.source, source.subset, source.revision, source.split, source.size, columns, label)


def train_sources(config: Config) -> list[Source]:
    """Where the prompts of the training come from."""
    several = enumerate(config.data.sources)
    named = [_source(f"data.sources.{place}", source, source.name) for place, source in several]
    source = config.data
    return named or [_source("data", source)]


def eval_sources(config: Config) -> list[Source]:
    """Where the held-out prompts come from; none without an evaluation. Raises ConfigError if training sees them."""
    held_out = config.eval
    train = train_sources(config)
    if held_out.prompts == 0:
        return []
    size = min(held_out.prompts, MAX_ROWS)
    if held_out.source is not None:
        named = replace(train[0], section="eval", name=held_out.source, split=held_out.split, size=size, label="")
        return [replace(named, subset=held_out.subset, revision=held_out.revision)]
    sources = [replace(source, section="eval", split=held_out.split, size=size) for source in train]
    for source, other in zip(sources, train, strict=True):
        if place(source) == place(other):
            raise ConfigError(
                f"eval.source: held-out prompts must not be those of the training, but both are {place(other)}; set "
                f"eval.source or eval.split, write {{split}} in {other.section}.source, or evaluate nothing with "
                "eval.prompts: 0"
            )
    return sources


def load_prompts(
    source: Source, config: Config, rendering: Rendering, completions: Completions | None = None
) -> Loaded:
    """Reads, checks and tokenises every row of the source.

    Raises: DataError that lists the first bad rows, unless `data.on_bad_row` is "skip" and some rows are good;
    DataError or ConfigError for a source that cannot be read.
    """
    if completions:
        taught = config.sft.completion or source.columns.answer_column
        source = replace(source, columns=replace(source.columns, completion=taught))
    checked = {number: _checked(number, row, source, config) for number, row in read(source)}
    rows = [row for row in checked.values() if isinstance(row, Row)]
    source_id = _fingerprint(rows, rendering, source.label)
    made = rendering.encode([row.conversation for row in rows])
    answers = completions.encode(rows, made) if completions else [()] * len(rows)
    prompts, contents = [], []
    for row, ids, answer in zip(rows, made, answers, strict=True):
        problem = ids if isinstance(ids, Problem) else _check_length(len(ids), config, source)
        if problem:
            checked[row.number] = replace(problem, field=source.columns.question_column)
        elif isinstance(answer, Problem):
            checked[row.number] = replace(answer, field=str(source.columns.completion))
        elif not isinstance(ids, Problem):
            prompts.append(Prompt(f"{source_id}:{row.number}", row.question, row.answer, ids, source.label, answer))
            contents.append(_content(row))
    problems = {number: row for number, row in checked.items() if isinstance(row, Problem)}
    if not prompts or (problems and config.data.on_bad_row == "fail"):
        raise DataError(_report(place(source), problems, rows=len(checked)))
    return without_long(Loaded(tuple(prompts), len(problems), tuple(contents)), place(source), config)


def without_long(loaded: Loaded, name: str, config: Config) -> Loaded:
    """Only the prompts whose completion has room, which is that of a rollout, and a sentence on the others.

    Raises DataError if none is left.
    """
    longest, room = max(len(prompt.completion_ids) for prompt in loaded.prompts), config.rollout.max_tokens
    places = [place for place, prompt in enumerate(loaded.prompts) if len(prompt.completion_ids) <= room]
    if longest <= room:
        return loaded
    told = (
        f"{len(loaded.prompts) - len(places)} of {len(loaded.prompts)} completions have more tokens than "
        f"rollout.max_tokens = {room} leaves them, up to {longest}"
    )
    if not places:
        raise DataError(f"{name}: {told}, so there is nothing to learn from; raise rollout.max_tokens")
    prompts, contents = tuple(loaded.prompts[at] for at in places), tuple(loaded.contents[at] for at in places)
    return replace(loaded, prompts=prompts, contents=contents, notes=(f"{name}: {told}; these rows are left out",))


def _checked(number: int, row: object, source: Source, config: Config) -> Row | Problem:
    found = check_row(number, row, source, config.rewards_of(source.label))
    if isinstance(found, Problem):
        return found
    longest = sum(len(str(message["content"])) for message in found.conversation)
    return _check_length(longest // CHARACTERS_PER_TOKEN, config, source, "over ") or found


def _content(row: Row) -> bytes:
    """Digest of what users say, without what templates and tokenizers may change: equal for copies in other formats."""
    said = [str(message["content"]) for message in row.conversation if message["role"] == "user"]
    return hashlib.blake2b(plain("\n".join(said)).encode(), digest_size=16).digest()


def _check_length(tokens: int, config: Config, source: Source, about: str = "") -> Problem | None:
    """A prompt must leave room for a whole completion."""
    room = config.model.max_length - config.rollout.max_tokens
    if tokens > room:
        return Problem(
            source.columns.question_column,
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


def _fingerprint(rows: Iterable[Row], rendering: Rendering, label: str) -> str:
    """12 hex digits that change with any row, the format, the system prompt or the chat template."""
    identity = hashlib.sha256()
    parts = ([*row[:3], *([row.messages] if row.messages else [])] for row in rows)
    for part in chain([rendering.identity() + ([label] if label else [])], parts):
        identity.update(json.dumps(part).encode() + b"\n")
    return identity.hexdigest()[:12]
