"""What is learned from the rewards: the loss, its bounds and terms, the advantages."""

from typing import Literal

from pydantic import Field

from grpo.config.fields import Positive
from grpo.config.section import Section


class Overlong(Section):
    """DAPO's soft overlong punishment, added to the reward for the advantage only: accuracy stays what it is."""

    buffer: Positive
    """Last tokens before rollout.max_tokens over which the penalty grows from 0 to its full value."""
    penalty: float = Field(1.0, gt=0, le=1e6)
    """What a completion of max_tokens loses."""


class Algorithm(Section):
    """What is learned from the rewards."""

    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """dapo: mean over the minibatch's tokens; grpo: over sequences' token means; dr_grpo: sum / (rows x max_tokens)."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """Lower bound of the ratio is 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0, le=1000)
    """Upper bound of the ratio is 1 + clip_high."""
    correction: Literal["none", "tis", "icepop", "seq_mask", "geo_mask"] | None = None
    """Weight w = trainer / sampler for samples of older weights; null: tis with rollout.max_staleness, else none."""
    correction_low: float | None = Field(None, ge=0, lt=1)
    """Lower bound of w: 0 in tis, 0.5 in icepop; of its product over a row 0, of its geometric mean 0.8."""
    correction_high: float | None = Field(None, ge=1, le=1000)
    """Upper bound of w: 2 in tis, 5 in icepop; of its product over a row 3, of its geometric mean 1.2."""
    kl_coef: float = Field(0.0, ge=0, le=1000)
    """Weight of the k3 estimate of KL(policy || reference) in the loss; 0 loads no reference model."""
    entropy_coef: float = Field(0.0, ge=0, le=1000)
    """Weight of the policy's entropy, in nats a token, that the loss rewards; 0 computes no gradient of it."""
    advantage_std: Literal["group", "batch", "none"] = "group"
    """What the centred rewards are divided by: the group's, the batch's or no standard deviation."""
    mask_truncated: bool = False
    """Leave completions that max_tokens has cut out of the loss; they still count in their group's mean and std."""
    overlong: Overlong | None = None
    """Soft penalty for completions that come near rollout.max_tokens; null: none."""
