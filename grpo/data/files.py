"""Rows of one data file, each with its number, by the suffix of its name; behind it may stand that of a compression.

Nothing is judged here but the form: a row that cannot be read at all becomes a `Problem` in its place.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from grpo.config.paths import COMPRESSIONS, DATA_FILES
from grpo.config.text import first_line, short
from grpo.data.problem import Problem, Rows
from grpo.data.tables import arrow_rows, parquet_rows
from grpo.errors import DataError

BOM = b"\xef\xbb\xbf"
MAGIC = {b"\x1f\x8b": "gzip (.gz)", b"\x28\xb5\x2f\xfd": "zstd (.zst)", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
LARGEST_CELL = 1 << 30

Check = Callable[[Sequence[str]], list[str]]
"""Is told the names of a table's columns; says which of them are needed. Raises DataError if one is missing."""


def read_file(path: Path, check: Check, key: str) -> Rows:
    """The rows of a file. `key` is where the configuration names it. Raises DataError for one that cannot be read."""
    *_, kind, compression = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if compression not in COMPRESSIONS or kind in TABLES:
        kind, compression = compression, ""
    if kind not in DATA_FILES:
        kinds = f"{', '.join(DATA_FILES)} (texts also with {', '.join(COMPRESSIONS)})"
        raise DataError(f"{path}: must be one of {kinds}; convert it and correct {key}")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: must be a file, not a folder or device; correct {key}")
    try:
        if kind in TABLES:
            yield from TABLES[kind](path, check)
            return
        with _opened(path, compression) as file:
            yield from TEXTS[kind](path, file, check)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file in {Path.cwd()}; correct {key}") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file and its permissions"
        ) from error


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[IO[bytes]]:
    if not compression:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow

    path.open("rb").close()  # for Python's words on a file that is not there
    with pyarrow.input_stream(str(path), compression=COMPRESSIONS[compression]) as stream:
        yield cast(IO[bytes], io.BufferedReader(cast(Any, stream)))


def _text_begins(path: Path, head: bytes) -> bytes:
    """The beginning of a text file without a byte order mark. Raises DataError for what is no UTF-8 text from there."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            way_out = "write it in UTF-8 (iconv -t UTF-8)" if name == "UTF-16" else "let its name end so"
            raise DataError(f"{path}: is not UTF-8 (byte 0x{head[0]:02x} at position 1) but {name}; {way_out}")
    return head.removeprefix(BOM)


def _jsonl(path: Path, file: IO[bytes], _check: Check) -> Rows:
    """One object a line; blank lines are no rows."""
    for number, line in enumerate(file, start=1):
        line = _text_begins(path, line) if number == 1 else line
        if line.strip():
            yield number, _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return _parse(line)
    except (ValueError, RecursionError) as error:
        return Problem("row", f"{_not_json(line, error)}; write one JSON object a line, in UTF-8")


def _json(path: Path, file: IO[bytes], _check: Check) -> Rows:
    """One array of objects; rows are numbered by their place in it."""
    text = _text_begins(path, file.read())
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
        problem = _problem_in(name, value)
        if problem:
            return problem
        if name in names:
            return Problem(short(name), "is there twice in the same object; keep one")
        names.add(name)
    return dict(pairs)


def _problem_in(name: str, value: object) -> Problem | None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += reversed(item)
        elif isinstance(item, Problem):
            return item
        elif isinstance(item, str) and (found := _not_unicode(item)):
            return Problem(short(name), f"is not valid Unicode ({found}); write it again in UTF-8")
    return None


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


def _separated(path: Path, file: IO[bytes], check: Check, separator: str) -> Rows:
    """A first line of names, then rows; a row is numbered by the line that it begins on. All values are text."""
    text = io.StringIO(_text_begins(path, file.read()).decode(errors="surrogateescape"), newline="")
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(text, delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if names is None:
                raise DataError(f"{path}:1: its names cannot be read ({error}); write it again") from error
            yield number, Problem("row", f"cannot be read ({error}); put a cell with quotes in it in doubled ones")
            continue
        if cells is None:
            return
        if names is None:
            names = cells
            check(names)
        elif cells:
            yield number, _cells_of(names, cells)


def _cells_of(names: Sequence[str], cells: Sequence[str]) -> dict[str, str] | Problem:
    if len(cells) != len(names):
        text = f"has {len(cells)} cells, the first line {len(names)}; put a cell with separators or breaks in quotes"
        return Problem("row", text)
    row = dict(zip(names, cells, strict=True))
    return next((problem for name in names if (problem := _problem_in(name, row[name]))), row)


def _csv(path: Path, file: IO[bytes], check: Check) -> Rows:
    return _separated(path, file, check, ",")


def _tsv(path: Path, file: IO[bytes], check: Check) -> Rows:
    return _separated(path, file, check, "\t")


TEXTS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv}
TABLES = {".parquet": parquet_rows, ".arrow": arrow_rows}
