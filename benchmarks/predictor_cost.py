"""What guessing costs: time in a predictor beside the time of a token, at the shape of a large model.

    python -m benchmarks.predictor_cost build/synth --memory 1.5GiB

Every predictor is asked as the engine asks it, during decoding, and the clock runs only inside it: read-back of what it
guessed included. Its share is of the TPOT of the same run and, stricter, of the TPOT with every expert in memory, where
nothing is guessed because nothing is missing. Random weights will do: nothing here depends on being right.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from benchmarks.overhead import decode
from foreroute import EngineConfig
from foreroute.checkpoint.locate import read_index
from foreroute.predict.sidecar import Sidecar
from foreroute.prepare.corpus import Corpus
from foreroute.prepare.estimator_training import EstimatorSettings
from foreroute.prepare.fit import FitSettings, fit


class Clocked:
    """A predictor with a clock around it."""

    def __init__(self, predictor: Any) -> None:
        self._predictor = predictor
        self.seconds = 0.0

    def guess(self, *seen: Any) -> Any:
        """The predictor's own, timed."""
        return self._timed(self._predictor.guess, *seen)

    def guess_first(self, *seen: Any) -> Any:
        """The predictor's own, timed."""
        return self._timed(self._predictor.guess_first, *seen)

    def see_first(self, *seen: Any, **how: Any) -> Any:
        """The predictor's own, timed."""
        return self._timed(partial(self._predictor.see_first, **how), *seen)

    def drop_last(self, count: int) -> None:
        """The predictor's own: no token is drafted here."""
        self._predictor.drop_last(count)

    def reset(self) -> None:
        """Decoding begins."""
        self.seconds = 0.0

    def _timed(self, ask: Any, *seen: Any) -> Any:
        started = time.perf_counter()
        guess = ask(*seen)
        self.seconds += time.perf_counter() - started
        return guess


def fitted(folder: Path, tokens: int, path: Path) -> Sidecar:
    """Predictors fitted to random tokens: of the right shapes."""
    model = foreroute.load(folder, "100%", config=EngineConfig(prefetch="none"))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(1, model.config.vocab_size, (tokens // 256, 256), generator=generator)
    settings = FitSettings(estimator=EstimatorSettings(epochs=1))
    sidecar = fit(model, read_index(folder).fingerprint(), Corpus(windows, "random"), path, settings=settings)
    model.foreroute.close()
    return sidecar


def config_of(predictor: str) -> EngineConfig:
    """The engine's switches; governed, steps would be counted in which the predictor is not asked."""
    return EngineConfig(predictor=predictor, governor=False)


def main() -> None:
    """Clock every predictor, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="1.5GiB")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--fit-tokens", type=int, default=2560)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "fit"
        sidecar = fitted(asked.model, asked.fit_tokens, path)
        configs = {"lookahead": config_of("no"), "off": EngineConfig(prefetch="none")}
        for choice in ("ridge", "default vectors", "estimator"):
            chosen = Path(name) / choice
            replace(sidecar, choice=[*[choice] * (len(sidecar.choice) - 1), None]).save(chosen)
            configs[choice] = config_of(str(chosen))
        resident = foreroute.load(asked.model, "100%", config=EngineConfig(prefetch="none"))
        prompt = torch.randint(1, resident.config.vocab_size, (1, 32), generator=generator)
        resident(torch.randint(1, resident.config.vocab_size, (1, 512), generator=generator))
        decode(resident, prompt, 4)
        resident_ms = [1e3 * decode(resident, prompt, asked.tokens)[0] for _ in range(asked.repeats)]
        resident.foreroute.close()
        del resident
        for repeat in range(asked.repeats):
            for kind in configs if repeat % 2 == 0 else reversed(configs):
                model = foreroute.load(asked.model, asked.memory, config=configs[kind])
                prefetcher = model.foreroute.engine.prefetcher
                decode(model, prompt, 4)
                clocked = Clocked(prefetcher.predictor) if prefetcher.predictor is not None else None
                prefetcher.predictor = clocked
                before = model.foreroute.stats().decode.tokens
                tpot_ms = 1e3 * decode(model, prompt, asked.tokens, clocked.reset if clocked else lambda: None)[0]
                steps = model.foreroute.stats().decode.tokens - before
                guess_ms = 0.0 if clocked is None else 1e3 * clocked.seconds / steps
                runs.setdefault(kind, []).append({"tpot_ms": tpot_ms, "guess_ms": guess_ms})
                print(kind, {"tpot_ms": round(tpot_ms, 2), "guess_ms": round(guess_ms, 3)}, flush=True)
                model.foreroute.close()
    resident_tpot = statistics.median(resident_ms)
    result = {
        "memory": asked.memory,
        "resident_tpot_ms": _harness.summary(resident_ms),
        "predictors": {
            kind: {
                "guess_ms_per_token": statistics.median(one["guess_ms"] for one in entries),
                "tpot_ms": statistics.median(one["tpot_ms"] for one in entries),
                "share_of_tpot": statistics.median(one["guess_ms"] / one["tpot_ms"] for one in entries),
                "share_of_resident_tpot": statistics.median(one["guess_ms"] for one in entries) / resident_tpot,
            }
            for kind, entries in runs.items()
        },
    }
    _harness.record("predictor-cost", _harness.rounded(result, 4), {"runs": runs})


if __name__ == "__main__":
    main()
