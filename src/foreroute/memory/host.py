"""The host's memory: how much is free, and what of it the experts get."""

import os

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.errors import BudgetError
from foreroute.memory.serving import CHOSEN_RESERVE_BYTES
from foreroute.units import format_memory, parse_memory


def choose_memory(
    asked: int | str | None,
    table: ExpertTable,
    dense_bytes: int,
    beside_bytes: int = 0,
    free_ram_bytes: int | None = None,
) -> int:
    """The budget in bytes: what was asked for, or what free RAM leaves beside the dense weights and a reserve.

    Args:
        table: the experts as they are kept. dense_bytes: of the other weights.
        beside_bytes: for keys and values, where memory is kept for them. free_ram_bytes: now, when None.
    Raises:
        BudgetError: not a size, or more than the machine has.
    """
    total_ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    whole = table.total_slots * table.slot_bytes
    if asked is not None:
        budget = parse_memory(asked, whole)
        if budget > total_ram and budget > whole:
            raise BudgetError(
                f"--memory {asked} is more than this machine's RAM ({format_memory(total_ram)}), and more than all "
                f"experts need ({format_memory(whole)})."
            )
        if min(budget, whole) > total_ram:
            raise BudgetError(
                f"--memory {asked} is more than this machine's RAM ({format_memory(total_ram)}). "
                "Leave --memory out to have it chosen."
            )
        return budget
    free = available_ram() if free_ram_bytes is None else free_ram_bytes
    return min(whole, max(0, free - dense_bytes - CHOSEN_RESERVE_BYTES - beside_bytes))


def available_ram() -> int:
    """Bytes that programs can have without the system swapping."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise BudgetError("This system does not say how much RAM is free. Give --memory.")
