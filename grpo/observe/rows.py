"""Rows of the .jsonl files in a run's folder, as they are read: what somebody may have cut or changed by hand."""

import json
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.errors import CheckpointError
from grpo.store.files import NotAFile, open_regular

LARGEST = 1e300
MOST_LINE = 1 << 28
"""Bytes of one row: what is longer was not written by a run."""
Row = dict[str, object]
"""A line of metrics.jsonl, samples.jsonl or timeline.jsonl, as read."""


def step_of(line: str | bytes) -> int:
    """The step of a row; of the half line of a killed run a very late one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return sys.maxsize


def number(row: Row, key: str) -> float:
    """A number that the row must have. Raises CheckpointError for one that somebody else has written."""
    value = row.get(key)
    if not isinstance(value, int | float):
        raise CheckpointError(f"a row must have a number as its {key}, but has {value!r}; take the row out")
    return value


def finite(value: object) -> float | None:
    """A number as a float; None for all else, also for one that is not finite or that no plot could hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return None
    return float(value)


def numbers_of(row: Row) -> dict[str, float | None]:
    """What was measured, by keys of the catalogue; None where it was not finite."""
    return {key: value for key, value in row.items() if "/" in key and isinstance(value, int | float | None)}


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl file of a run, none if there is no file. The half line of a killed run is left out.

    Raises CheckpointError for a line that is no row before the last, and for what is no file or cannot be read.
    """
    broken: str | None = None
    with _reading(path), open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE), b""), start=1):
            if broken is not None:
                rule = "a row must be a JSON object with its event and step"
                raise CheckpointError(f"{path}:{number - 1}: {rule}, but {broken}; delete it")
            try:
                row = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError) as error:
                broken = f"{error}"
                continue
            if isinstance(row, dict) and isinstance(row.get("event"), str) and _is_step(row.get("step")):
                yield row
            else:
                broken = f"found {reprlib.repr(row)}"


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return
    except OSError as error:
        way_out = "take it away" if isinstance(error, NotAFile) else "check that it may be read"
        raise CheckpointError(f"{path}: the rows of a run must be read, but: {error}; {way_out}") from error
