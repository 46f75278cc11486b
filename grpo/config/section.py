"""The base of every section of the configuration."""

from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Closed (an unknown key is an error) and frozen (what ran is what was written)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_pydantic_takes(cls, value: object, info: ValidationInfo) -> object:
        """`steps: true` for 1, and text that cannot be written to a file."""
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("must be whole Unicode text, found half a surrogate pair; remove it")
        kind = cls.model_fields[str(info.field_name)].annotation
        section = isinstance(kind, type) and issubclass(kind, BaseModel)
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)) and not section:
            raise ValueError("must not be true or false; put it in quotes if it is text")
        return value
