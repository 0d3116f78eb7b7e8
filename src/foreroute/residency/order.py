"""The order in which resident experts are evicted, as the pool asks for it. Implementations: eviction.py."""

from collections.abc import Iterable
from typing import Protocol


class Eviction(Protocol):
    """The order in which resident keys are given up. Called by `Residency` alone, on one thread."""

    def reset(self, num_keys: int) -> None:
        """Forget everything; keys are 0..num_keys-1 from now on."""

    def touch(self, keys: Iterable[int]) -> None:
        """These keys were demanded together, resident or not. Cost: O(1) a key."""

    def add(self, keys: Iterable[int]) -> None:
        """These keys may be chosen from now on; one that is a candidate already stays it. Cost: O(log n) a new key."""

    def pop(self) -> int:
        """Remove the coldest candidate and return it, -1 when there is none. Cost: O(log n), amortised."""

    def tick(self) -> None:
        """One decode step has passed. Cost: O(1), amortised."""
