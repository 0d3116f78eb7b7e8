"""Which expert is where: the pool of slots, the order of eviction, and the sizes that a memory budget allows.

Pure Python: no torch, no threads, no clock.
"""

from foreroute.residency.budget import SlotPlan, format_memory, parse_memory, plan_slots
from foreroute.residency.eviction import Eviction, Lfu, Lru, Turns, eviction_of
from foreroute.residency.slots import Demand, Residency
from foreroute.residency.states import IllegalEvent, NoVictim

__all__ = [
    "Demand",
    "Eviction",
    "IllegalEvent",
    "Lfu",
    "Lru",
    "NoVictim",
    "Residency",
    "SlotPlan",
    "Turns",
    "eviction_of",
    "format_memory",
    "parse_memory",
    "plan_slots",
]
