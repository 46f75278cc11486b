"""The numbers of metrics.jsonl as TensorBoard's event files, under the same names."""

import math
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto import event_pb2
from tensorboard.summary import Writer
from tensorboard.summary import _output as library
from tensorboard.summary.writer.record_writer import RecordWriter

from grpo.observe.metrics import lookup
from grpo.store.files import remove_tree


class EventFile:
    """One event file, written at each `flush` and in this thread: whole records or, if the disk is full, none.

    The library's own writes in a thread that ends with a traceback where the disk is full, and never writes again.
    """

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{os.uname().nodename}.{os.getpid()}.{uuid.uuid4().hex}"
        self._file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        self._waiting = BytesIO()
        self.add_event(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_event(self, event: event_pb2.Event) -> None:
        """Takes an event for the next `flush`."""
        RecordWriter(self._waiting).write(event.SerializeToString())

    def flush(self) -> None:
        """Raises OSError; what waited is then given up, and the file is as it was."""
        records, self._waiting = self._waiting.getvalue(), BytesIO()
        before = os.lseek(self._file, 0, os.SEEK_END)
        try:
            if os.write(self._file, records) != len(records):
                raise OSError("written in part: the disk is full")
        except OSError:
            os.ftruncate(self._file, before)
            raise

    def close(self) -> None:
        """Raises OSError."""
        try:
            self.flush()
        finally:
            os.close(self._file)


class _Output(library.DirectoryOutput):  # type: ignore[misc]
    """The library's scalars in our file."""

    def __init__(self, folder: str) -> None:
        self._ev_writer = EventFile(folder)


class TensorBoardTracker:
    """Writes to a folder that `rewind` makes anew, so that it never shows a step twice."""

    name: str = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Writer | None = None

    def log(self, step: int, row: Mapping[str, float | None]) -> None:
        """The numbers of one row."""
        self._add(step, row)
        self._open().flush()

    def rewind(self, rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> None:
        """Shows these rows and no others."""
        self.close(ok=True)
        remove_tree(self._folder)
        for step, row in rows:
            self._add(step, row)
        self._open().flush()

    def close(self, ok: bool) -> None:
        """Writes what is left."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self) -> Writer:
        if self._writer is None:
            self._writer = Writer(_Output(str(self._folder)))
        return self._writer

    def _add(self, step: int, row: Mapping[str, float | None]) -> None:
        for key, value in row.items():
            number = math.nan if value is None else value
            self._open().add_scalar(key, number, step, description=lookup(key)[0].help)
