"""Belady's bound: the fewest loads that any cache could have made, had it known all demands from the start.

A *step* is what is demanded together (the experts of one layer of one token): all of it is in the pool at once, as
when the layer is computed. What is evicted is the key whose next step is farthest, never one of the step itself.
"""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from foreroute.errors import BudgetError


def belady_misses(demands: Sequence[Iterable[int]], num_slots: int, resident: Iterable[int] = ()) -> list[list[int]]:
    """Replay demands with an eviction that knows the future.

    Args:
        demands: expert keys (any ints) of each step, in order; doubles within a step count once.
        num_slots: keys that the pool holds.
        resident: keys that are in the pool before the first step, at most `num_slots`; none by default. When the first
            content may be any, the bound is the number of misses less the slots (or 0): the first `num_slots` misses of
            an empty pool are those that fill it.
    Returns:
        One list per step: the keys that had to be loaded, in the step's own order. No schedule has fewer in all, with
        prefetch or without: a guess that comes true is a load like any other.
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
    # Farthest first. A key that was demanded again has a newer entry. The older ones name steps that have passed, and
    # those of the step at hand name itself: both are nearer than any key that can be evicted, and never come up.
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
    """For each key of each step, the next step that demands it, `never` where none does."""
    seen: dict[int, int] = {}
    found: list[list[int]] = []
    for step in reversed(range(len(steps))):
        found.append([seen.get(key, never) for key in steps[step]])
        seen.update(dict.fromkeys(steps[step], step))
    return found[::-1]
