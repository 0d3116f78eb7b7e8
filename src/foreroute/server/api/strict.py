"""What all requests share: JSON's own types, no unknown fields, and whole numbers however they are written."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from foreroute.server.api.problems import not_possible, not_supported

# Validation of a list stops at its first wrong element: reporting a million would take seconds and gigabytes.
SHORT = Field(fail_fast=True)


def _whole(given: Any) -> Any:
    # Languages without whole numbers write 4.0.
    return int(given) if isinstance(given, float) and given.is_integer() else given


def at_most(most: int, param: str, what: str) -> BeforeValidator:
    """Refuse a longer list before anything is done with its elements.

    Args:
        param: the field, for errors. what: what its elements are.
    """

    def check(given: Any) -> Any:
        if isinstance(given, list) and len(given) > most:
            raise not_possible(param, f"There are {len(given)} {what}; at most {most} are taken.")
        return given

    return BeforeValidator(check)


def screened(
    given: Mapping[str, Any],
    harmless: Collection[str],
    refused: Mapping[str, tuple[Any, ...]],
    why: Mapping[str, str] | None = None,
    place: str = "",
) -> dict[str, Any]:
    """Return the fields that are to be obeyed.

    Args:
        harmless: fields that are dropped. refused: those that would change the output, with the values that ask for
            nothing, as None does: with one of these they are dropped too. why: why fields are refused, and what to do.
        place: of `given` in the request, with a dot at its end.
    Raises:
        ApiError: a field of `refused` asks for something; it is named.
    """
    kept = {}
    for name, value in given.items():
        if name in refused:
            if value is not None and value not in refused[name]:
                told = (why or {}).get(name, "leave it out")
                raise not_supported(place + name, f"{place}{name} is not supported here: {told}.")
        elif name not in harmless:
            kept[name] = value
    return kept


# Of a conversation, and of one message.
MOST_MESSAGES, MOST_PARTS, MOST_CALLS, MOST_TOOLS = 4096, 4096, 1024, 1024

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
