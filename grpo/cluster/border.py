"""The border of an actor: what leaves it is an error of our tree, whatever a library has raised inside.

So nothing that comes out is mistaken for a lost machine, and all of it can be read by the driver.
"""

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from grpo.config import Config
from grpo.errors import GrpoError
from grpo.run.advice import Where, typed
from grpo.run.failures import look

A = TypeVar("A")
TRACEBACKS = "errors"
"""Folder of the run for what is too long for the screen."""


def bordered(actor: type[A], config: Config, role: str, index: int, device: str) -> type[A]:
    """The same actor, whose verbs raise nothing but GrpoErrors."""
    verbs = {
        name: _bordered(method, Where(config, role, index, name, device))
        for name, method in inspect.getmembers(actor, inspect.isfunction)
        if not name.startswith("_")
    }
    return type(actor.__name__, (actor,), verbs)


def _bordered(method: Callable[..., Any], where: Where) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def verb(*args: Any, **kwargs: Any) -> Any:
            with crossing(where):
                return await method(*args, **kwargs)

        return verb

    @functools.wraps(method)
    def plain_verb(*args: Any, **kwargs: Any) -> Any:
        with crossing(where):
            return method(*args, **kwargs)

    return plain_verb


@contextlib.contextmanager
def crossing(where: Where) -> Iterator[None]:
    """Raises GrpoErrors only. A process that Ray ends by SIGTERM is not held up; one that a library ends is."""
    try:
        yield
    except GrpoError:
        raise
    except (Exception, SystemExit) as error:
        if hasattr(error, "ray_terminate_msg"):
            raise
        raise typed(look(error), where, str(traceback_file(where))) from error


def traceback_file(where: Where) -> Path:
    """Where the driver writes the traceback of a failure."""
    name = f"{where.role}-{where.index}-{where.verb}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
    return Path(where.config.run.dir, TRACEBACKS, name)
