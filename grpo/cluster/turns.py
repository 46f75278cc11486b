"""Engines and ranks on the same GPUs, one after the other (`cluster.colocate`).

Whenever the ranks start or compute, the engines rest: they hold neither weights nor a cache. The sync that follows
wakes them: the ranks give back what they do not use, the weights come, and with their commit the cache.
"""

import time
from collections.abc import Callable, Sequence

from grpo.cluster.context import RunContext
from grpo.cluster.fleet import Fleet
from grpo.cluster.rollouts import engine_lives
from grpo.cluster.trainer_group import TrainerGroup
from grpo.errors import ClusterError, GrpoError
from grpo.interfaces import TrainerRank
from grpo.types import Sample, Stats


class TurnTakingTrainer(TrainerGroup):
    """A trainer on the GPUs of the engines."""

    def __init__(self, context: RunContext, create: Callable[[int], TrainerRank], fleet: Fleet) -> None:
        self.fleet = fleet
        super().__init__(context, create)

    def launch(self) -> None:
        """New ranks, once the engines rest."""
        rest(self.context, self.fleet)
        super().launch()

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """All updates of a step, while the engines rest."""
        began = time.perf_counter()
        rest(self.context, self.fleet)
        rested = time.perf_counter() - began
        return {**super().step(batch, step), "train/seconds_rest": rested}

    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        """The loss of these rows, while the engines rest."""
        rest(self.context, self.fleet)
        return super().evaluate(batch)


def rest(context: RunContext, fleet: Fleet) -> None:
    """Returns once all engines rest, those too that are only starting. Raises ClusterError if too many are lost."""
    while True:
        fleet.gather(wait=True, last=False)
        engines = [slot.engine for slot in fleet.serving]
        calls, seconds = [engine.rest() for engine in engines], context.config.deadlines.sync
        outcomes = context.workers.outcomes(calls, seconds, "rest", engine_lives, finish_first=True)
        failed = [(engine, each) for engine, each in zip(engines, outcomes, strict=True) if isinstance(each, GrpoError)]
        for _, error in failed:
            if not isinstance(error, ClusterError):
                raise error
        if not failed:
            return
        fleet.failed({engine: error for engine, error in failed if isinstance(error, ClusterError)})
