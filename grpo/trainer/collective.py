"""Ranks that fail together: a rank that raised alone would leave the others waiting in their next collective."""

from torch import distributed

from grpo.errors import CheckpointError, ConfigError, GrpoError, NonFiniteError

CLASSES = {error.__name__: error for error in (CheckpointError, ConfigError, NonFiniteError)}


def raise_on_all_ranks(error: GrpoError | None) -> None:
    """Raises on all ranks the error of the first rank that has one. A collective."""
    mine = None if error is None else (type(error).__name__, str(error))
    found: list[tuple[str, str] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    for failure in filter(None, found):
        raise CLASSES[failure[0]](failure[1])
