"""Replay evictions on a route with any number of slots: the engine's own, and some that know the future.

Demand alone is replayed, without prefetch, so every miss is a load. The pool starts empty, and loads of the warm-up
steps are not counted. Evictions that the engine offers run on the engine's own code and pool.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from foreroute.report.route import RecordedRoute
from foreroute.residency.belady import belady_misses
from foreroute.residency.eviction import Eviction, eviction_of
from foreroute.residency.slots import Residency

BELADY = "belady"
STATIC = "static"
RANDOM = "random"


@dataclass(frozen=True)
class Outcome:
    """Hits and misses of the counted steps, with the misses' bytes, and the tokens of these steps."""

    hits: int
    misses: int
    miss_bytes: int
    tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of demanded experts that hit, 0 to 1."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def misses_per_token(self) -> float:
        """Experts loaded per token."""
        return self.misses / self.tokens

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes loaded per token."""
        return self.miss_bytes / self.tokens


def sum_of(outcomes: Sequence[Outcome]) -> Outcome:
    """What came of the same steps in pools of their own, for other layers each."""
    return Outcome(
        sum(one.hits for one in outcomes),
        sum(one.misses for one in outcomes),
        sum(one.miss_bytes for one in outcomes),
        outcomes[0].tokens,
    )


class RandomEviction:
    """Evicts any candidate with equal probability: a baseline without memory. O(1)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.reset(0)

    def reset(self, num_keys: int) -> None:
        """See `Eviction`."""
        self._random = random.Random(self._seed)
        self._candidates: list[int] = []
        self._listed = bytearray(num_keys)

    def touch(self, keys: Iterable[int]) -> None:
        """See `Eviction`."""

    def add(self, keys: Iterable[int]) -> None:
        """See `Eviction`."""
        for key in keys:
            if not self._listed[key]:
                self._listed[key] = 1
                self._candidates.append(key)

    def pop(self) -> int:
        """See `Eviction`."""
        if not self._candidates:
            return -1
        at = self._random.randrange(len(self._candidates))
        self._candidates[at], self._candidates[-1] = self._candidates[-1], self._candidates[at]
        key = self._candidates.pop()
        self._listed[key] = 0
        return key

    def tick(self) -> None:
        """See `Eviction`."""


def replay_eviction(route: RecordedRoute, num_slots: int, eviction: Eviction) -> Outcome:
    """Replay `route` on demand alone, in the engine's pool of num_slots under that eviction."""
    pool = Residency(num_slots, route.num_keys, eviction=eviction, staging_slots=0, keys_per_layer=route.keys_per_layer)
    hits = 0
    missed: Counter[int] = Counter()
    for number, step in enumerate(route.steps):
        pool.tick()
        is_counted = number >= route.warm_up
        for layer, keys in enumerate(step):
            demand = pool.demand(keys)
            for key, _ in demand.misses:
                pool.loaded(key)
                pool.pin(key)
            pool.release(keys)
            if is_counted:
                hits += len(demand.hits)
                missed[layer] += len(demand.misses)
    return _outcome(route, hits, missed)


def replay_belady(route: RecordedRoute, num_slots: int) -> Outcome:
    """Replay `route` with the fewest misses possible in num_slots: evict what is needed again last, or never.

    Counted steps after a warm-up start with the content that serves them best, as if the warm-up had loaded it: so this
    bounds every eviction, whatever it did before. Fewest misses are fewest bytes where all experts are of one length.
    """
    groups = [keys for step in route.steps[route.warm_up :] for keys in step]
    resident: list[int] = []
    if route.warm_up:
        first_use = {key: at for at in range(len(groups) - 1, -1, -1) for key in groups[at]}
        resident = sorted(first_use, key=lambda key: (first_use[key], key))[:num_slots]
    missed = Counter(key // route.keys_per_layer for keys in belady_misses(groups, num_slots, resident) for key in keys)
    return _outcome(route, sum(map(len, groups)) - missed.total(), missed)


def replay_static(route: RecordedRoute, num_slots: int) -> Outcome:
    """Keep the experts used most in the counted steps of `route` in num_slots; load all others at each use.

    The choice is made with hindsight: no fixed choice does better, so this bounds placements that are made once.
    Where not all experts fit, as many slots as a layer demands at once stay free for the others.
    """
    steps = route.steps[route.warm_up :]
    uses = Counter(key for step in steps for keys in step for key in keys)
    num_pinned = num_slots if num_slots >= route.num_experts else num_slots - route.most_at_once
    pinned = set(sorted(uses, key=lambda key: (-uses[key], key))[:num_pinned])
    # Without a warm-up, the kept experts had to be loaded too, once.
    resident = set(pinned) if route.warm_up else set()
    hits = 0
    missed: Counter[int] = Counter()
    for step in steps:
        for layer, keys in enumerate(step):
            found = resident.intersection(keys)
            hits += len(found)
            missed[layer] += len(keys) - len(found)
            resident.update(pinned.intersection(keys))
    return _outcome(route, hits, missed)


def replays(seed: int) -> dict[str, Callable[[RecordedRoute, int], Outcome]]:
    """Return every policy by its name, the bound last."""

    def engine(name: str) -> Callable[[RecordedRoute, int], Outcome]:
        return lambda route, num_slots: replay_eviction(route, num_slots, eviction_of(name))

    return {
        **{name: engine(name) for name in ("lru", "lfu")},
        RANDOM: lambda route, num_slots: replay_eviction(route, num_slots, RandomEviction(seed)),
        STATIC: replay_static,
        BELADY: replay_belady,
    }


def _outcome(route: RecordedRoute, hits: int, missed: Counter[int]) -> Outcome:
    """Make an `Outcome`; missed: counts per layer."""
    miss_bytes = sum(count * route.expert_bytes[layer] for layer, count in missed.items())
    return Outcome(hits, missed.total(), miss_bytes, route.counted_tokens)
