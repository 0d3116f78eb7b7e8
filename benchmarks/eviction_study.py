"""How far from Belady's bound is an eviction that has to decide now, and what brings it nearer?

    python -m benchmarks.record_traces models/foreroute-tiny ... --text held-out.txt --memory 25% --out build/traces
    python -m benchmarks.eviction_study build/traces/foreroute-tiny-25.jsonl ...

Demand alone, a global pool, a fifth of the tokens to warm up; misses per token, and as a multiple of Belady's. What the
engine has runs as the engine has it. The designs beside it run in a plain simulation: each says what every expert is
worth now, and the least worth goes.

    guarded        LFU, and what is guessed for the next layer (known beforehand, which flatters it) never goes
    next use       LFU's rate -> expected tokens until the next use, and the layers until the expert's turn
    gate weight    LFU that counts uses by their gate weight
    guesses count  LFU in which a wrong guess counts a part of a use
    last turn      LFU that counts a use at the layer's last turn 5 times, until the next turn
    order          ... and an expert less, the further off its layer is
    learned        the worth of 7 frequencies and of the last turn, fitted to this trace's first half, counted on the
                   second (as are all others in the column "second half")
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import _harness
from foreroute.errors import BudgetError
from foreroute.report.offline import replay_belady, replay_eviction
from foreroute.report.route import RecordedRoute, pool_of, route_of
from foreroute.report.trace_file import read_recording
from foreroute.residency.eviction import Lfu, Lru

SHARES = ("12.5%", "25%", "50%")
DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.995)
Guesses = list[list[tuple[int, ...]]]  # [step][layer] -> keys


def guesses_and_weights(path: Path, route: RecordedRoute) -> tuple[Guesses, np.ndarray]:
    """Of every decode step: the keys guessed per layer, and [steps, keys] gate weights (0 where not routed)."""
    width, num_layers = route.keys_per_layer, len(route.top_k)
    weights = np.zeros((len(route.steps), route.num_keys))
    guesses: Guesses = []
    is_decode = False
    for line in path.open(encoding="utf-8"):
        event = json.loads(line)
        if event["event"] == "step":
            is_decode = event["phase"] == "decode"
            if is_decode:
                guesses.append([()] * num_layers)
        elif is_decode and event["event"] == "guess":
            guesses[-1][event["layer"]] = tuple(event["layer"] * width + expert for expert in event["experts"])
        elif is_decode and event["event"] == "layer":
            for experts, gates in zip(event["ids"], event["weights"], strict=True):
                for expert, gate in zip(experts, gates, strict=True):
                    weights[len(guesses) - 1, event["layer"] * width + expert] = gate
    return guesses, weights


class Design:
    """What every key is worth, kept as decayed counts of its uses: one row per decay.

    Args:
        decays: per turn of the key's layer. coefficients: the worth of each count.
        order: what a round's delay costs, 1 nothing; a layer that is further off counts for less.
        per_step: counts decay when the step begins, as LFU's do, not at the layer's turn.
    """

    def __init__(
        self,
        route: RecordedRoute,
        decays: Sequence[float] = (0.97,),
        coefficients: Sequence[float] = (1.0,),
        *,
        order: float = 1.0,
        per_step: bool = False,
        weights: np.ndarray | None = None,
        guesses: Guesses | None = None,
        guess_use: float = 0.0,
        guard: bool = False,
        next_use: bool = False,
    ) -> None:
        self.width, self.num_layers = route.keys_per_layer, len(route.top_k)
        self.layer_of = np.arange(route.num_keys) // self.width
        self.decays = np.array(decays)[:, None]
        self.coefficients = np.array(coefficients)
        self.counts = np.zeros((len(decays), route.num_keys))
        self.order, self.per_step, self.weights = order, per_step, weights
        self.guesses, self.guess_use, self.guard, self.next_use = guesses, guess_use, guard, next_use

    def begin(self) -> None:
        """A step begins."""
        if self.per_step:
            self.counts *= self.decays

    def touch(self, step: int, layer: int, keys: list[int]) -> None:
        """The layer's turn."""
        if not self.per_step:
            self.counts[:, layer * self.width : (layer + 1) * self.width] *= self.decays
        self.counts[:, keys] += 1.0 if self.weights is None else len(keys) * self.weights[step, keys]
        if self.guesses is not None and self.guess_use:
            self.counts[:, [key for key in self.guesses[step][layer] if key not in keys]] += self.guess_use

    def worth(self, step: int, layer: int) -> np.ndarray:
        """Of all keys, while that layer is computed."""
        worth = self.coefficients @ self.counts
        off = (self.layer_of - layer - 1) % self.num_layers
        if self.next_use:
            rate = np.clip(worth * (1 - self.decays[0, 0]), 1e-3, 1)
            worth = -(self.num_layers / rate + off)
        elif self.order != 1:
            worth = worth * self.order ** (off / self.num_layers)
        if self.guard and self.guesses is not None and layer + 1 < self.num_layers:
            worth = worth.copy()
            worth[list(self.guesses[step][layer + 1])] += 1e9
        return worth


def misses_per_token(route: RecordedRoute, num_slots: int, design: Design) -> float:
    """Demand alone, the least worth of what the layer does not need goes."""
    there = np.zeros(route.num_keys, bool)
    num_missed = 0
    for number, step in enumerate(route.steps):
        design.begin()
        for layer, demanded in enumerate(step):
            keys = list(demanded)
            design.touch(number, layer, keys)
            missed = [key for key in keys if not there[key]]
            num_missed += len(missed) * (number >= route.warm_up)
            to_go = int(there.sum()) + len(missed) - num_slots
            if to_go > 0:
                worth = np.where(there, design.worth(number, layer), np.inf)
                worth[keys] = np.inf
                there[np.argsort(worth, kind="stable")[:to_go]] = False
            there[keys] = True
    return num_missed / route.counted_tokens


def learned(route: RecordedRoute, upto: int, horizon: float) -> list[float]:
    """Least squares on the first `upto` steps: decayed counts -> uses to come, each turn later worth `horizon` less."""
    uses = np.zeros((upto, route.num_keys))
    for number, step in enumerate(route.steps[:upto]):
        uses[number, [key for keys in step for key in keys]] = 1
    counts, to_come = np.zeros((upto, len(DECAYS), route.num_keys)), np.zeros_like(uses)
    count, coming = np.zeros((len(DECAYS), route.num_keys)), np.zeros(route.num_keys)
    for number in range(upto):
        counts[number] = count = count * np.array(DECAYS)[:, None] + uses[number]
    for number in range(upto - 1, -1, -1):
        to_come[number] = coming
        coming = uses[number] + horizon * coming
    # Not the edges, where counts have just begun and uses to come are cut off.
    inside = slice(50, upto - 50)
    inputs = counts[inside].transpose(0, 2, 1).reshape(-1, len(DECAYS))
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    found = np.linalg.lstsq(inputs, to_come[inside].reshape(-1), rcond=None)[0]
    return [float(coefficient) for coefficient in found[:-1]]


def contenders(route: RecordedRoute, path: Path) -> dict[str, Callable[[RecordedRoute, int], float]]:
    """Every eviction by its name -> misses per token."""
    guesses, weights = guesses_and_weights(path, route)

    def engine(make: Callable[[], Lru | Lfu]) -> Callable[[RecordedRoute, int], float]:
        return lambda on, num_slots: replay_eviction(on, num_slots, make()).misses_per_token

    def design(*args: Sequence[float], **options: object) -> Callable[[RecordedRoute, int], float]:
        return lambda on, num_slots: misses_per_token(on, num_slots, Design(on, *args, **options))

    fitted = learned(route, len(route.steps) // 2, 0.5)
    return {
        "belady": lambda on, num_slots: replay_belady(on, num_slots).misses_per_token,
        "lru": engine(Lru),
        **{f"lfu {decay}": engine(lambda decay=decay: Lfu(decay)) for decay in (0.8, 0.9, 0.95, 0.97, 0.99)},
        "last turn": design((0.0, 0.95), (4.0, 1.0)),
        "order": design((0.0, 0.95), (4.0, 1.0), order=0.6),
        "lfu .97 guarded": design(per_step=True, guesses=guesses, guard=True),
        "next use": design((0.95,), per_step=True, next_use=True),
        "next use, guarded": design((0.95,), per_step=True, next_use=True, guesses=guesses, guard=True),
        "gate weight": design(per_step=True, weights=weights),
        "guesses count .5": design((0.95,), per_step=True, guesses=guesses, guess_use=0.5),
        "order, guarded": design((0.0, 0.95), (4.0, 1.0), order=0.6, guesses=guesses, guard=True),
        "learned": design(DECAYS, fitted, order=0.6),
    }


def study(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Misses per token: share of the experts -> contender -> all counted tokens, and the second half's."""
    route = route_of(read_recording(path))
    second_half = replace(route, warm_up=len(route.steps) // 2)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for share in SHARES:
        try:
            num_slots = pool_of(route, share).num_slots
        except BudgetError as error:
            print(f"{path.stem} at {share}: {error}")
            continue
        print(f"\n{path.stem}, {share}: {num_slots} slots\n{'':20}{'misses':>8}{'x belady':>10}{'second half':>13}")
        found[share] = {}
        for name, contender in contenders(route, path).items():
            # What was fitted to the first half is not shown on it.
            whole = None if name == "learned" else contender(route, num_slots)
            half = contender(second_half, num_slots)
            found[share][name] = {"misses": whole, "second_half": half}
            bound = found[share]["belady"]
            shown = "       -         -" if whole is None else f"{whole:8.2f}{whole / bound['misses']:10.2f}"
            print(f"{name:20}{shown}{half:8.2f}{half / bound['second_half']:6.2f}", flush=True)
    return found


def main() -> None:
    """Study every trace, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--trial", action="store_true", help="not for the record")
    asked = parser.parse_args()
    found = {path.stem: study(path) for path in asked.traces}
    _harness.record("eviction-study", _harness.rounded({"traces": found}), keep=not asked.trial)


if __name__ == "__main__":
    main()
