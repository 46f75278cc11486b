"""Rows of a data set, each with its number, out of the built-in task, files here or the hub."""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from grpo.config.paths import ARITHMETIC, DATA_FILES, is_data_file, is_local, unpinned
from grpo.config.text import first_line, short
from grpo.data import arithmetic
from grpo.data.columns import head_of
from grpo.data.files import read_file
from grpo.data.problem import Rows
from grpo.data.tables import table_rows
from grpo.errors import ConfigError, DataError

SHOWN_COLUMNS = 12
COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])")
SAVED_SET, SAVED_SETS = "state.json", "dataset_dict.json"
"""What `save_to_disk` of a Dataset, and of a DatasetDict, leaves in its folder."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns make a row, by the names of their keys below `section` of the configuration."""

    section: str
    question_column: str
    answer_column: str
    input_column: str | None = None
    completion: str | None = None
    """Of a supervised warm-up, whose own section has the key."""

    def wanted(self) -> Iterator[tuple[str, str]]:
        """Each key that is set, and its column."""
        for key in ("question_column", "answer_column", "input_column", "completion"):
            column: str | None = getattr(self, key)
            if column is not None:
                yield key, column

    def name_of(self, key: str) -> str:
        """The key as a configuration has it."""
        return "sft.completion" if key == "completion" else f"{self.section}.{key}"


@dataclass(frozen=True, slots=True)
class Source:
    """What to read; `section` ("data", "eval", "data.sources.0") is the part of the configuration that says so."""

    section: str
    name: str
    subset: str | None
    revision: str | None
    split: str
    size: int
    columns: Columns
    label: str = ""
    """What its prompts carry, where there are several sources."""

    @property
    def path(self) -> str:
        """The name with `{split}` filled in."""
        return self.name.replace("{split}", self.split)

    @property
    def is_file(self) -> bool:
        """Whether it is, or by its suffix must be, a file on this machine."""
        return is_data_file(self.path)

    @property
    def is_json(self) -> bool:
        """Whether its values are written by hand, so that quotes make a text of one."""
        return ".json" in self.path.lower() and self.is_file


def place(source: Source) -> str:
    """The name of the source in messages: a path, or "openai/gsm8k/main/train"."""
    if source.is_file:
        return source.path
    return "/".join(filter(None, (source.path, source.subset, source.split)))


def read(source: Source) -> Rows:
    """The rows of a source, read as they are asked for.

    Raises, at the latest while iterating: ConfigError for a split that the built-in task lacks; DataError for a file,
    folder or hub data set that cannot be read or is not what was asked for, and for a missing column of a table.
    """
    if source.name == ARITHMETIC:
        return _arithmetic(source)
    if source.is_file:
        return read_file(Path(source.path), lambda found: needed(source, found), f"{source.section}.source")
    return _set(source)


def _arithmetic(source: Source) -> Rows:
    if source.split not in ("train", "test"):
        raise ConfigError(
            f"{source.section}.split: the built-in task has the splits train and test, not {source.split!r}; choose one"
        )
    return iter(enumerate(arithmetic.rows(cast(arithmetic.Split, source.split), source.size), start=1))


def _set(source: Source) -> Rows:
    """A data set on the hub, or a folder of data files or of `save_to_disk` here, through the `datasets` library."""
    if is_local(source.path) and not os.path.isdir(source.path):
        raise DataError(f"{source.path}: there is no such folder in {Path.cwd()}; correct {source.section}.source")
    here = os.path.isdir(source.path)
    if source.revision is None and not here:
        raise ConfigError(unpinned(f"{source.section}.source", source.path))
    import datasets

    try:
        dataset = _loaded(source, here)
    except Exception as error:  # its HTTP client, file systems and parsers raise whatever they like
        failed = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = first_line(error.__cause__ if failed and error.__cause__ else error)
        raise DataError(
            f"{source.section}.source: cannot load {place(source)} ({cause}); correct {source.section}.source, "
            f"subset or split, or give a local file ({', '.join(DATA_FILES)}), which needs no network"
        ) from error
    _check_what_came(source, dataset, here)
    columns = needed(source, dataset.column_names)
    yield from table_rows(dataset.select_columns(columns).with_format("arrow")[:])


def _loaded(source: Source, here: bool) -> Any:
    import datasets

    names = set(os.listdir(source.path)) if here else set()
    if not names & {SAVED_SET, SAVED_SETS}:
        revision = None if here else source.revision
        return datasets.load_dataset(source.path, source.subset, split=source.split, revision=revision)
    saved: Any = datasets.load_from_disk(source.path)
    if SAVED_SETS not in names:
        return saved
    if source.split not in saved:
        raise ValueError(f"Unknown split {source.split!r}. Should be one of {list(saved)}")
    return saved[source.split]


def _check_what_came(source: Source, dataset: Any, here: bool) -> None:
    """Compares split, number of rows and commit with what was asked for, as far as the library says them."""
    base = re.split(r"[\[+]", source.split)[0]
    split = str(dataset.split or source.split)
    if re.split(r"[\[+]", split)[0] != base:
        asked = f"asked was {source.split}; correct {source.section}.split"
        raise DataError(f"{place(source)}: is the split {split}, {asked}")
    recorded = (dataset.info.splits or {}).get(split) if split == source.split else None
    if recorded is not None and recorded.num_examples not in (None, 0, dataset.num_rows):
        raise DataError(
            f"{place(source)}: has {dataset.num_rows} rows, but its description says {recorded.num_examples}; delete "
            "what the datasets library has of it in its cache, or the folder, and load it again"
        )
    files = [str(file["filename"]) for file in dataset.cache_files]
    commits = set(COMMIT.findall("\n".join([*files, *(dataset.info.download_checksums or {})])))
    if not here and commits and source.revision not in commits:
        raise DataError(
            f"{place(source)}: came from commit {min(commits)}, which the datasets library has in its cache, asked was "
            f"{source.revision}; open the way to the hub, or set {source.section}.revision to that commit"
        )


def needed(source: Source, found: Sequence[str]) -> list[str]:
    """The columns of a table that its rows need. Raises DataError for one that is missing or is there twice."""
    if twice := [name for name in dict.fromkeys(found) if list(found).count(name) > 1]:
        raise DataError(f"{place(source)}: has the column {short(twice[0])!r} twice; keep one")
    heads = []
    for key, column in source.columns.wanted():
        head = head_of(column, found)
        if head is None:
            raise DataError(f"{place(source)}: {column}: {missing_column(source.columns, key, found)}")
        heads.append(head)
    return list(dict.fromkeys(heads))


def missing_column(columns: Columns, key: str, found: Sequence[str]) -> str:
    """What to say of a column that a key names and a row lacks."""
    near = difflib.get_close_matches(str(getattr(columns, key)), found, n=1)
    shown = [repr(short(name)) for name in found[:SHOWN_COLUMNS]] + ["..."] * (len(found) > SHOWN_COLUMNS)
    hint = "".join(f"; did you mean {name!r}" for name in near)
    return f"there is no such column among {', '.join(shown) or 'none'}{hint}; correct it or set {columns.name_of(key)}"
