"""What is wrong with one row."""

from collections.abc import Iterator
from dataclasses import dataclass

from grpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used, in the field (a column, or "row" for all of it), and what to do.

    `cause` is what to say instead where all rows have it: then it is not theirs.
    """

    field: str
    text: str
    cause: ConfigError | None = None


Rows = Iterator[tuple[int, object]]
"""Row numbers, from 1 (lines of a text file), and what stands there: a dict if all is well, or a Problem."""
