"""Sizes of memory as people write them: parsed and formatted."""

import re
from fractions import Fraction

from foreroute.errors import BudgetError

_UNIT_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_FORM = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>%|[a-z]*)", re.IGNORECASE | re.ASCII)
_ACCEPTED = (
    'Write bytes (8589934592), a number with a unit ("8GiB", "1.5 GiB", "512MiB", "8GB"), '
    'or a share of the experts ("25%").'
)


def format_memory(num_bytes: int, *, round_up: bool = False) -> str:
    """Bytes as `parse_memory` reads them, one decimal in the largest unit that fits: "1.2 GiB".

    Args:
        num_bytes: not negative.
        round_up: True where the text must stand for at least so many bytes; else it is the nearest.
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        unit_bytes = _UNIT_BYTES[unit.lower()]
        if num_bytes >= unit_bytes:
            tenths = (num_bytes * 10 + (unit_bytes - 1 if round_up else unit_bytes // 2)) // unit_bytes
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{num_bytes} B"


def parse_memory(memory: str | int, total_expert_bytes: int) -> int:
    """Bytes that the user asked for, rounded down.

    Args:
        memory: bytes, or text: "8GiB" (2**30), "8GB" (10**9), "1.5 GiB", "512MiB", "25%"; case does not matter.
        total_expert_bytes: what 100 % stands for.
    Raises:
        BudgetError: it is none of these, not above zero, or above 100 %.
    """
    if not isinstance(memory, str | int):
        raise BudgetError(f"{memory!r} is not an amount of memory. {_ACCEPTED}")
    form = _FORM.fullmatch(str(memory).strip())
    unit = form["unit"].lower() or "b" if form else ""
    if form is None or unit not in {*_UNIT_BYTES, "%"}:
        raise BudgetError(f"{memory!r} is not an amount of memory. {_ACCEPTED}")
    number = Fraction(form["number"])
    if unit == "%":
        if number > 100:
            raise BudgetError(f"{memory!r} is more than all experts. {_ACCEPTED}")
        wanted = number / 100 * total_expert_bytes
    else:
        wanted = number * _UNIT_BYTES[unit]
    if wanted < 1:
        raise BudgetError(f"{memory!r} is no memory at all. {_ACCEPTED}")
    return int(wanted)
