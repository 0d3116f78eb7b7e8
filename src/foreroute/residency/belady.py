"""Belady's bound: the fewest loads that any cache could have made, had it known all demands from the start.

A *step* is a set of keys demanded together (one layer's experts for one token): all are in the pool at once, as when
the layer is computed. The key whose next step is farthest is evicted, never one of the current step.
"""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from foreroute.errors import BudgetError


def belady_misses(demands: Sequence[Iterable[int]], num_slots: int, resident: Iterable[int] = ()) -> list[list[int]]:
    """Replay demands with optimal eviction, which knows the future.

    Args:
        demands: expert keys (any ints) of each step, in order; duplicates within a step count once.
        num_slots: keys that the pool holds.
        resident: keys in the pool before the first step, at most `num_slots`; none by default. For the best initial
            content, the bound is max(0, misses - num_slots): the first `num_slots` misses of an empty pool load it.
    Returns:
        One list per step: the keys that had to be loaded, in the step's order. No schedule has fewer in all, with
        prefetch or without: a correct prefetch is a load too.
    Raises:
        BudgetError: a step demands more keys than there are slots.
    Cost: O(n log n) in the number of demanded keys.
    """
    steps = [list(dict.fromkeys(keys)) for keys in demands]
    never = len(steps)
    next_steps = _next_steps(steps, never)
    first_steps = {key: step for step in reversed(range(len(steps))) for key in steps[step]}
    in_pool = {key: first_steps.get(key, never) for key in resident}
    assert len(in_pool) <= num_slots, f"{len(in_pool)} keys cannot be in {num_slots} slots"
    # Farthest first. A key that was demanded again has a newer entry. Its stale ones name past steps, and the current
    # step's keys name that step: both are nearer than any key that can be evicted, and are never popped.
    farthest = [(-step, key) for key, step in in_pool.items()]
    heapify(farthest)
    misses: list[list[int]] = []
    for step, keys in enumerate(steps):
        if len(keys) > num_slots:
            raise BudgetError(
                f"Step {step} demands {len(keys)} experts at once, and {num_slots} slots do not hold them: give more "
                "memory."
            )
        missed = [key for key in keys if key not in in_pool]
        for _ in range(len(in_pool) + len(missed) - num_slots):
            del in_pool[heappop(farthest)[1]]
        for key, next_step in zip(keys, next_steps[step], strict=True):
            in_pool[key] = next_step
            heappush(farthest, (-next_step, key))
        misses.append(missed)
    return misses


def _next_steps(steps: Sequence[Sequence[int]], never: int) -> list[list[int]]:
    """Return, for each key of each step, the next step that demands it, or `never`."""
    seen: dict[int, int] = {}
    found: list[list[int]] = []
    for step in reversed(range(len(steps))):
        found.append([seen.get(key, never) for key in steps[step]])
        seen.update(dict.fromkeys(steps[step], step))
    return found[::-1]
