"""The losses by name, what each fills in and takes, and the presets: the settings of a paper by its name.

A key of `algorithm` that is not written comes from the preset, then from the loss, then from its default. The functions
stand in `grpo/algorithm/loss.py`; this needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

LossName = Literal[
    "dapo",
    "grpo",
    "dr_grpo",
    "gspo",
    "gspo_token",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "reinforce",
]
AggregationName = Literal["token_mean", "sequence_mean", "prompt_mean", "sequence_sum", "constant"]
AGGREGATIONS: tuple[str, ...] = get_args(AggregationName)


@dataclass(frozen=True, slots=True)
class Variant:
    """A loss as the configuration knows it."""

    aggregation: AggregationName
    """That of the paper."""
    keys: Mapping[str, object] = field(default_factory=dict)
    """The keys of OWN_KEYS that it reads, with their defaults."""
    only: str = ""
    """Why it has no other aggregation; "": it takes each."""
    weighs: str = ""
    """Why no correction may weigh its samples; "": one may."""


def _bounds(low: float, high: float) -> dict[str, object]:
    return {"clip_low": low, "clip_high": high, "dual_clip": None}


_GSPO = "each of its sequences counts once, by one ratio; by tokens, longer ones would count for more"
VARIANTS: dict[str, Variant] = {
    "dapo": Variant("token_mean", _bounds(0.2, 0.28)),
    "grpo": Variant("sequence_mean", _bounds(0.2, 0.28)),
    "dr_grpo": Variant("constant", _bounds(0.2, 0.28)),
    "gspo": Variant("sequence_mean", _bounds(3e-4, 4e-4), only=_GSPO),
    "gspo_token": Variant("sequence_mean", _bounds(3e-4, 4e-4), only=_GSPO),
    "luspo": Variant(
        "sequence_sum",
        _bounds(2e-3, 2.5e-3),
        only="its sequences count by their length, which a mean takes out again",
    ),
    "cispo": Variant("token_mean", {"clip_low": 1.0, "clip_high": 4.0}),
    "sapo": Variant("sequence_mean", {"sapo_temperature": (1.0, 1.05)}),
    "vespo": Variant(
        "token_mean",
        {"vespo_k": (2.0, 3.0), "vespo_lambda": (3.0, 2.0)},
        weighs="its ratio is that of whole sequences by the sampler, which is the whole weight already",
    ),
    "reinforce": Variant("token_mean"),
}
"""By the name in `algorithm.loss`.

Bounds of gspo: arXiv:2507.18071, section 5.1; of luspo: arXiv:2602.05261, section 5.1, as TRL's "Paper Index" has them.
"""

OWN_KEYS = tuple(dict.fromkeys(key for variant in VARIANTS.values() for key in variant.keys))
"""Keys of `algorithm` that some losses read and others do not."""

PresetName = Literal[
    "grpo",
    "deepseek_r1",
    "deepseek_v3_2",
    "dapo",
    "dr_grpo",
    "gspo",
    "luspo",
    "cispo",
    "scalerl",
    "magistral",
    "sapo",
    "vespo",
    "rloo",
    "reinforce_baseline",
    "decoupled",
    "gdpo",
]
PRESETS: dict[str, Mapping[str, object]] = {
    "grpo": {"loss": "grpo", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.04},
    "deepseek_r1": {"loss": "grpo", "clip_low": 1.0, "clip_high": 10.0, "kl_coef": 0.001},
    "deepseek_v3_2": {
        **{"loss": "grpo", "clip_low": 0.2, "clip_high": 0.2, "kl": "k3_ratio", "kl_coef": 0.001},
        "off_policy_mask": 0.5,
    },
    "dapo": {"loss": "dapo", "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0, "rollout.refill": True},
    "dr_grpo": {"loss": "dr_grpo", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "advantage_std": "none"},
    "gspo": {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    "luspo": {"loss": "luspo", "kl_coef": 0.0},
    "cispo": {"loss": "cispo", "kl_coef": 0.0, "model.fp32_head": True},
    "scalerl": {
        **{"loss": "cispo", "clip_high": 4.0, "aggregation": "prompt_mean", "advantage_std": "whiten", "kl_coef": 0.0},
        **{"drop_zero_variance": True, "correction": "none", "model.fp32_head": True},
    },
    "magistral": {
        **{"loss": "dapo", "clip_low": 0.2, "clip_high": 0.28, "advantage_std": "whiten", "kl_coef": 0.0},
        "drop_zero_variance": True,
    },
    "sapo": {"loss": "sapo", "kl_coef": 0.0},
    "vespo": {"loss": "vespo", "kl_coef": 0.0},
    "rloo": {"loss": "reinforce", "aggregation": "sequence_sum", "baseline": "leave_one_out", "advantage_std": "none"},
    "reinforce_baseline": {
        **{"loss": "dapo", "clip_low": 0.2, "clip_high": 0.2, "advantage_std": "whiten"},
        **{"kl": "k2", "kl_coef": 0.01},
    },
    "decoupled": {"loss": "dapo", "clip_low": 0.2, "clip_high": 0.2, "correction": "decoupled"},
    "gdpo": {"loss": "dapo", "reward_combination": "normalise_then_sum"},
}
"""By the name in `algorithm.preset`: keys of `algorithm`, or of another section where they name it."""


def filled(algorithm: Mapping[str, object]) -> dict[str, object]:
    """The section `algorithm` with the keys of its preset, then of its loss, that are not written.

    A null where it means "as the loss has it" counts as not written.
    """
    own = {key: value for key, value in preset_of(algorithm).items() if "." not in key}
    if algorithm.get("kl_coef") == 0:
        own.pop("kl", None)  # there is none to estimate
    keys = own | dict(algorithm)
    if keys.get("baseline") == "leave_one_out":
        keys.setdefault("advantage_std", "none")
    loss = keys.get("loss", "dapo")
    variant = VARIANTS.get(loss) if isinstance(loss, str) else None
    if variant:
        for key, value in {**variant.keys, "aggregation": variant.aggregation}.items():
            if keys.get(key) is None:
                keys[key] = value
    return keys


def preset_of(algorithm: object) -> Mapping[str, object]:
    """The keys of the preset that a section `algorithm` names, if it names one that there is."""
    name = algorithm.get("preset") if isinstance(algorithm, Mapping) else None
    return PRESETS.get(name, {}) if isinstance(name, str) else {}


def with_preset(tree: Mapping[str, object]) -> dict[str, object]:
    """The whole configuration, as it was written, with the preset's keys of other sections than `algorithm`."""
    changed = dict(tree)
    for key, value in preset_of(tree.get("algorithm")).items():
        section, dot, name = key.partition(".")
        written = changed.get(section, {}) if dot else None
        if isinstance(written, Mapping):
            changed[section] = {name: value} | dict(written)
    return changed
