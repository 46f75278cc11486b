"""What a loss or a term of it must be given to be right."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be there for a loss or a term to be right."""

    reference: bool = False
    """Logprobs of the frozen reference model."""
    entropy_gradient: bool = False
    """The entropy with its gradient; without it is a statistic."""
    zero_advantage_rows: bool = False
    """Rows whose advantage is 0 have a gradient, so they must be forwarded."""

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.reference or other.reference,
            self.entropy_gradient or other.entropy_gradient,
            self.zero_advantage_rows or other.zero_advantage_rows,
        )
