"""Batches that were drawn ahead, as a checkpoint keeps them: a file of JSON lines, the first of which names the rule.

Numbers come back bit for bit: Python writes a float so that it reads the same, and NaN too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grpo.errors import CheckpointError
from grpo.interfaces import DRAWN, Batch
from grpo.rollout.drawing import Draw
from grpo.types import Group, Prompt, Sample


@dataclass(frozen=True)
class Ahead:
    """Batches behind the step of a checkpoint, in order, and what they depend on but for seeds and weights."""

    rule: Mapping[str, object]
    draws: Sequence[Draw]


def dump_drawn(rule: Mapping[str, object], step: int, batches: Sequence[Batch]) -> bytes:
    """The batches of the steps behind `step`."""
    rows: list[dict[str, object]] = [{"rule": dict(rule)}]
    for number, batch in enumerate(batches, start=step + 1):
        groups = {"groups": _plain(batch.groups), "skipped": _plain(batch.skipped)}
        not_drawn = {"not_drawn": list(batch.not_drawn)} if batch.not_drawn else {}
        rows.append({"step": number, **groups, "stats": batch.stats, "prompts": batch.prompts, **not_drawn})
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def load_drawn(content: bytes) -> Ahead:
    """What `dump_drawn` wrote. Raises CheckpointError for anything else."""
    try:
        first, *rows = map(json.loads, content.splitlines())
        draws = [
            Draw(
                row["step"],
                _groups(row["groups"]),
                _groups(row["skipped"]),
                row["stats"],
                prompts=dict(row["prompts"]),
                not_drawn=[(prompt_id, difficulty) for prompt_id, difficulty in row.get("not_drawn", ())],
            )
            for row in rows
        ]
        return Ahead(dict(first["rule"]), draws)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{DRAWN}: must hold the batches that were drawn ahead, but does not read ({error}); remove this "
            "checkpoint's folder, so that the one before is used"
        ) from error


def _plain(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [asdict(group) for group in groups]


def _groups(rows: Sequence[dict[str, Any]]) -> list[Group]:
    return [Group(_prompt(row["prompt"]), tuple(map(_sample, row["samples"]))) for row in rows]


def _prompt(row: dict[str, Any]) -> Prompt:
    taught = tuple(row.get("completion_ids", ()))  # older checkpoints name none
    return Prompt(**row | {"token_ids": tuple(row["token_ids"]), "completion_ids": taught})


def _sample(row: dict[str, Any]) -> Sample:
    sequences = {name: tuple(row[name]) for name in ("prompt_ids", "output_ids", "logprobs")}
    trained = None if row["trained"] is None else tuple(row["trained"])
    pairs = {name: tuple(map(tuple, row.get(name, ()))) for name in ("versions", "parts")}  # older ones have no parts
    return Sample(**row | sequences | pairs | {"trained": trained})
