"""The process edge: what an error looks like, and its exit code."""

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from grpo.config.text import clean
from grpo.errors import ConfigError, GrpoError, Interrupted


class Edge(TyperGroup):
    """The process edge: a GrpoError is one block on stderr and its exit code; all else is our bug, with a traceback."""

    def invoke(self, ctx: Any) -> object:  # typer keeps the class of its contexts to itself
        try:
            if os.stat(".").st_nlink == 0:
                raise ConfigError("the working folder must be there, but it is gone; cd to another")
            return super().invoke(ctx)
        except GrpoError as error:
            raise failed(error) from None
        except KeyboardInterrupt:
            raise failed(Interrupted("stopped by Ctrl-C")) from None


def failed(error: GrpoError) -> typer.Exit:
    """Prints the error, each line safe for a terminal; what ends the process with its code."""
    lines = [clean(line) for line in str(error).splitlines()] or [type(error).__name__]
    print(
        "\n".join(f"error: {lines[0]}" if n == 0 else f"       {line}" for n, line in enumerate(lines)), file=sys.stderr
    )
    return typer.Exit(error.exit_code)
