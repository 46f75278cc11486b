"""Rows of a data set, each with its number, out of the built-in task, a local file or the hub.

Nothing is judged here but the form: a row that cannot be read at all becomes a `Problem` in its place, so that
`prompts.py` can fail on it or skip it like any other bad row.
"""

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from grpo.config.paths import ARITHMETIC, is_data_file, is_local, unpinned
from grpo.config.text import first_line, short
from grpo.data import arithmetic
from grpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow

BOM = b"\xef\xbb\xbf"
SHOWN_COLUMNS = 12


@dataclass(frozen=True, slots=True)
class Source:
    """What to read; `section` is "data" or "eval", the part of the configuration that messages point to."""

    section: str
    name: str
    subset: str | None
    revision: str | None
    split: str
    size: int
    columns: tuple[str, str]

    @property
    def path(self) -> str:
        """The name with `{split}` filled in."""
        return self.name.replace("{split}", self.split)

    @property
    def is_file(self) -> bool:
        """Whether it is, or by its suffix must be, a file on this machine."""
        return is_data_file(self.path)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used, in the field (a column, or "row" for all of it), and what to do."""

    field: str
    text: str


Rows = Iterator[tuple[int, object]]
"""Row numbers, from 1 (lines of a JSONL file), and what stands there: a dict if all is well, or a Problem."""


def place(source: Source) -> str:
    """The name of the source in messages: a path, or "openai/gsm8k/main/train"."""
    if source.is_file:
        return source.path
    return "/".join(filter(None, (source.path, source.subset, source.split)))


def read(source: Source) -> Rows:
    """The rows of a source, read as they are asked for.

    Raises, at the latest while iterating: ConfigError for a split that the built-in task lacks; DataError for a file,
    folder or hub data set that cannot be read and for a missing column of a table.
    """
    if source.name == ARITHMETIC:
        return _arithmetic(source)
    return _file(Path(source.path), source) if source.is_file else _hub(source)


def _file(path: Path, source: Source) -> Rows:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: must be one of {', '.join(READERS)}; convert it and correct {source.section}.source")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: must be a file, not a folder or device; correct {source.section}.source")
    try:
        yield from reader(path, source)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file in {Path.cwd()}; correct {source.section}.source") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file and its permissions"
        ) from error


def _arithmetic(source: Source) -> Rows:
    if source.split not in ("train", "test"):
        raise ConfigError(
            f"{source.section}.split: the built-in task has the splits train and test, not {source.split!r}; choose one"
        )
    return iter(enumerate(arithmetic.rows(cast(arithmetic.Split, source.split), source.size), start=1))


def _jsonl(path: Path, source: Source) -> Rows:
    """One object a line; blank lines are no rows."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return _parse(line)
    except (ValueError, RecursionError) as error:
        return Problem("row", f"{_not_json(line, error)}; write one JSON object a line, in UTF-8")


def _json(path: Path, source: Source) -> Rows:
    """One array of objects; rows are numbered by their place in it."""
    text = path.read_bytes().removeprefix(BOM)
    if not text.strip():
        return
    way_out = "write one array of objects in UTF-8, or name a file with one object a line .jsonl"
    try:
        rows = _parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_not_json(text, error)}; {way_out}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold an array, found {type(rows).__name__}; {way_out}")
    yield from enumerate(rows, start=1)


def _parse(text: bytes) -> object:
    """Bytes that are not UTF-8 become lone surrogates first, so that `_object` can say in which column they are.

    Raises ValueError (also for a number with more digits than Python converts) and RecursionError.
    """
    return json.loads(text.decode(errors="surrogateescape"), object_pairs_hook=_object)


def _object(pairs: list[tuple[str, object]]) -> "dict[str, object] | Problem":
    """A dict, or the first problem in it or in an object below it."""
    names: set[str] = set()
    for name, value in pairs:
        if isinstance(value, Problem):
            return value
        if name in names:
            return Problem(short(name), "is there twice in the same object; keep one")
        if isinstance(value, str) and (found := _not_unicode(value)):
            return Problem(short(name), f"is not valid Unicode ({found}); write it again in UTF-8")
        names.add(name)
    return dict(pairs)


def _not_unicode(text: str) -> str:
    """The first lone surrogate: a byte that was not UTF-8, or half a pair as JSON can spell it; "" if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a surrogate pair, \\u{code:04x}"
        return f"{found} at character {error.start + 1}"
    return ""


def _not_json(text: bytes, error: Exception) -> str:
    try:
        text.decode()
    except UnicodeDecodeError as wrong:
        return f"is not UTF-8 (byte 0x{text[wrong.start]:02x} at position {wrong.start + 1})"
    return f"is not valid JSON ({error})"


def _parquet(path: Path, source: Source) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        _check_columns(source, pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path, columns=_distinct(source.columns), partitioning=None)
        yield from _table_rows(table)
    except (pyarrow.ArrowException, ValueError) as error:  # damaged names of columns are a UnicodeDecodeError
        raise DataError(f"{path}: is not a whole Parquet file ({first_line(error)}); write it again") from error


def _hub(source: Source) -> Rows:
    """A data set on the hub, or a folder of data files on this machine, both through the `datasets` library."""
    if is_local(source.path) and not os.path.isdir(source.path):
        raise DataError(f"{source.path}: there is no such folder in {Path.cwd()}; correct {source.section}.source")
    here = os.path.isdir(source.path)
    if source.revision is None and not here:
        raise ConfigError(unpinned(f"{source.section}.source", source.path))
    import datasets

    try:
        revision = None if here else source.revision
        dataset = datasets.load_dataset(source.path, source.subset, split=source.split, revision=revision)
    except Exception as error:  # its HTTP client, file systems and parsers raise whatever they like
        failed = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = first_line(error.__cause__ if failed and error.__cause__ else error)
        raise DataError(
            f"{source.section}.source: cannot load {place(source)} ({cause}); correct {source.section}.source, "
            f"subset or split, or give a local file ({', '.join(READERS)}), which needs no network"
        ) from error
    _check_columns(source, dataset.column_names)
    yield from _table_rows(dataset.select_columns(_distinct(source.columns)).with_format("arrow")[:])


def _distinct(columns: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(columns))


def _check_columns(source: Source, found: Sequence[str]) -> None:
    for key, column in zip(("question_column", "answer_column"), source.columns, strict=True):
        if column not in found:
            raise DataError(f"{place(source)}: {column}: {missing_column(key, column, found)}")


def missing_column(key: str, wanted: str, found: Sequence[str]) -> str:
    """What to say of a column that `data.question_column` or `data.answer_column` names and a row lacks."""
    near = "".join(f"; did you mean {name!r}" for name in difflib.get_close_matches(wanted, found, n=1))
    shown = [repr(short(name)) for name in found[:SHOWN_COLUMNS]] + ["..."] * (len(found) > SHOWN_COLUMNS)
    return f"there is no such column among {', '.join(shown) or 'none'}{near}; correct it or set data.{key}"


def _table_rows(table: "pyarrow.Table") -> Rows:
    columns = {name: _cells(name, table.column(name)) for name in table.column_names}
    for index in range(table.num_rows):
        row = {name: cells[index] for name, cells in columns.items()}
        yield index + 1, next((cell for cell in row.values() if isinstance(cell, Problem)), row)


def _cells(name: str, column: "pyarrow.ChunkedArray") -> list[object]:
    """Text columns are decoded here, cell by cell: Arrow would fail on the whole column without saying where."""
    from pyarrow import large_binary, types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type)):
        return list(column.to_pylist())
    return [_decode(name, cell) for cell in column.cast(large_binary()).to_pylist()]


def _decode(name: str, cell: bytes | None) -> object:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError as error:
        return Problem(name, f"is not valid Unicode ({error.reason} at byte {error.start + 1}); write it in UTF-8")


READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
