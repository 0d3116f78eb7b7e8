"""A module with the operations of device/paging.py, walked at random beside residency/'s pool with LRU."""

import random
from types import ModuleType

import torch

from foreroute.device import paging
from foreroute.device.paging import CopyList, PagingState
from foreroute.residency.eviction import Lru
from foreroute.residency.slots import LOADING, PINNED, READY, Residency

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 2
KEYS = LAYERS * EXPERTS
TENSORS = ("slot_of_key", "key_of_slot", "stamp", "staged_at", "in_flight", "marks", "counters")


class Walk:
    """Demands, guesses and releases, whose copies arrive at once or late; every step is compared."""

    def __init__(self, module: ModuleType, seed: int) -> None:
        self.module = module
        self.random = random.Random(seed)
        staging = self.random.choice([0, 1, 3, 5])
        num_slots = TOKENS * TOP_K + staging + self.random.choice([0, 1, 3, 20])
        self.state = PagingState.create(num_slots, KEYS, EXPERTS, staging_slots=staging)
        self.pool = Residency(num_slots, KEYS, eviction=Lru(), staging_slots=staging)
        self.counts = dict.fromkeys(("hits", "late_hits", "misses", "prefetched", "releases"), 0)
        self.pinned: list[int] = []
        self.late_hits: list[int] = []

    def run(self, num_steps: int) -> None:
        """Run this many operations."""
        for step in range(num_steps):
            which = self.random.random()
            if which < 0.45:
                self._demand()
            elif which < 0.85:
                self._prefetch()
            else:
                self._release()
            self._compare(step)

    def _arrive(self) -> bool:
        """Whether what was asked for early has arrived; if so, both know."""
        arrived = self.random.random() < 0.6
        if arrived:
            # In the order in which they were asked for: that is how old a staged key is.
            for key in self.on_their_way():
                self.pool.loaded(key)
                if key in self.late_hits:
                    # The demand that it was late for is computed with it.
                    self.pool.pin(key)
                    self.pinned.append(key)
                    self.late_hits.remove(key)
        return arrived

    def on_their_way(self) -> list[int]:
        order = self.state.staged_at.tolist()
        keys = [key for key in range(KEYS) if self.pool.state(key) == LOADING]
        return sorted(keys, key=lambda key: order[self.pool.slot_of(key)])

    def _demand(self) -> None:
        layer, arrived = self.random.randrange(LAYERS), self._arrive()
        self._let_go()
        ids = self._ids((self.random.randint(1, TOKENS), TOP_K))
        keys = sorted({layer * EXPERTS + id for id in ids.flatten().tolist() if 0 <= id < EXPERTS})
        found = self.pool.demand(keys)
        slots, copies = torch.full(ids.shape, -7, dtype=torch.int32), CopyList.create(ids.numel())
        self.module.plan(self.state, layer, ids, slots, copies, arrived=arrived)
        assert copies.pairs() == found.misses
        expected = [
            self.pool.slot_of(layer * EXPERTS + id) if 0 <= id < EXPERTS else -1 for id in ids.flatten().tolist()
        ]
        assert slots.flatten().tolist() == expected
        for name, there in (("hits", found.hits), ("late_hits", found.in_flight), ("misses", found.misses)):
            self.counts[name] += len(there)
        for key, _ in found.misses:
            self.pool.loaded(key)
            self.pool.pin(key)
        self.pinned = [key for key, _ in found.hits + found.misses]
        self.late_hits = [key for key, _ in found.in_flight]

    def _prefetch(self) -> None:
        layer, arrived = self.random.randrange(LAYERS), self._arrive()
        guesses = self._ids((self.random.randint(1, 5),))
        if not arrived:
            # Guessed again while others are in flight: here and there ages differ, see paging's docstring.
            for at, id in enumerate(guesses.tolist()):
                if 0 <= id < EXPERTS and self.pool.state(layer * EXPERTS + id) == READY:
                    guesses[at] = -1
        keys = list(dict.fromkeys(layer * EXPERTS + id for id in guesses.tolist() if 0 <= id < EXPERTS))
        loads, copies = self.pool.prefetch(keys), CopyList.create(len(guesses))
        self.module.plan_prefetch(self.state, layer, guesses, copies, arrived=arrived)
        assert copies.pairs() == loads
        self.counts["prefetched"] += len(loads)

    def _release(self) -> None:
        self._let_go()
        self.module.release(self.state)
        self.counts["releases"] += 1

    def _let_go(self) -> None:
        self.pool.release([key for key in self.pinned if self.pool.state(key) == PINNED])
        self.pinned, self.late_hits = [], []

    def _ids(self, shape: tuple[int, ...]) -> torch.Tensor:
        ids = [self.random.choice([-1, EXPERTS, EXPERTS + 3]) if self.random.random() < 0.1 else
               self.random.randrange(EXPERTS) for _ in range(torch.Size(shape).numel())]  # fmt: skip
        return torch.tensor(ids).view(shape)

    def _compare(self, step: int) -> None:
        slots = [self.pool.slot_of(key) for key in range(KEYS)]
        assert self.state.slot_of_key.tolist() == slots, f"step {step}: {self.pool!r}"
        holders = [-1] * self.state.num_slots
        for key, slot in enumerate(slots):
            if slot >= 0:
                holders[slot] = key
        assert self.state.key_of_slot.tolist() == holders
        assert int((self.state.staged_at > 0).sum()) == self.pool.num_prefetched
        counts = self.state.counts()
        assert (counts["evictions"], counts["prefetch_used"], counts["prefetch_wasted"], counts["shortages"]) == (
            self.pool.evictions, self.pool.prefetch_used, self.pool.prefetch_wasted, 0,
        )  # fmt: skip
        assert {name: counts[name] for name in ("hits", "late_hits", "misses", "prefetched")} == {
            name: count for name, count in self.counts.items() if name != "releases"
        }


def same_decisions(module: ModuleType, num_steps: int) -> None:
    """`module` and the reference are given the same, with many tokens, and leave the same tensors."""
    generator = torch.Generator().manual_seed(1)
    states = [PagingState.create(40, 3 * 20, 20, staging_slots=6) for _ in range(2)]
    for step in range(num_steps):
        layer, arrived = step % 3, step % 4 > 0
        ids = torch.randint(-1, 21, (50 if step % 10 == 9 else 2, 4), generator=generator)
        guesses = torch.randint(-1, 21, (9,), generator=generator)
        seen = []
        for tested, state in zip((paging, module), states, strict=True):
            slots, lists = torch.empty(ids.shape, dtype=torch.int32), [CopyList.create(20) for _ in range(2)]
            tested.plan(state, layer, ids, slots, lists[0], arrived=arrived)
            tested.plan_prefetch(state, (layer + 1) % 3, guesses, lists[1], arrived=arrived)
            seen.append((slots.tolist(), [each.pairs() for each in lists]))
        assert seen[0] == seen[1], f"step {step}"
    for name in TENSORS:
        assert torch.equal(getattr(states[0], name), getattr(states[1], name)), name


def assert_fetched(module: ModuleType, num_programs: int) -> None:
    """Listed records come whole to their slots, and nothing else is touched."""
    record, slot_bytes = 20016, 20480
    arena = torch.randint(0, 256, (7 * slot_bytes + 64,), dtype=torch.uint8)
    shift = -arena.data_ptr() % 16
    offsets = torch.tensor([5, 3, 0, 6, 1, 2, 4]) * slot_bytes + 16
    slots = torch.full((4, slot_bytes), 7, dtype=torch.uint8)
    copies = CopyList.create(5)
    copies.keys[:] = torch.tensor([3, 6, 0, 1, 2])
    copies.slots[:] = torch.tensor([2, 0, 1, 1, 1])
    copies.count.fill_(2)
    module.fetch(arena.data_ptr() + shift, offsets, copies, slots, record_bytes=record, num_programs=num_programs)
    for key, slot in ((3, 2), (6, 0)):
        start = shift + int(offsets[key])
        assert torch.equal(slots[slot, :record], arena[start : start + record])
        assert bool((slots[slot, record:] == 7).all())
    assert bool((slots[[1, 3]] == 7).all())
