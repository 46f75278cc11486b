"""The checks that need several machines: one probe runs on each."""

import contextlib
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from grpo.config import Config
from grpo.config.text import first_line
from grpo.errors import GrpoError
from grpo.plan.preflight.facts import Facts, look
from grpo.plan.preflight.network import bucket_error, connection_error
from grpo.run.threads import start_lasting
from grpo.store import open_store

SIDE_BY_SIDE = 32


class Probe:
    """Verbs for one machine; `cluster` runs them in actors, and on the driver's machine as they are."""

    def __init__(self, name: str) -> None:
        self.name = name

    def look(self, config: Config) -> Facts:
        """The facts of its machine."""
        return look(config)

    def write(self, url: str, folder: str) -> str:
        """Writes a file of this probe's name as a checkpoint's are (flushed, renamed) and reads it; "" or the error."""
        if url.startswith("s3://") and (error_text := bucket_error()):
            return error_text  # without it a bucket is asked again for minutes
        try:
            open_store(url).write(f"{folder}/{self.name}", self.name.encode())
        except (GrpoError, OSError) as error:
            return first_line(error)
        return f"{url}: what is read back is not what was written" if self.read(url, folder, [self.name]) else ""

    def read(self, url: str, folder: str, names: Sequence[str]) -> list[str]:
        """Those probes whose file is not there, or not as they wrote it."""
        store, missing = open_store(url), []
        for name in names:
            try:
                if store.read(f"{folder}/{name}") != name.encode():
                    missing.append(name)
            except (GrpoError, OSError):
                missing.append(name)
        return missing

    def listen(self) -> int:
        """Takes connections in the background until `close`; the port, on all interfaces."""
        self._socket = socket.create_server(("", 0), backlog=128)
        self._ended = threading.Event()
        start_lasting("probe-accept", self._accept, self._ended)
        return int(self._socket.getsockname()[1])

    def _accept(self) -> None:
        while not self._ended.is_set():
            self._socket.accept()[0].close()

    def connect(self, places: Sequence[tuple[str, int]]) -> list[str]:
        """For each (host, port) in order: "" or why no connection came about."""
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            return list(pool.map(lambda place: connection_error(*place), places))

    def close(self) -> None:
        """Ends `listen`."""
        if hasattr(self, "_socket"):
            self._ended.set()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # a close alone wakes no accept
            self._socket.close()
