"""Standard output and standard error that may go away (`| head`, a terminal that is closed, a full disk): what is
written then is dropped, and the run goes on."""

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PATIENT = (errno.EAGAIN, errno.EINTR)


class Screen(io.RawIOBase):
    """A descriptor to which writing never fails; `lost` is why it went away."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.lost: OSError | None = None

    def write(self, data: "ReadableBuffer") -> int:
        """Writes some of it, or drops all."""
        size = memoryview(data).nbytes
        while self.lost is None:
            try:
                return os.write(self.number, data)
            except OSError as error:
                if error.errno not in PATIENT:
                    self._lose(error)
                    break
                select.select([], [self.number], [])
        return size

    def _lose(self, error: OSError) -> None:
        """What libraries write to the descriptor themselves is dropped too."""
        self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.number)
        os.close(nowhere)

    def fileno(self) -> int:
        """The descriptor."""
        return self.number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.number)

    def writable(self) -> bool:
        """It is."""
        return True


def install() -> tuple[Screen, Screen]:
    """Takes the place of sys.stdout and sys.stderr; both, as they are underneath."""
    out, err = Screen(1), Screen(2)
    sys.stdout, sys.stderr = _text(out, sys.stdout), _text(err, sys.stderr)
    return out, err


def _text(screen: Screen, before: object) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None) or "utf-8"
    at_once = screen.isatty() or screen.number == 2 or bool(getattr(before, "write_through", False))
    return io.TextIOWrapper(
        io.BufferedWriter(screen), encoding, errors="backslashreplace", line_buffering=at_once, write_through=at_once
    )
