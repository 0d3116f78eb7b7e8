"""Which expert is where: the pool of slots, and the order of eviction.

Pure Python: no torch, no threads, no clock.
"""

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
    "Turns",
    "eviction_of",
]
