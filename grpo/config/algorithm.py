"""What is learned from the rewards: the loss, its bounds and terms, the advantages."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from grpo.config.fields import Exponent, Positive
from grpo.config.section import Section
from grpo.config.variants import OWN_KEYS, PRESETS, VARIANTS, AggregationName, LossName, PresetName, filled


class Overlong(Section):
    """DAPO's soft overlong punishment, added to the reward for the advantage only: accuracy stays what it is."""

    buffer: Positive
    """Last tokens before rollout.max_tokens over which the penalty grows from 0 to its full value."""
    penalty: float = Field(1.0, gt=0, le=1e6)
    """What a completion of max_tokens loses."""


class Algorithm(Section):
    """What is learned from the rewards. A key that is not written is the preset's, else the loss's."""

    preset: PresetName | None = None
    """Settings of a paper by its name, for the keys that are not written: docs/algorithms.md; null: none."""
    loss: LossName = "dapo"
    """dapo, grpo, dr_grpo: clipped, by tokens; gspo, gspo_token, luspo: by sequences; others: docs/algorithms.md."""
    clip_low: float | None = Field(None, ge=0, le=1)
    """Lower bound of the ratio is 1 - clip_low; null: as the loss has it."""
    clip_high: float | None = Field(None, ge=0, le=1000)
    """Upper bound of the ratio is 1 + clip_high, in cispo too; null: as the loss has it."""
    dual_clip: float | None = Field(None, gt=1, le=1000)
    """Largest ratio that still counts where the advantage is negative, such as 3; null: none."""
    aggregation: AggregationName | None = None
    """How tokens add up: mean of tokens, of sequences' or prompts' token means, of sums, or sums / max_tokens."""
    sapo_temperature: tuple[Exponent, Exponent] | None = None
    """Temperatures of sapo's gate where the advantage is positive and where not; null: 1 and 1.05."""
    vespo_k: tuple[Exponent, Exponent] | None = None
    """Exponents k of vespo's weight where the advantage is at least 0 and where not; null: 2 and 3."""
    vespo_lambda: tuple[Exponent, Exponent] | None = None
    """Decays lambda of vespo's weight where the advantage is at least 0 and where not; null: 3 and 2."""
    correction: Literal["none", "tis", "icepop", "seq_mask", "geo_mask", "decoupled"] | None = None
    """Weight w = trainer / sampler for samples of older weights; null: tis with rollout.max_staleness, else none."""
    correction_low: float | None = Field(None, ge=0, lt=1)
    """Lower bound of w: 0 in tis, 0.5 in icepop; of its product over a row 0, of its geometric mean 0.8."""
    correction_high: float | None = Field(None, ge=1, le=1000)
    """Upper bound of w: 2 in tis, 5 in icepop; of its product over a row 3, of its geometric mean 1.2."""
    off_policy_mask: float | None = Field(None, gt=0, le=1000)
    """Nats per token, sampler to policy, above which a sequence of negative advantage is left out; null: none is."""
    kl: Literal["k1", "k2", "k3", "k3_ratio"] = "k3"
    """Estimate of KL(policy || reference): a term of the loss (k2, k3, k3 x ratio), or k1, taken off the reward."""
    kl_coef: float = Field(0.0, ge=0, le=1000)
    """Weight of KL(policy || reference); 0 loads no reference model."""
    kl_target: float | None = Field(None, gt=0, le=1000)
    """Nats per token at which a controller holds KL(policy || reference), from kl_coef on; null: kl_coef stays."""
    kl_horizon: Positive = 10_000
    """Completions over which the controller moves the coefficient by a fifth at most per 1."""
    entropy_coef: float = Field(0.0, ge=0, le=1000)
    """Weight of the policy's entropy, in nats a token, that the loss rewards; 0 computes no gradient of it."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a reward is compared with: the mean of its group, or of the others of its group (RLOO)."""
    advantage_std: Literal["group", "batch", "whiten", "none"] = "group"
    """What centred rewards are divided by: std of the group, the batch, the batch's centred ones (whiten), or none."""
    reward_combination: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise"
    """Several rewards: compared as one sum, or each within its group, then summed and whitened (GDPO)."""
    drop_zero_variance: bool = False
    """Leave groups of equal rewards out of the loss and its means; else they count in the means, with no gradient."""
    mask_truncated: bool = False
    """Leave completions that max_tokens has cut out of the loss; they still count in their group's mean and std."""
    overlong: Overlong | None = None
    """Soft penalty for completions that come near rollout.max_tokens; null: none."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: object) -> object:
        return filled(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _check_loss(self) -> "Algorithm":
        variant = VARIANTS[self.loss]
        if self.preset and PRESETS[self.preset]["loss"] != self.loss:
            own = PRESETS[self.preset]["loss"]
            raise ValueError(
                f"a preset belongs to its loss: preset {self.preset} sets the keys of loss {own}, but loss = "
                f"{self.loss}; write loss: {own}, or remove one of the two"
            )
        for key in OWN_KEYS:
            if getattr(self, key) is not None and key not in variant.keys:
                losses = ", ".join(name for name, other in VARIANTS.items() if key in other.keys)
                raise ValueError(
                    f"a key must do something: {key} belongs to the losses {losses}, but loss = {self.loss}; remove "
                    "it or choose one of those"
                )
        if variant.only and self.aggregation != variant.aggregation:
            raise ValueError(
                f"{self.loss} with aggregation = {self.aggregation} is not {self.loss}: {variant.only}; use "
                f"aggregation: {variant.aggregation} or another loss"
            )
        if variant.weighs and self.correction not in (None, "none"):
            raise ValueError(
                f"no weight may count twice: {self.loss} takes correction: none, as {variant.weighs}; but correction = "
                f"{self.correction}, remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_kl(self) -> "Algorithm":
        for key, given in [("kl", self.kl if self.kl != "k3" else None), ("kl_target", self.kl_target)]:
            if given is not None and not self.kl_coef:
                raise ValueError(
                    f"KL needs a coefficient, without which no reference model is loaded: {key} = {given}, but kl_coef "
                    f"= 0; set kl_coef, or remove {key}"
                )
        return self

    @model_validator(mode="after")
    def _check_advantages(self) -> "Algorithm":
        if self.baseline == "leave_one_out" and self.advantage_std == "group":
            raise ValueError(
                "leave_one_out is the mean baseline times G / (G - 1), which a group's std takes out again: "
                "baseline = leave_one_out goes with advantage_std: none, whiten or batch, but advantage_std = group"
            )
        if self.reward_combination == "sum_then_normalise":
            return self
        if self.advantage_std != "group" or self.baseline != "mean":
            key = "advantage_std" if self.advantage_std != "group" else "baseline"
            raise ValueError(
                "with normalise_then_sum each reward is divided by its group's std and the sum whitened; another "
                f"normalisation would be the second of its kind: {key} = {getattr(self, key)}, remove it"
            )
        if self.overlong or (self.kl == "k1" and self.kl_coef):
            key = "overlong" if self.overlong else "kl: k1"
            raise ValueError(
                "a penalty is on the scale of the summed reward, but with normalise_then_sum each reward is on a scale "
                f"of its own; remove {key}, or use reward_combination: sum_then_normalise"
            )
        return self
