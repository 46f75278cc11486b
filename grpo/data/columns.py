"""Columns by name: `a.b` is the entry b of the column a, unless a column is called `a.b`; numbers count in lists."""

from collections.abc import Collection, Iterator, Mapping

MISSING = object()


def head_of(path: str, found: Collection[str]) -> str | None:
    """The column, among those that there are, in which the path lies; None if there is none."""
    return next((head for head, _ in _cuts(path) if head in found), None)


def value_at(path: str, row: Mapping[str, object]) -> object:
    """What stands there, None below a null, or MISSING."""
    for head, rest in _cuts(path):
        if head in row:
            return row[head] if rest is None else _below(row[head], rest)
    return MISSING


def _below(value: object, path: str) -> object:
    if isinstance(value, Mapping):
        return value_at(path, value)
    if value is None:
        return None
    head, _, rest = path.partition(".")
    if isinstance(value, list) and head.isdecimal() and len(head) < 9 and int(head) < len(value):
        return _below(value[int(head)], rest) if rest else value[int(head)]
    return MISSING


def _cuts(path: str) -> Iterator[tuple[str, str | None]]:
    """The whole path, then shorter and shorter heads with what is left behind the dot."""
    yield path, None
    head, dot, rest = path.rpartition(".")
    while dot:
        yield head, rest
        head, dot, more = head.rpartition(".")
        rest = f"{more}.{rest}"
