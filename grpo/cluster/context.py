"""What everything that drives workers shares: one bag in the place of five arguments."""

from dataclasses import dataclass

from grpo.cluster.workers import Workers
from grpo.config import Config
from grpo.errors import ClusterError
from grpo.interfaces import Observer


class RecoveryBudget:
    """Counts replacements since the last checkpoint, so that a run which cannot get on gives up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spent = 0

    def spend(self, lost: ClusterError) -> None:
        """Raises ClusterError if that was once too often."""
        self.spent += lost.counts
        if self.spent > self.limit:
            raise ClusterError(
                f"{lost}; engines or ranks were replaced {self.limit} times since the last checkpoint "
                "(run.max_recoveries), so the run gives up: look at the actors' logs"
            ) from lost

    def reset(self) -> None:
        """A checkpoint was made."""
        self.spent = 0


@dataclass(frozen=True)
class RunContext:
    """The run's configuration, its workers, how often lost ones may still be replaced, and who is told of it."""

    config: Config
    workers: Workers
    recoveries: RecoveryBudget
    observer: Observer
