"""What stops an update: numbers that are not finite, and samples that the trainer's weights did not make.

All of it looks at numbers that are the same on every rank, so the ranks agree without a word more.
"""

import math
from collections.abc import Sequence

from grpo.config import Config
from grpo.errors import NonFiniteError, WeightSyncError
from grpo.types import Sample, Stats

NAMED = 3
"""Number of prompts that an error message names."""


def check_samples(batch: Sequence[Sample]) -> None:
    """Raises NonFiniteError naming a sample with a logprob that is not finite: its engine cannot be trusted."""
    for sample in batch:
        for place in sample.trained_places:
            logprob = sample.logprobs[place]
            if not math.isfinite(logprob):
                raise NonFiniteError(
                    f"a sampler's logprobs must be finite, but token {place} of sample {sample.index} of prompt "
                    f"{sample.prompt_id} has {logprob}; use model.dtype float32 or a lower train.learning_rate"
                )


def check_mismatch(kl: float, samples: Sequence[Sample], step: int, config: Config) -> None:
    """Raises WeightSyncError if the engines sampled from other weights than the trainer's.

    `kl` is KL(sampler || trainer) per token in nats. It says so only of samples of the newest weights, and where both
    sides take their logprobs over the whole vocabulary.
    """
    newest = config.rollout.top_p == 1.0 and all(sample.lag(step) == 0 for sample in samples)
    limit = config.sync.max_mismatch
    if newest and kl > limit:
        raise WeightSyncError(
            f"engines must sample from the trainer's weights, but in step {step} KL(sampler || trainer) is {kl:.4g} "
            f"nats per token and sync.max_mismatch is {limit:g}; nothing was trained on these samples. Start the run "
            "again, which syncs anew; if it comes back, use model.dtype float32 or raise sync.max_mismatch"
        )


class SkipBudget:
    """Counts updates in a row that were skipped. The count belongs to the checkpoint."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_row = 0

    def admits(self, update: Stats, samples: Sequence[Sample]) -> bool:
        """Whether the update was made: its loss and gradient are finite. Raises NonFiniteError above the limit."""
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(update[name])]
        if not broken:
            self.in_row = 0
            return True
        self.in_row += 1
        if self.in_row > self.limit:
            name = {"loss": "loss", "grad_norm": "gradient's norm"}[broken[0]]
            prompts = ", ".join(list(dict.fromkeys(sample.prompt_id for sample in samples))[:NAMED])
            raise NonFiniteError(
                f"the {name} must be finite: it is {update[broken[0]]} in a minibatch with the prompts {prompts}, and "
                f"{self.in_row} updates in a row were skipped (train.max_skipped_updates is {self.limit}); lower "
                "train.learning_rate or use model.dtype float32"
            )
        return False
