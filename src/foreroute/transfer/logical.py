"""Reads in logical time: what an earlier step requested has arrived, whatever the clock says."""

from foreroute.transfer.base import Completion, Transfer, TransferProxy


class LogicalTransfer(TransferProxy):
    """A `Transfer` whose completions depend only on the requests, not on how long they take.

    `completed` waits for everything in flight and returns it. `wait` waits for and returns the demand loads alone, or
    everything if there are none. Both in key order. Nothing is ever cancelled. Runs with the same requests get the same
    completions: for evaluations that have to be reproducible, at the cost of speed.
    """

    def __init__(self, inner: Transfer) -> None:
        super().__init__(inner)
        self._demanded: set[int] = set()
        self._held: list[Completion] = []

    @property
    def num_in_flight(self) -> int:
        """Number of requests whose completion has not been returned yet."""
        return self._inner.num_in_flight + len(self._held)

    def demand(self, key: int, slot: int) -> None:
        """Queue a demand load of `key` into `slot`, before all prefetches."""
        self._demanded.add(key)
        self._inner.demand(key, slot)

    def promote(self, key: int) -> None:
        """Turn a prefetch or deferred load into a demand."""
        self._demanded.add(key)
        self._inner.promote(key)

    def cancel(self, key: int) -> bool:
        """False: no read is cancelled, as whether it has started depends on time."""
        return False

    def completed(self) -> list[Completion]:
        """Wait for everything in flight, and return it."""
        while self._inner.num_in_flight:
            self._held.extend(self._inner.wait())
        return self._hand_out(self._held)

    def wait(self) -> list[Completion]:
        """Wait for all demand loads and return them; without any, for everything."""
        if not self._demanded:
            return self.completed()
        while not self._demanded <= {one.key for one in self._held}:
            self._held.extend(self._inner.wait())
        return self._hand_out([one for one in self._held if one.key in self._demanded])

    def reset(self) -> None:
        """Cancel what has not started, wait for what has, and drop all completions."""
        self._demanded.clear()
        self._held.clear()
        self._inner.reset()

    def _hand_out(self, over: list[Completion]) -> list[Completion]:
        keys = {one.key for one in over}
        self._held = [one for one in self._held if one.key not in keys]
        self._demanded -= keys
        return sorted(over, key=lambda one: one.key)
