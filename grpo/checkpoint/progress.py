"""Where the loop is: what a checkpoint keeps of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where the loop is after a finished step; a checkpoint keeps it as JSON."""

    prompts: Mapping[str, object]
    """State of the prompt stream: what the finished steps have consumed, not what the next one has taken."""
    step: int = 0
    zero_variance_steps: int = 0
    """Steps in a row up to this one that had nothing to teach."""
    evaluated: int = -1
    """Step of the last evaluation."""
    score: float | None = None
    """Accuracy of the last evaluation, or the step's mean reward where nothing is evaluated."""

    def with_prompts(self, more: Mapping[str, object]) -> "Progress":
        """Where more is said of the prompts."""
        return replace(self, prompts={**self.prompts, **more}) if more else self

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """What `asdict` made, also in the words of 0.1.0 as it was first released (`silent`)."""
        words = {"silent": "zero_variance_steps"}
        return cls(**{words.get(name, name): value for name, value in state.items()})
