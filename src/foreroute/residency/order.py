"""Protocol of eviction policies: which resident expert to evict. Implementations: eviction.py."""

from collections.abc import Iterable
from typing import Protocol


class Eviction(Protocol):
    """The order in which resident keys are evicted. Called by `Residency` alone, on one thread."""

    def reset(self, num_keys: int) -> None:
        """Forget everything; keys are 0..num_keys-1 from now on."""

    def touch(self, keys: Iterable[int]) -> None:
        """These keys were demanded together, resident or not. Cost: O(1) a key."""

    def add(self, keys: Iterable[int]) -> None:
        """Make these keys candidates for eviction; current candidates stay so. Cost: O(log n) a new key."""

    def pop(self) -> int:
        """Remove and return the coldest candidate, -1 if there is none. Cost: O(log n), amortised."""

    def tick(self) -> None:
        """One decode step has passed. Cost: O(1), amortised."""
