"""How many engines a run has: a number, or a range in which they come and go with nodes."""

from typing import Annotated

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from grpo.config.fields import Actors
from grpo.config.section import Section


class EngineRange(Section):
    """Engines that join as the cluster has room for them, and leave with their nodes."""

    min: Actors = 1
    """Engines that the run starts with; only a loss that leaves fewer counts for run.max_recoveries."""
    max: Actors
    """Engines that it asks the cluster for, as long as it goes on; alone, as many as the machine has GPUs or cores."""

    @model_validator(mode="after")
    def _check_order(self) -> "EngineRange":
        if self.min > self.max:
            raise ValueError(f"min = {self.min} must be at most max = {self.max}; lower min or raise max")
        return self


def _either(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """One sentence where pydantic has one for each kind of value."""
    if isinstance(value, dict | EngineRange):
        return EngineRange.model_validate(value)
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be a whole number from 1 to 10000, or {min, max}") from None


EnginesOrRange = Annotated[Actors | EngineRange, WrapValidator(_either)]


def bounds(engines: int | EngineRange) -> tuple[int, int]:
    """The fewest and the most."""
    return (engines, engines) if isinstance(engines, int) else (engines.min, engines.max)
