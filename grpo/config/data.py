"""The rows to train on: where they come from, which columns make a prompt, and how it is written."""

import json
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from grpo.config.fields import Commit, Line, Place, Positive, RunName, TemplateVariable
from grpo.config.rewards import RewardFunction
from grpo.config.section import Section


class DataRows(Section):
    """Rows of one source, and the columns that make a prompt and its answer."""

    source: Place = "openai/gsm8k"
    """arithmetic (built in), a data file (may say `{split}`), a folder of files or of save_to_disk, or a hub id."""
    subset: Line | None = None
    """Configuration of the hub data set, for GSM8K "main"."""
    revision: Commit | None = None
    """Commit (40 hex digits) of the hub data set; needed for a hub id, as a branch can move; a file has none."""
    split: Line = "train"
    """Split of the data set; of the built-in task: "train" or "test" (disjoint); of a file: value of `{split}`."""
    size: Positive = 4096
    """Number of rows that the built-in task makes. Other sources are used whole."""
    question_column: str = Field("question", min_length=1, max_length=255)
    """Column of the question: text, or a list of messages (role, content). `a.b` is the entry b of the column a."""
    answer_column: str = Field("answer", min_length=1, max_length=255)
    """Column of the reference answer, text or number; the question's own: what the assistant says last there."""
    input_column: str | None = Field(None, min_length=1, max_length=255)
    """Column of a text that belongs below the question, as in Alpaca's rows; where it is empty, nothing is added."""


class DataSource(DataRows):
    """One of several sources."""

    name: RunName
    """Name of the source, in metrics and samples."""
    weight: float = Field(1.0, gt=0, le=1e6)
    """Share of the prompts, relative to the other sources: in any stretch of the run, whatever the source's size."""
    rewards: tuple[RewardFunction, ...] = ()
    """Terms of the reward of its prompts; none: those of the key `rewards`."""


class Curriculum(Section):
    """Prompts that are always or never right, and so teach nothing, are drawn less often."""

    easy_threshold: float = Field(1.0, gt=0, le=1)
    """Pass rate from which on a prompt is easy: 1 is always right."""
    hard_threshold: float = Field(0.0, ge=0, lt=1)
    """Pass rate up to which a prompt is hard: 0 is never right. Below easy_threshold."""
    easy_fraction: float = Field(0.2, ge=0.01, le=1)
    """Share of the easy prompts that are drawn in an epoch; the others are skipped. By a seeded coin for each."""
    hard_fraction: float = Field(0.5, ge=0.01, le=1)
    """The same of the hard prompts, which may become easier."""
    window: int = Field(1, ge=1, le=1000)
    """Last times that a prompt was sampled which make its pass rate; all completions of them count alike."""
    pass_reward: float = Field(1.0, ge=-1e9, le=1e9)
    """Reward from which on a completion is right; that of evaluations is 1."""

    @model_validator(mode="after")
    def _check_thresholds(self) -> "Curriculum":
        if self.hard_threshold >= self.easy_threshold:
            raise ValueError(
                f"a prompt is not easy and hard at once: data.curriculum.hard_threshold = {self.hard_threshold:g} must "
                f"be below easy_threshold = {self.easy_threshold:g}"
            )
        return self


class Data(DataRows):
    """The prompts to train on."""

    sources: tuple[DataSource, ...] = ()
    """Several sources, mixed by weight; then source, subset, revision, split and the columns stand in each of them."""
    system_prompt: str | None = None
    """System message of the chat template; a row of messages with one of its own keeps that."""
    prompt_format: str = "{question}"
    """Text of the last user message; `{question}` is replaced. Without a chat template it is the whole prompt."""
    chat_template: Place | None = None
    """File with a chat template, or the name of one of the tokenizer's; null: the tokenizer's, if it has one."""
    chat_template_kwargs: dict[TemplateVariable, JsonValue] = Field(default_factory=dict)
    """Variables for the chat template, such as `{enable_thinking: false}`."""
    curriculum: Curriculum | None = None
    """Draw prompts that are always or never right less often. {}: with its defaults; null: all alike."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with a row that cannot be used: stop and name it, or leave it out and count it."""

    @field_validator("prompt_format")
    @classmethod
    def _has_a_question(cls, prompt_format: str) -> str:
        if "{question}" not in prompt_format:
            raise ValueError("the prompt needs the question; write {question} where it shall stand")
        return prompt_format

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_whole_text(cls, values: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:
            raise ValueError(f"must be what JSON can say, in whole Unicode text ({error})") from None
        return values

    @model_validator(mode="after")
    def _check_sources(self) -> "Data":
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"each of data.sources needs a name of its own, but two are called {twice[0]}; rename one")
        own = DataRows()
        moved = [key for key in DataRows.model_fields if getattr(self, key) != getattr(own, key)]
        if self.sources and moved:
            raise ValueError(f"with data.sources, data.{moved[0]} has no meaning; write it into each of data.sources")
        return self
