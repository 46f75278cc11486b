"""What models do to their logits before the softmax: a scale, a soft cap."""

from dataclasses import dataclass
from typing import Any

import torch

from grpo.errors import ConfigError

DIVIDED = frozenset({"granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "minicpm3"})
"""Models whose logits are divided by `logits_scaling`; hyperclovax multiplies."""

SOFTCAPPED = frozenset({"gemma2", "gemma3_text", "gemma4_text", "nanochat", "vaultgemma"})
"""Models with a soft cap on their logits, `final_logit_softcapping`."""


@dataclass(frozen=True, slots=True)
class Shaping:
    """What becomes of a model's logits before the softmax: times `scale`, then `softcap * tanh(logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits as the model gives them out."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def backward(self, grad: torch.Tensor, shaped: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits from that of the shaped ones."""
        if self.softcap is not None:
            grad = grad * (1 - (shaped / self.softcap).square())
        return grad if self.scale == 1.0 else grad * self.scale


def shaping_of(config: Any) -> Shaping:
    """By the names that models have for it. Raises ConfigError for one that is known with other models only."""
    kind, scale = config.model_type, 1.0
    scaling, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    if scaling is not None and kind in DIVIDED:
        scale = 1.0 / float(scaling)
    elif scaling is not None and kind == "hyperclovax":
        scale = float(scaling)
    elif factor is not None and kind.startswith("cohere"):
        scale = float(factor)
    elif scaling not in (None, 1, 1.0) or factor not in (None, 1, 1.0):
        raise ConfigError(
            f"how {kind} scales its logits is not known (logits_scaling {scaling}, logit_scale {factor}); choose a "
            "model of a type in docs/models.md"
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None and kind not in SOFTCAPPED:
        raise ConfigError(
            f"whether {kind} caps its logits is not known (final_logit_softcapping {softcap}); choose a model of a "
            "type in docs/models.md"
        )
    return Shaping(scale, softcap)
