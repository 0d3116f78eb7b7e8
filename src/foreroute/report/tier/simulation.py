"""Simulate decoding on a memory tier: one link that copies experts, one processor that computes, and a pool of slots.

Times are those of events, not averages: a layer begins when the one before it ends, its absent experts queue on the
link, those of the next layer are guessed as it begins to compute and are copied behind every demand, and an expert is
computed once it is there. Which expert stays is decided by the engine's own pool (residency/). No clock, no threads.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from foreroute.residency.eviction import Eviction
from foreroute.residency.slots import Residency
from foreroute.residency.states import LOADING

Keys = Sequence[int]


@dataclass(frozen=True)
class Tier:
    """What a machine takes for a step's parts, in seconds.

    link_bytes_per_s: of copies of experts into the slots. copy_s: of a copy beside its bytes (a launch, a seek).
    before_s: by MoE layer, from its begin until its router has chosen (attention, norms, what is dense).
    expert_s: by MoE layer, to compute one expert that is resident. after_s: of a step, behind its last layer.
    """

    link_bytes_per_s: float
    before_s: tuple[float, ...]
    expert_s: tuple[float, ...]
    after_s: float = 0.0
    copy_s: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """Means over the counted steps, in seconds and bytes of one step.

    step_s: a step. stall_s: of it, with nothing to compute. copied_bytes: by the link, wrong guesses too.
    """

    step_s: float
    stall_s: float
    copied_bytes: float
    misses: float
    late_hits: float


class _Link:
    """Copies one expert at a time: demands in order, then prefetches in order; a copy that has begun ends."""

    def __init__(self, tier: Tier, nbytes: Sequence[int], keys_per_layer: int) -> None:
        self._tier, self._nbytes, self._width = tier, nbytes, keys_per_layer
        self._demanded: deque[tuple[int, float]] = deque()
        self._prefetched: dict[int, float] = {}
        self._copied: int | None = None
        self._ends_s = 0.0
        self.copied_bytes = 0

    def demand(self, key: int, at_s: float) -> None:
        self._demanded.append((key, at_s))

    def prefetch(self, key: int, at_s: float) -> None:
        self._prefetched[key] = at_s

    def promote(self, key: int) -> None:
        """A prefetch that has not begun becomes a demand, asked when it was."""
        if key in self._prefetched:
            self._demanded.append((key, self._prefetched.pop(key)))

    def cancel(self, key: int) -> bool:
        """Whether the prefetch had not begun, and is gone."""
        return self._prefetched.pop(key, None) is not None

    def next_end(self, now_s: float) -> float | None:
        """When the copy ends that is under way or begins next; None if nothing is asked. Begins it."""
        if self._copied is None:
            self._begin(now_s)
        return None if self._copied is None else self._ends_s

    def take(self) -> int:
        """The key whose copy has ended."""
        key, self._copied = self._copied, None
        assert key is not None, "nothing is copied"
        return key

    def _begin(self, now_s: float) -> None:
        if self._demanded:
            key, asked_s = self._demanded.popleft()
        elif self._prefetched:
            key = next(iter(self._prefetched))
            asked_s = self._prefetched.pop(key)
        else:
            return
        nbytes = self._nbytes[key // self._width]
        # Not before it was asked for, nor before the link was free.
        begun_s = max(self._ends_s, asked_s)
        self._copied, self._ends_s = key, begun_s + self._tier.copy_s + nbytes / self._tier.link_bytes_per_s
        self.copied_bytes += nbytes


class TierSimulation:
    """One run of decode steps.

    Args:
        expert_bytes: as copied, by MoE layer. num_slots, eviction, staging_slots: of the pool; num_keys and
        keys_per_layer as of `RecordedRoute`.
        executes_guesses: compute the experts that were guessed in place of the router's, where there is a guess, as the
            published method does.
        in_one_call: compute a layer's experts when all of them are there, not each as it arrives.
    """

    def __init__(
        self,
        tier: Tier,
        expert_bytes: Sequence[int],
        num_keys: int,
        keys_per_layer: int,
        num_slots: int,
        eviction: Eviction,
        *,
        staging_slots: int = 0,
        executes_guesses: bool = False,
        in_one_call: bool = False,
    ) -> None:
        self._tier, self._width = tier, keys_per_layer
        self._executes_guesses, self._in_one_call = executes_guesses, in_one_call
        self._link = _Link(tier, expert_bytes, keys_per_layer)
        self._pool = Residency(
            num_slots, num_keys, eviction=eviction, staging_slots=staging_slots, keys_per_layer=keys_per_layer
        )
        self._now_s = self._stall_s = 0.0
        self._misses = self._late_hits = 0

    def run(self, steps: Sequence[Sequence[Keys]], guesses: Sequence[Sequence[Keys]], warm_up: int = 0) -> Simulated:
        """Simulate all `steps` ([step][layer] -> distinct keys), and return means over those behind the warm-up.

        guesses: [step][layer] -> keys guessed for that layer, best first, made while the layer before it is computed;
            layer 0's are made as the step begins. Empty: no guess.
        """
        assert warm_up < len(steps), f"{warm_up} of {len(steps)} steps are not counted"
        before = (0.0, 0.0, 0, 0, 0)
        for number, (step, guessed) in enumerate(zip(steps, guesses, strict=True)):
            if number == warm_up:
                before = self._counts()
            self._step(step, guessed)
        now_s, stall_s, nbytes, misses, late = (
            (after - start) / (len(steps) - warm_up) for after, start in zip(self._counts(), before, strict=True)
        )
        return Simulated(now_s, stall_s, nbytes, misses, late)

    def _counts(self) -> tuple[float, float, int, int, int]:
        return self._now_s, self._stall_s, self._link.copied_bytes, self._misses, self._late_hits

    def _step(self, step: Sequence[Keys], guessed: Sequence[Keys]) -> None:
        self._pool.tick()
        if guessed[0]:
            self._guess(guessed[0])
        for layer, routed in enumerate(step):
            self._pass(self._tier.before_s[layer])
            is_executed = self._executes_guesses and guessed[layer]
            keys = sorted(guessed[layer]) if is_executed else routed
            self._layer(layer, keys, guessed[layer], guessed[layer + 1] if layer + 1 < len(step) else ())
        self._pass(self._tier.after_s)

    def _layer(self, layer: int, keys: Keys, was_guessed: Keys, next_guess: Keys) -> None:
        for key in set(was_guessed).difference(keys):
            if self._pool.state(key) == LOADING and self._link.cancel(key):
                self._pool.cancel(key)
        found = self._pool.demand(keys)
        self._misses += len(found.misses)
        self._late_hits += len(found.in_flight)
        for key, _ in found.misses:
            self._link.demand(key, self._now_s)
        waited = {key for key, _ in (*found.misses, *found.in_flight)}
        for key in waited:
            self._link.promote(key)
        self._guess(next_guess)
        self._compute(self._tier.expert_s[layer], len(found.hits), waited)
        for key in waited:
            self._pool.pin(key)
        self._pool.release(keys)

    def _compute(self, expert_s: float, num_hits: int, waited: set[int]) -> None:
        """Compute resident experts, then those that are waited for, as they arrive or all at the end."""
        if self._in_one_call:
            missing = len(waited)
            while missing:
                missing -= len(self._wait(waited))
            self._pass(expert_s * (num_hits + len(waited)))
            return
        ready = waited.intersection(self._pass(expert_s * num_hits))
        for _ in waited:
            if not ready:
                ready.update(self._wait(waited))
            ready.pop()
            ready.update(waited.intersection(self._pass(expert_s)))

    def _guess(self, keys: Keys) -> None:
        for key, _ in self._pool.prefetch(keys):
            self._link.prefetch(key, self._now_s)

    def _pass(self, seconds: float) -> list[int]:
        """Compute for `seconds`; return the keys whose copies end meanwhile."""
        until_s = self._now_s + seconds
        ended = []
        while (end_s := self._link.next_end(self._now_s)) is not None and end_s <= until_s:
            ended.append(self._arrive())
        self._now_s = until_s
        return ended

    def _wait(self, wanted: set[int]) -> list[int]:
        """Wait for one of the `wanted` keys; return it."""
        while True:
            end_s = self._link.next_end(self._now_s)
            assert end_s is not None, f"none of {wanted} is being copied"
            self._stall_s += max(0.0, end_s - self._now_s)
            self._now_s = max(self._now_s, end_s)
            if (key := self._arrive()) in wanted:
                return [key]

    def _arrive(self) -> int:
        key = self._link.take()
        self._pool.loaded(key)
        return key
