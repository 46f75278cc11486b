"""What an audit has proved, and how it says what it has refuted."""

import reprlib
from collections import Counter
from dataclasses import dataclass, field

from grpo.errors import AuditError
from grpo.types import Skipped

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass
class Proof:
    """Counts of what was proved; `notes` say what is not proved yet."""

    steps: int = 0
    prompts: int = 0
    epochs: int = 0
    skipped: int = 0
    not_drawn: int = 0
    """Turns that a curriculum skipped."""
    samples: int = 0
    versions: int = 0
    evaluations: int = 0
    starts: int = 0
    checkpoints: int = 0
    notes: list[str] = field(default_factory=list)
    turns: Counter[Skipped] = field(default_factory=Counter)
    """Which ones: how often each prompt, for each reason."""


def refuted(where: str, rule: str, found: str, meaning: str) -> AuditError:
    """One line: where, the rule, what was found, what it means."""
    return AuditError(f"{where}: {rule}, but {found}; {meaning}")


def shown(value: object) -> str:
    """Short, on one line."""
    return " ".join(_SHORT.repr(value).split())
