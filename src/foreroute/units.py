"""Parse sizes of memory, and format sizes, speeds, shares and other numbers for people."""

import re
from fractions import Fraction

from foreroute.errors import BudgetError

NO_VALUE = "–"
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
    # As memory is counted by most tools: 8G is 8GiB.
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
# Numbers below it without a unit are meant in GiB or MiB, not in bytes, which hold no expert.
_LEAST_BARE = 4096
_FORM = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>%|[a-z]*)", re.IGNORECASE | re.ASCII)
_ACCEPTED = (
    'Write bytes (8589934592), a number with a unit ("8GiB", "1.5 GiB", "512MiB", "8GB"; "8G" is 8GiB), '
    'or a share of the experts ("25%").'
)


def format_memory(num_bytes: int, *, round_up: bool = False) -> str:
    """Format bytes for `parse_memory`, with one decimal in the largest unit that fits: "1.2 GiB".

    Args:
        num_bytes: not negative.
        round_up: round up, so that the text stands for at least `num_bytes`; else to the nearest.
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        unit_bytes = _UNIT_BYTES[unit.lower()]
        if num_bytes >= unit_bytes:
            tenths = (num_bytes * 10 + (unit_bytes - 1 if round_up else unit_bytes // 2)) // unit_bytes
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{num_bytes} B"


def number(value: float | int | None, unit: str = "", decimals: int | None = None) -> str:
    """Format `value` with three significant digits, or all before the point, and its `unit`; a dash for None.

    Args:
        decimals: digits behind the point, instead of that rule.
    """
    if value is None:
        return NO_VALUE
    if decimals is None:
        decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{decimals}f} {unit}".rstrip()


def span(low: float, high: float, unit: str) -> str:
    """Format a range from `low` to `high` with its `unit`; one number if both ends read the same."""
    ends = number(low), number(high)
    return f"{ends[0]} {unit}" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]} {unit}"


def percent(share: float | int | None, decimals: int | None = None, unit: str = "%") -> str:
    """Format a `share` of 0 to 1 as per cent, with `decimals` as of `number`; `unit` "" where a table's head has it."""
    return number(None if share is None else share * 100, unit, decimals)


def megabytes(num_bytes: float) -> str:
    """Format bytes in megabytes (10**6), without the unit; three decimals below 1 MB."""
    return number(num_bytes / 1e6, decimals=3 if num_bytes < 1e6 else None)


def format_speed(bytes_per_s: float) -> str:
    """Format bytes per second: "2.00 GB/s", "350 MB/s"."""
    return number(bytes_per_s / 1e9, "GB/s") if bytes_per_s >= 1e9 else number(bytes_per_s / 1e6, "MB/s")


def kept_bytes(asked: int | str | None) -> int | None:
    """Parse an amount of memory that may be none at all, and no share: bytes; None for None.

    Raises:
        BudgetError: it is no amount.
    """
    if asked is not None and str(asked).strip().endswith("%"):
        raise BudgetError(f'prefix_cache is {str(asked).strip()!r}, a share. Give an amount, such as "1GiB", or 0.')
    return None if asked is None else 0 if str(asked).strip() == "0" else parse_memory(asked, 0)


def parse_memory(memory: str | int, total_expert_bytes: int) -> int:
    """Parse an amount of memory to bytes, rounded down.

    Args:
        memory: bytes, or text: "8GiB", "8G" (both 2**30), "8GB" (10**9), "1.5 GiB", "512MiB", "25%"; in any case.
        total_expert_bytes: 100 %.
    Raises:
        BudgetError: it is none of these, below one byte, above 100 %, or a small number without a unit.
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
        raise BudgetError(f"{memory!r} is not an amount of memory. {_ACCEPTED}")
    if not form["unit"] and wanted < _LEAST_BARE:
        raise _without_unit(memory, form["number"])
    return int(wanted)


def _without_unit(memory: str | int, number: str) -> BudgetError:
    """Refuse a bare number that is too small for bytes: nearly always GiB were meant, or MiB where it is large."""
    meant = f"{number}GiB" if Fraction(number) < 1000 else f"{number}MiB"
    return BudgetError(f"{memory!r} has no unit, and that many bytes hold no expert. Did you mean {meant}? {_ACCEPTED}")
