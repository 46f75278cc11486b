"""Rows of Arrow tables, in files of Parquet or Arrow or from the `datasets` library: only the columns needed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config.text import first_line
from grpo.data.problem import Problem, Rows
from grpo.errors import DataError

if TYPE_CHECKING:
    import pyarrow


def parquet_rows(path: Path, check: Callable[[Sequence[str]], list[str]]) -> Rows:
    """Of a Parquet file. `check` gets the names of the columns and says which are needed. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        needed = check(pyarrow.parquet.read_schema(path).names)
        yield from table_rows(pyarrow.parquet.read_table(path, columns=needed, partitioning=None))
    except (pyarrow.ArrowException, ValueError) as error:  # damaged names of columns are a UnicodeDecodeError
        raise DataError(f"{path}: is not a whole Parquet file ({first_line(error)}); write it again") from error


def arrow_rows(path: Path, check: Callable[[Sequence[str]], list[str]]) -> Rows:
    """Of an Arrow file or stream, as `datasets` keeps them; the rest as for `parquet_rows`."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            table = _arrow_table(file)
            yield from table_rows(table.select(check(table.column_names)))
    except (pyarrow.ArrowException, ValueError, KeyError) as error:
        raise DataError(f"{path}: is not a whole Arrow file ({first_line(error)}); write it again") from error


def _arrow_table(file: "pyarrow.NativeFile") -> "pyarrow.Table":
    import pyarrow

    try:
        return pyarrow.ipc.open_file(file).read_all()
    except pyarrow.ArrowInvalid:
        file.seek(0)
        return pyarrow.ipc.open_stream(file).read_all()


def table_rows(table: "pyarrow.Table") -> Rows:
    """The rows of a table, each with a Problem in the place of a cell that is no text though it should be."""
    columns = {name: _cells(name, table.column(name)) for name in table.column_names}
    for index in range(table.num_rows):
        row = {name: cells[index] for name, cells in columns.items()}
        yield index + 1, next((cell for cell in row.values() if isinstance(cell, Problem)), row)


def _cells(name: str, column: "pyarrow.ChunkedArray") -> list[object]:
    """Text columns are decoded here, cell by cell: Arrow would fail on the whole column without saying where."""
    from pyarrow import large_binary, types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_float16(column.type) or types.is_float32(column.type):
        return [None if cell is None else float(str(cell)) for cell in _short_floats(column)]
    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type):
        return [_decode(name, cell) for cell in column.cast(large_binary()).to_pylist()]
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # of text inside of structs or lists
        return [_cell(name, cell) for cell in column]


def _short_floats(column: "pyarrow.ChunkedArray") -> list[object]:
    """With the shortest digits that mean the same in their precision: 0.1, not 0.10000000149011612."""
    kind = column.type.to_pandas_dtype()
    return [None if cell is None else kind(cell) for cell in column.to_pylist()]


def _decode(name: str, cell: bytes | None) -> object:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError as error:
        return Problem(name, f"is not valid Unicode ({error.reason} at byte {error.start + 1}); write it in UTF-8")


def _cell(name: str, cell: "pyarrow.Scalar") -> object:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Problem(name, f"is not valid Unicode ({error.reason} at byte {error.start + 1}); write it in UTF-8")
