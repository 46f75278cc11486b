"""TRL's cases."""

from typing import Any

from benchmarks.gpu.processes import Failed


def run_peer(*_: Any) -> None:
    """Raises Failed: only our cases run as yet."""
    raise Failed("only our cases run as yet")
