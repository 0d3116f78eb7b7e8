"""Reads by logical time: what an earlier step asked for has arrived, whatever the clock says."""

from foreroute.transfer.base import Completion, Transfer, TransferProxy


class LogicalTransfer(TransferProxy):
    """A `Transfer` whose completions depend on what was asked for alone, not on how long it took.

    `completed` waits for everything in flight and hands it out. `wait` waits for what is demanded, and hands out that
    alone; with nothing demanded, everything. Both in the order of keys. Nothing is ever cancelled. Two runs that ask
    for the same see the same: for evaluations that have to repeat, at the price of their speed.
    """

    def __init__(self, inner: Transfer) -> None:
        super().__init__(inner)
        self._demanded: set[int] = set()
        self._held: list[Completion] = []

    @property
    def num_in_flight(self) -> int:
        """Requests whose completion has not been handed out yet."""
        return self._inner.num_in_flight + len(self._held)

    def demand(self, key: int, slot: int) -> None:
        """Fill the slot with the key, before every prefetch."""
        self._demanded.add(key)
        self._inner.demand(key, slot)

    def promote(self, key: int) -> None:
        """A prefetch or fill becomes a demand."""
        self._demanded.add(key)
        self._inner.promote(key)

    def cancel(self, key: int) -> bool:
        """Whether a read has started is a question of time: it goes on."""
        return False

    def completed(self) -> list[Completion]:
        """Wait for everything in flight, and hand it out."""
        while self._inner.num_in_flight:
            self._held.extend(self._inner.wait())
        return self._hand_out(self._held)

    def wait(self) -> list[Completion]:
        """Wait for everything demanded, and hand it out; with nothing demanded, everything."""
        if not self._demanded:
            return self.completed()
        while not self._demanded <= {one.key for one in self._held}:
            self._held.extend(self._inner.wait())
        return self._hand_out([one for one in self._held if one.key in self._demanded])

    def reset(self) -> None:
        """Withdraw what has not started, wait for what has, and forget all that is over."""
        self._demanded.clear()
        self._held.clear()
        self._inner.reset()

    def _hand_out(self, over: list[Completion]) -> list[Completion]:
        keys = {one.key for one in over}
        self._held = [one for one in self._held if one.key not in keys]
        self._demanded -= keys
        return sorted(over, key=lambda one: one.key)
