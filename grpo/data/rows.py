"""What a row must hold: a question, as text or as messages, and an answer, as text or a number."""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from grpo.config import RewardFunction
from grpo.data.columns import MISSING, value_at
from grpo.data.problem import Problem
from grpo.data.sources import Source, missing_column
from grpo.data.template import Chat, Message
from grpo.rewards.built_in import BUILT_IN, answer_problem

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_DIGITS = 60
"""Of a number as an answer, before its point."""


class Row(NamedTuple):
    """A row that can be used. `question` is what the user says last; `messages` are all, where a row has messages.

    `completion` is what a supervised warm-up teaches, "" elsewhere.
    """

    number: int
    question: str
    answer: str
    messages: Chat = []
    completion: str = ""

    @property
    def conversation(self) -> Chat:
        """The messages of its prompt."""
        return self.messages or [{"role": "user", "content": self.question}]


def check_row(number: int, row: object, source: Source, rewards: Sequence[RewardFunction]) -> Row | Problem:
    """The question and the answer of what stands in a row. The rewards say which answers can be read."""
    if isinstance(row, Problem):
        return row
    if not isinstance(row, dict):
        return Problem("row", f"must be an object, found {_kind(row)}; write one object for each row")
    columns = source.columns
    values = {key: value_at(column, row) for key, column in columns.wanted()}
    for key, column in columns.wanted():
        if values[key] is MISSING and not (key == "input_column" and column not in row):
            return Problem(column, missing_column(columns, key, _names(row, column)))
    asked, told = values["question_column"], values["answer_column"]
    if columns.question_column == columns.answer_column:
        asked, told = _apart(asked)
    messages = conversation(asked, source) if isinstance(asked, list) else []
    if isinstance(messages, str):
        return Problem(columns.question_column, messages)
    question = messages[-1]["content"] if messages else asked
    further = values.get("input_column", MISSING)
    if not messages and isinstance(question, str) and isinstance(further, str) and further.strip():
        question = f"{question}\n\n{further}"
    answer = answer_text(told, rewards)
    taught = completion_text(values["completion"]) if columns.completion else None
    for column, value, also in (
        (columns.question_column, question, "messages"),
        (columns.answer_column, answer, "a number"),
        *([(columns.completion, taught, "messages that end with the assistant's")] if columns.completion else []),
    ):
        if problem := _not_text(value, also, source):
            return Problem(column, problem)
    assert isinstance(question, str) and isinstance(answer, str)
    if problem := answer_problem(rewards, answer):
        return Problem(columns.answer_column, problem)
    return Row(number, question, answer, messages, str(taught or ""))


def completion_text(value: object) -> object:
    """What the assistant says last, as text: of messages the last one's, of a number its text, else the value."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        last = value[-1]
        return _content(last.get("content")) if last.get("role", "assistant") == "assistant" else value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return number_text(value) or value
    return value


def _names(row: Mapping[str, object], column: str) -> list[str]:
    """Names to choose from: of the row, and below the column that the path begins with."""
    inside = row.get(column.partition(".")[0])
    below = [f"{column.partition('.')[0]}.{name}" for name in inside] if isinstance(inside, dict) else []
    return [*below, *row]


def _not_text(value: object, also: str, source: Source) -> str | None:
    if not isinstance(value, str):
        way_out = "write it in quotes" if source.is_json else "convert the column to text"
        return f"must be text or {also}, found {_kind(value)}; {way_out if value is not None else 'fill it in'}"
    if not value.strip():
        return "is empty; fill it in or remove the row"
    if "\0" in value:
        return "holds a null character, as damaged files do; write the row again"
    return None


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def _apart(messages: object) -> tuple[object, object]:
    """Messages that end with the answer: those before it, and it."""
    if not isinstance(messages, list) or len(messages) < 2 or not isinstance(messages[-1], dict):
        return messages, messages
    last = messages[-1]
    return (messages[:-1], last.get("content")) if last.get("role") == "assistant" else (messages, None)


def conversation(value: list[object], source: Source) -> list[Message] | str:
    """The messages of a prompt, without what is null in them, or what is wrong with them."""
    messages: list[Message] = []
    for place, item in enumerate(value):
        if not isinstance(item, dict) or "role" not in item or "content" not in item:
            return f"message {place + 1} must have role and content, found {_kind(item)}; rename what it has"
        role, content = item["role"], _content(item["content"])
        if role not in ROLES:
            return f"message {place + 1} must have one of the roles {', '.join(ROLES)}, found {_kind(role)}"
        if content is None and not (role == "assistant" and item.get("tool_calls")):
            return f"message {place + 1} must have text as its content, found {_kind(item['content'])}; correct it"
        if role in ("system", "developer") and place > 0:
            return f"message {place + 1} has the role {role}, which only the first may have; correct the order"
        rest = {key: more for key, more in item.items() if more is not None}
        messages.append({**rest, "role": role, "content": content or ""})
    if not messages or messages[-1]["role"] != "user":
        found = f"the role {messages[-1]['role']}" if messages else "no message"
        return (
            f"a prompt must end with a message of the user, found {found}; remove what is behind it, or, if it is the "
            f"answer, name the column in {source.columns.section}.answer_column too"
        )
    return messages


def _content(content: object) -> str | None:
    """The text of a content: itself, or its parts of type text, one behind the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if any(isinstance(part, dict) and part.get("type", "text") != "text" for part in content):
        return None
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def answer_text(value: object, rewards: Sequence[RewardFunction]) -> object:
    """The answer as text: a number without the noise of its format, the one item of a list, else the value itself.

    Several answers, or an object, are JSON for rewards of one's own; a built-in reward compares one.
    """
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return number_text(value) or value
    if isinstance(value, list) and len(value) == 1:
        only = value[0]
        only = only["content"] if isinstance(only, dict) and "content" in only else only
        return answer_text(only, rewards) if not isinstance(only, list) else value
    if isinstance(value, list | dict) and value and not any(reward.function in BUILT_IN for reward in rewards):
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):  # dates, bytes, NaN
            return value
    return value


def number_text(value: int | float | Decimal) -> str:
    """The shortest decimal text that means the number, without an exponent; "" for one that is not finite or huge."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite() or abs(number.adjusted()) > MOST_DIGITS:
        return ""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
