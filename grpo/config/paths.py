"""Where a model and rows come from: a path here, the built-in task, or the hub, and that only at a named commit."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from grpo.config.data import DataRows
from grpo.config.schema import Config
from grpo.store.files import kind_of

ARITHMETIC = "arithmetic"
DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""What may stand behind the suffix of a data file that is text, and how it is called."""


def is_local(path: str) -> bool:
    """Whether only a folder on this machine can be meant; the hub's ids are "name" or "owner/name"."""
    return path.startswith(("/", ".")) or path.count("/") > 1


def is_data_file(path: str) -> bool:
    """Whether it is, or by its suffix must be, a file on this machine."""
    name = Path(path.lower())
    suffix = Path(name.stem).suffix if name.suffix in COMPRESSIONS else name.suffix
    return suffix in DATA_FILES or os.path.isfile(path)


def is_hub_model(path: str) -> bool:
    """Whether only the hub's model of that id can be meant: it is no folder here."""
    return not (is_local(path) or os.path.isdir(path))


def is_hub_data(path: str) -> bool:
    """Whether only the hub's data set of that id can be meant: no file or folder here, and not the built-in task."""
    return not (path == ARITHMETIC or is_data_file(path) or is_local(path) or os.path.isdir(path))


def unpinned(key: str, path: str) -> str:
    """What is wrong with a hub id that has no commit, and the ways out."""
    section, _, name = key.rpartition(".")
    folder, repo = ("folder", "model") if name == "path" else ("file or folder", "data set")
    return (
        f"{key} = {path}: there is no such {folder} in {Path.cwd()}, so it is a {repo} on the hub, which may change "
        f"under a run: set {section}.revision to its commit (40 hex digits, on the hub under Files and versions, "
        f"History), or correct the path"
    )


def problems(config: Config) -> Iterator[str]:
    """Hub ids without a commit, and folders to write to that are links to elsewhere. Reads no network."""
    model, data, held_out = config.model, config.data, config.eval
    if model.revision is None and is_hub_model(model.path):
        yield unpinned("model.path", model.path)
    named: list[tuple[str, DataRows]] = [(f"data.sources.{place}", source) for place, source in enumerate(data.sources)]
    for section, rows in named or [("data", data)]:
        if rows.revision is None and is_hub_data(rows.source.replace("{split}", rows.split)):
            yield unpinned(f"{section}.source", rows.source)
    own = held_out.source.replace("{split}", held_out.split) if held_out.source else ARITHMETIC
    if held_out.revision is None and is_hub_data(own):
        yield unpinned("eval.source", own)
    for key, folder in (("run.dir", config.run.dir), ("checkpoint.dir", config.checkpoint.dir)):
        if folder is not None and os.path.islink(os.path.normpath(folder)):  # a slash or a dot behind it follows it
            yield f"{key} = {folder}: is a link to {os.path.realpath(folder)}; name the folder itself"
    yield from _no_files("data.source", data.source.replace("{split}", data.split))
    yield from _no_files("eval.source", own)
    yield from _no_files("model.path", model.path)
    with contextlib.suppress(OSError):  # no folder yet, or none that can be read: the run will say so
        for entry in os.scandir(config.run.dir):
            if entry.is_symlink():
                yield f"run.dir: {entry.path} is a link, and the run may write there; move it out of the folder"


def _no_files(key: str, path: str) -> Iterator[str]:
    """A pipe, socket or device in the place of a file to read, here or right below: libraries would wait for it."""
    try:
        entries = [path, *(entry.path for entry in os.scandir(path))] if os.path.isdir(path) else [path]
    except OSError:  # who reads it says why it cannot be read
        return
    for entry in entries:
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(entry)
            if not stat.S_ISDIR(status.st_mode) and (kind := kind_of(status.st_mode)):
                yield f"{key} = {path}: {entry} must be a regular file, but is {kind}; take it away"
