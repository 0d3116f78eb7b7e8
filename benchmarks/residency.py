"""What residency costs per layer: demand, release, prefetch and all that completes, in microseconds.

    python -m benchmarks.residency [--quick]

The route is drawn, not recorded: popular experts per layer, a slow drift per sequence, and noise, tuned so that with
no prefetch LRU misses about 59 % and LFU 51 % at 25 % residency (a small trained model's: 61 and 55). The guess for the
next layer holds 84 % of its route. No byte moves: demanded loads complete at once, of the guesses the first half before
the next layer's demand and the rest after it (late). The time is the processor's: nothing here waits, and on a shared
machine the clock on the wall would count the neighbours. Limits: 20 us at batch 1, 60 us at batch 4.
"""

import argparse
from collections.abc import Callable
from time import process_time

import numpy as np

from benchmarks._harness import interleave, record, rounded, summary
from foreroute.residency.eviction import Eviction, Lfu, Lru
from foreroute.residency.slots import Residency

LAYERS, EXPERTS, TOP_K = 48, 128, 8
RESIDENT_SHARE, RECALL = 0.25, 0.84
LIMIT_US = {1: 20.0, 4: 60.0}
POLICIES: dict[str, Callable[[], Eviction]] = {"lru": Lru, "lfu": Lfu}

Step = list[tuple[list[int], list[int]]]  # per layer: the keys routed to, and the guess for the layer after it


def draw_route(batch: int, tokens: int, seed: int) -> list[Step]:
    """Steps of distinct keys per layer; `batch` sequences route by themselves and share popularity."""
    rng = np.random.default_rng(seed)
    popularity = rng.gumbel(size=(LAYERS, EXPERTS)) * 0.53
    drift = rng.normal(size=(batch, LAYERS, EXPERTS))
    steps: list[Step] = []
    for _ in range(tokens):
        drift = 0.9 * drift + np.sqrt(1 - 0.9**2) * rng.normal(size=drift.shape)
        logits = popularity + drift * 0.43 + rng.gumbel(size=drift.shape)
        order = np.argsort(-logits, axis=-1)
        routed = [_distinct(order[:, layer, :TOP_K], layer) for layer in range(LAYERS)]
        guesses = [_guess(order[:, layer], layer, rng) for layer in range(LAYERS)]
        steps.append([(routed[layer], guesses[(layer + 1) % LAYERS]) for layer in range(LAYERS)])
    return steps


def _distinct(experts: np.ndarray, layer: int) -> list[int]:
    return list(dict.fromkeys((experts.T.ravel() + layer * EXPERTS).tolist()))


def _guess(order: np.ndarray, layer: int, rng: np.random.Generator) -> list[int]:
    guess = order[:, :TOP_K].copy()
    wrong = rng.random(guess.shape) > RECALL
    guess[wrong] = order[:, TOP_K : 2 * TOP_K][wrong]
    return _distinct(guess, layer)


def run_route(steps: list[Step], eviction: Eviction, *, prefetch: bool) -> tuple[float, dict[str, float]]:
    """Seconds and counts of one walk through the route, in a pool that the first quarter has warmed."""
    num_slots = int(LAYERS * EXPERTS * RESIDENT_SHARE)
    pool = Residency(
        num_slots,
        LAYERS * EXPERTS,
        eviction=eviction,
        staging_slots=2 * TOP_K,
        keys_per_layer=EXPERTS,
    )
    warm = len(steps) // 4
    _walk(pool, steps[:warm], prefetch)
    used, wasted = pool.prefetch_used, pool.prefetch_wasted
    began_s = process_time()
    demands, hits, late = _walk(pool, steps[warm:], prefetch)
    elapsed_s = process_time() - began_s
    return elapsed_s, {
        "layers": (len(steps) - warm) * LAYERS,
        "keys_per_layer": demands / ((len(steps) - warm) * LAYERS),
        "miss_rate": 1 - (hits + late) / demands,
        "late_hit_rate": late / demands,
        "prefetch_used": pool.prefetch_used - used,
        "prefetch_wasted": pool.prefetch_wasted - wasted,
    }


def _walk(pool: Residency, steps: list[Step], prefetch: bool) -> tuple[int, int, int]:
    demands = hits = late = 0
    flying: list[tuple[int, int]] = []
    for step in steps:
        for routed, guess in step:
            demand = pool.demand(routed)
            demands += len(routed)
            hits += len(demand.hits)
            late += len(demand.in_flight)
            for key, _ in flying:
                pool.loaded(key)
            for key, _ in demand.misses:
                pool.loaded(key)
                pool.pin(key)
            for key, _ in demand.in_flight:
                pool.pin(key)
            if prefetch:
                flying = pool.prefetch(guess)
                arrived = (len(flying) + 1) // 2
                for key, _ in flying[:arrived]:
                    pool.loaded(key)
                flying = flying[arrived:]
            pool.release(routed)
        pool.tick()
    for key, _ in flying:
        pool.loaded(key)
    return demands, hits, late


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats; for trying out, not for the record")
    quick = parser.parse_args().quick
    raw: dict[str, list[float]] = {}
    result: dict[str, dict[str, object]] = {}
    for batch in (1, 4):
        steps = draw_route(batch, tokens=60 if quick else 160, seed=batch)
        counts = {name: run_route(steps, policy(), prefetch=True)[1] for name, policy in POLICIES.items()}
        plain = {name: run_route(steps, policy(), prefetch=False)[1] for name, policy in POLICIES.items()}

        def contender(policy: Callable[[], Eviction], steps: list[Step] = steps) -> Callable[[], float]:
            def run() -> float:
                elapsed_s, counted = run_route(steps, policy(), prefetch=True)
                return elapsed_s / counted["layers"] * 1e6

            return run

        figures = interleave({name: contender(policy) for name, policy in POLICIES.items()}, repeats=4 if quick else 11)
        for name, layer_us in figures.items():
            case = f"{name}_batch{batch}"
            raw[case] = layer_us
            result[case] = {
                "layer_us": summary(layer_us),
                "limit_us": LIMIT_US[batch],
                "within_limit": summary(layer_us)["median"] <= LIMIT_US[batch],
                "miss_rate_without_prefetch": plain[name]["miss_rate"],
                **counts[name],
            }
            print(case, rounded(result[case]), flush=True)
    shape = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "resident_share": RESIDENT_SHARE}
    record("residency", rounded({"shape": shape, "cases": result}), rounded({"layer_us": raw}), keep=not quick)


if __name__ == "__main__":
    main()
