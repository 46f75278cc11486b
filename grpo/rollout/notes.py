"""What failed in the processes of an engine, told to the actor that has started them.

vLLM hands over "see root cause above", or nothing; the cause goes to its log, in the process where it happened. A
handler of that log writes it down for us, in a file of the folder of temporary files.
"""

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path

from grpo.run.failures import Failure, Kind, look

NOTES = "GRPO_ENGINE_NOTES"
"""Path of the file, for the engine's processes."""
LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")


class Notes:
    """Of one engine. Made before the engine starts, in the process that starts it."""

    def __init__(self) -> None:
        self.descriptor, self.path = tempfile.mkstemp(prefix="notes-")
        os.environ[NOTES] = self.path

    def take(self) -> Failure | None:
        """What has failed since the last time: what would come again, before a connection that broke by it."""
        size = os.fstat(self.descriptor).st_size
        lines = os.pread(self.descriptor, size, 0).splitlines()
        os.ftruncate(self.descriptor, 0)
        found = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line of a killed process
                fields = json.loads(line)
                found.append(Failure(**fields | {"kind": Kind(fields["kind"])}))
        return min(found, key=lambda failure: failure.lost, default=None)

    def close(self) -> None:
        """Nothing is noted any longer."""
        Path(self.path).unlink(missing_ok=True)
        os.close(self.descriptor)


class NoteHandler(logging.Handler):
    """Writes down every exception that is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        path, error = os.environ.get(NOTES), record.exc_info and record.exc_info[1]
        if path and error:
            line = json.dumps(look(error).plain()).encode() + b"\n"
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)  # never a new file
                try:
                    os.write(descriptor, line)
                finally:
                    os.close(descriptor)


def listen() -> None:
    """From now on failures of this process are noted."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, NoteHandler) for handler in logger.handlers):
            logger.addHandler(NoteHandler())
