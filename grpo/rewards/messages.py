"""JSON lines out of a pipe whose other side is not trusted."""

import json
import os
import select
import time
from typing import Any

LONGEST = 65_536
"""Bytes of a message."""


class Messages:
    """JSON objects, one a line, from the reading end of a pipe that the other side may fill with anything."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = b""

    def read(self, end: float) -> dict[str, Any]:
        """Raises TimeoutError, EOFError at the end of the pipe, ValueError for what is too long or no object."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > LONGEST:
                raise ValueError(f"a message has at most {LONGEST} bytes")
            wait_for(self.fd, select.POLLIN, end)
            data = os.read(self.fd, LONGEST)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except RecursionError:
            message = None
        if not isinstance(message, dict):
            raise ValueError("a message is an object")
        return message

    def waiting(self) -> bool:
        """Whether something has come that nobody asked for; the end of the pipe counts too."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(self._buffer or poll.poll(0))


def wait_for(fd: int, event: int, end: float) -> None:
    """Until a pipe can be read or written. Raises TimeoutError at `end`."""
    poll = select.poll()
    poll.register(fd, event)
    left = end - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError
