"""What the updates of a run minimise: the policy loss of GRPO, or the supervised loss of a warm-up. One face of both.

The trainer asks an objective what it needs and what it measures, and gives it one micro-batch after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from grpo.algorithm.correction import bounds_of
from grpo.algorithm.inputs import LossInputs
from grpo.algorithm.loss import LossOutput, needs_of, policy_loss, statistics_of
from grpo.algorithm.needs import Needs
from grpo.algorithm.supervised import STATISTICS, supervised_loss
from grpo.config import Config


@dataclass(frozen=True, slots=True)
class Objective:
    """`statistics` are the names of what every output of `loss` sums up, "tokens" first."""

    loss: Callable[[LossInputs], LossOutput]
    statistics: tuple[str, ...]
    needs: Needs
    sampled: bool
    """Whether engines have sampled the rows, so that their logprobs must be there and fit."""
    corrected: bool = False
    """Whether the loss needs the logprobs before the step's first update."""


def policy_objective(config: Config) -> Objective:
    """GRPO's, as `algorithm` says."""
    algorithm, bounds = config.algorithm, bounds_of(config)
    loss = partial(policy_loss, algorithm=algorithm, bounds=bounds)
    names = tuple(statistics_of(algorithm))
    return Objective(loss, names, needs_of(algorithm), sampled=True, corrected=bounds.name != "none")


SUPERVISED = Objective(supervised_loss, STATISTICS, Needs(), sampled=False)
"""The warm-up's."""
