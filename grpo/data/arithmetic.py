"""The built-in task: word problems in the manner of GSM8K, made on the spot, so that a run needs no download.

question  Ana has 12 apples and buys 7 more. How many apples does Ana have now?
answer    12 + 7 = 19
          #### 19
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from operator import add, mul, sub
from random import Random
from typing import Literal

from grpo.errors import DataError

Split = Literal["train", "test"]

MAX_ROWS = 50_000
"""Rows of a split that are certain to exist without a duplicate."""

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kim", "Leo", "Mia", "Noah", "Omar")
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "marbles", "pens", "shells", "stamps", "toys")

OPERATIONS = {"+": add, "-": sub, "*": mul}

TEMPLATES: tuple[tuple[str, str], ...] = (
    ("+", "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?"),
    ("+", "There are {a} {things} on the table and {b} in the bag. How many {things} are there in all?"),
    ("-", "{name} has {a} {things} and gives {b} to {friend}. How many {things} are left?"),
    ("-", "{name} has {a} {things}, {friend} has {b} fewer. How many {things} does {friend} have?"),
    ("*", "{name} fills {a} boxes with {b} {things} each. How many {things} is that?"),
    ("*", "{a} friends bring {b} {things} each. How many {things} do they bring?"),
    ("+-", "{name} has {a} {things}, finds {b} more and loses {c}. How many {things} are left?"),
    ("-+", "{name} has {a} {things}, sells {b} and then buys {c}. How many {things} does {name} have now?"),
    ("*+", "{name} buys {a} bags of {b} {things} and gets {c} more from {friend}. How many {things} is that?"),
    ("*-", "{name} fills {a} boxes with {b} {things} each and sells {c} {things}. How many {things} are left?"),
)
"""Operators in the order of the working, and the question around the operands a, b and c."""


def rows(split: Split, size: int) -> list[dict[str, str]]:
    """The first `size` rows of a split: `question`, and `answer` in GSM8K's form (working, then `#### N`).

    Always the same rows, all different; a question's hash decides its split, so that no question is in both.
    Raises DataError for more rows than the task has.
    """
    if size > MAX_ROWS:
        raise DataError(
            f"the built-in task has {MAX_ROWS} different rows a split, but data.size asks for {size}; lower data.size"
        )
    mine = (row for row in _stream() if _split_of(row["question"]) == split)
    return list(islice(_unique(mine), size))


def _stream() -> Iterator[dict[str, str]]:
    random = Random("grpo arithmetic 1")
    while True:
        yield _row(random)


def _row(random: Random) -> dict[str, str]:
    operators, text = random.choice(TEMPLATES)
    name, friend = random.sample(NAMES, 2)
    value = random.randint(2, 9) if operators[0] == "*" else random.randint(6, 50)
    operands, lines = [value], []
    for operator in operators:
        operand = _operand(random, operator, value)
        result = OPERATIONS[operator](value, operand)
        lines.append(f"{value} {operator} {operand} = {result}")
        operands.append(operand)
        value = result
    numbers = dict(zip("abc", operands, strict=False))
    question = text.format(name=name, friend=friend, things=random.choice(THINGS), **numbers)
    return {"question": question, "answer": "\n".join([*lines, f"#### {value}"])}


def _operand(random: Random, operator: str, value: int) -> int:
    """An operand that keeps every result between 2 and 121."""
    highest = {"+": 40, "-": value - 2, "*": 9}[operator]
    return random.randint(2, highest)


def _split_of(question: str) -> Split:
    """One question in eight is held out."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] % 8 == 0 else "train"


def _unique(stream: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    for row in stream:
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row
