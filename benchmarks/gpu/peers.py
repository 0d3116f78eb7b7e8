"""What others do with the same shapes: transformers with everything on the GPU, and accelerate's cpu_offload."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import foreroute  # noqa: F401  before torch, which then spins less

# isort: split
import torch

from foreroute.model.caches import cache_argument, cache_of

_RESIDENT_STEPS, _OFFLOADED_STEPS = 32, 2


def measure(
    name: str, config: Any, dtype: torch.dtype, skipped: list[str], has_time: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Both peers' rows; what cannot be run is named in `skipped`."""
    rows = []
    for peer, steps in (("transformers resident", _RESIDENT_STEPS), ("accelerate cpu_offload", _OFFLOADED_STEPS)):
        if not has_time():
            skipped.append(f"{name}, {peer}: no time left")
            continue
        try:
            seconds = _decode(_made(peer, config, dtype), steps)
        except (torch.OutOfMemoryError, ImportError) as error:
            skipped.append(f"{name}, {peer}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        rows.append(
            {
                "shape": name,
                "routes": "its weights'",
                "rung": peer,
                "num_slots": 0,
                "tpot_ms": statistics.median(seconds) * 1e3,
                "tpot_ms_low": min(seconds) * 1e3,
                "tpot_ms_high": max(seconds) * 1e3,
                "moved_mb": 0.0,
                "floor_ms": 0.0,
                "hit_rate": 0.0,
                "is_graph": False,
            }
        )
    return rows


def _made(peer: str, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    if peer == "transformers resident":
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    from accelerate import cpu_offload

    # Zeros do: what is timed is the copying, and random numbers for 57 GB take a CPU minutes.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return cpu_offload(model.to_empty(device="cpu"), torch.device("cuda"))


def _decode(model: Any, steps: int) -> list[float]:
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    seconds = []
    with torch.no_grad():
        cache = cache_of(model(input_ids=token.expand(1, 8), use_cache=True))
        for _ in range(steps):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            cache = cache_of(model(input_ids=token, **cache_argument(cache), use_cache=True))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started_s)
    return seconds
