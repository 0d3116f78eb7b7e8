"""What all requests share: JSON's own types, no unknown fields, and whole numbers however they are written."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Validation of a list stops at its first wrong element: reporting a million would take seconds and gigabytes.
SHORT = Field(fail_fast=True)


def _whole(given: Any) -> Any:
    # Languages without whole numbers write 4.0.
    return int(given) if isinstance(given, float) and given.is_integer() else given


Whole = Annotated[int, BeforeValidator(_whole)]


class Strict(BaseModel):
    """Accepts only JSON's own types, without conversion ("5" is no number), and no further fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, given: Any) -> Any:
        """Keep only the first unknown field: the answer names just that one, and there may be a million."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        kept = {name: value for name, value in given.items() if name in cls.model_fields}
        first = next((name for name in given if name not in cls.model_fields), None)
        return kept if first is None else {**kept, first: given[first]}
