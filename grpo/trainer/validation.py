"""What stops an update: numbers that are not finite, and samples that the trainer's weights did not make.

All of it looks at numbers that are the same on every rank, so the ranks agree without a word more.
"""

import math
from collections.abc import Sequence

from grpo.config import Config
from grpo.errors import NonFiniteError, WeightSyncError
from grpo.trainer.limits import FAR_SHARE, Limits
from grpo.types import Sample, Stats

NAMED = 3
"""Number of prompts that an error message names."""
MOST_UNKNOWN = 0.01
"""Share of a batch's tokens whose sampler's logprob may be NaN."""
NOT_FINITE = "use model.dtype float32 or a lower train.learning_rate"
DRIFT_FACTOR = 3.0
"""Samples of older weights may differ by so many times what was measured, on a few rows, that the policy moved."""


def check_samples(batch: Sequence[Sample]) -> int:
    """How many trained tokens have a logprob that is not known, NaN: they count as if the trainer had sampled them.

    Raises NonFiniteError naming a sample with an infinite one, or with NaN where there are many: that engine cannot be
    trusted.
    """
    unknown, tokens, first = 0, 0, ""
    for sample in batch:
        for place in sample.trained_places:
            logprob = sample.logprobs[place]
            tokens += 1
            if not math.isfinite(logprob):
                unknown += 1
                found = f"token {place} of sample {sample.index} of prompt {sample.prompt_id} has {logprob}"
                first = first or found
                if math.isinf(logprob):
                    raise NonFiniteError(f"a sampler's logprobs must be finite, but {found}; {NOT_FINITE}")
    if unknown > max(1.0, MOST_UNKNOWN * tokens):
        raise NonFiniteError(
            f"at most {MOST_UNKNOWN:.0%} of a sampler's logprobs may be unknown, but {unknown} of {tokens} are: "
            f"{first}; {NOT_FINITE}"
        )
    return unknown


def check_mismatch(
    found: Stats, samples: Sequence[Sample], step: int, config: Config, limits: Limits, drift: float | None
) -> None:
    """Raises WeightSyncError if the engines sampled from other weights than they say, or compute otherwise.

    `found` are the figures of the mismatch. Samples of the newest weights are held to KL(sampler || trainer) and to the
    share of tokens that are far off; a limit of the user's own is about the mean, and all that is asked. Older ones may
    also differ by what the policy has moved since, `drift`; None: that is not known. They are held to the mean
    difference, in which a token counts FURTHEST at most: few tokens that move far cannot drive it, as the few rows that
    the drift is measured on may lack them.
    """
    kl, far, apart = found["rollout_kl"], found["rollout_far"], found["rollout_abs_diff_bounded"]
    own = config.sync.max_mismatch is not None
    kept = "sync.max_mismatch is" if own else f"rounding in {config.model.dtype} explains"
    way_out = (
        "nothing was trained on these samples. Start the run again, which syncs anew; if it comes back, the engine "
        "computes this model otherwise than the trainer: try model.dtype float32, where little is rounded, or another "
        "model"
    )
    oldest = min(sample.oldest_version for sample in samples)
    if oldest == step - 1:
        if kl <= limits.mismatch and (own or far <= FAR_SHARE):
            return
        raise WeightSyncError(
            f"engines must sample from the trainer's weights, but in step {step} KL(sampler || trainer) is {kl:.4g} "
            f"nats per token ({kept} {limits.mismatch:.2g}), and {far:.1%} of the tokens differ by more than "
            f"{limits.far:.2g} nats; {way_out}"
        )
    rounding = math.sqrt(2.0 * limits.mismatch)
    if drift is None or apart <= rounding + DRIFT_FACTOR * drift:
        return
    raise WeightSyncError(
        f"engines must sample from the weights that they say, but in step {step} samples of version {oldest} differ by "
        f"{apart:.4g} nats per token from the trainer, which has itself moved by {drift:.2g} since ({kept} "
        f"{rounding:.2g}); {way_out}"
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
