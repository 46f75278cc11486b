"""Work in a fork of this process: it has loaded all that this one has, and what it does stays there."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar

SECONDS = 120.0
"""For the fork to answer."""
R = TypeVar("R")


def in_a_fork(work: Callable[[], R], otherwise: Callable[[Callable[[], R]], R]) -> R:
    """What `work` returns in a fork; where that fails or takes longer than SECONDS, what `otherwise` makes of it."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            found: R = ours.recv()
            return found
    except (EOFError, OSError):  # it has said why on stderr
        pass
    finally:
        ours.close()
        process.kill()
        process.join()
    return otherwise(work)


def _answer(work: Callable[[], object], pipe: Connection) -> None:
    pipe.send(work())
