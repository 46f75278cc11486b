"""The low-rank adapter that is trained in the place of the whole model."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from grpo.config.fields import LayerName
from grpo.config.section import Section


def _all_or_names(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """One sentence where pydantic has one for each kind of value."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be all, or a list of 1 to 256 names of layers, such as [q_proj, v_proj]") from None


Targets = Annotated[
    Literal["all"] | Annotated[tuple[LayerName, ...], Field(min_length=1, max_length=256)],
    WrapValidator(_all_or_names),
]


class Lora(Section):
    """A low-rank adapter (LoRA): the model's own weights stay as they are, W + alpha / rank B A is what is sampled."""

    rank: int = Field(16, ge=1, le=4096)
    """Rank of the change of each matrix: rows of A, columns of B."""
    alpha: float = Field(32.0, ge=1e-3, le=1e6)
    """The change is scaled by alpha / rank."""
    targets: Targets = "all"
    """Names of the linear layers that are changed, such as q_proj or self_attn.q_proj; all: each but the head."""

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def covers(self, layer: str) -> bool:
        """Whether a linear layer of this dotted name is changed."""
        return self.targets == "all" or any(f".{layer}".endswith(f".{target}") for target in self.targets)
