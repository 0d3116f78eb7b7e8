"""Track which expert is in which slot, and choose what to evict.

Pure Python: no torch, no threads, no clock.
"""

from foreroute.residency.eviction import Lfu, Lru, Turns, eviction_of
from foreroute.residency.order import Eviction
from foreroute.residency.sized import SizedResidency
from foreroute.residency.slots import LookupResult, Residency
from foreroute.residency.states import IllegalEvent, NoVictim

__all__ = [
    "Eviction",
    "IllegalEvent",
    "Lfu",
    "LookupResult",
    "Lru",
    "NoVictim",
    "Residency",
    "SizedResidency",
    "Turns",
    "eviction_of",
]
