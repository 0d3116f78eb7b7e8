"""Measure for `plan`, on the loaded model, the compute time of one token."""

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from foreroute.loading.offloaded_model import OffloadedModel

_WARM_UP_PASSES = 2
_TIMED_PASSES = 7
_TOKEN = 1


def compute_ms(model: "OffloadedModel") -> float:
    """Median milliseconds of one token's forward pass with its experts in memory, without stalls.

    The same token each time routes to the same experts, so they are resident after the first pass.
    """
    token = torch.tensor([[_TOKEN]], device=model.device)
    passes_ms = []
    with torch.inference_mode():
        for _ in range(_WARM_UP_PASSES + _TIMED_PASSES):
            stalled_s = model.foreroute.stats().decode.stall_s
            started_s = time.perf_counter()
            model(input_ids=token, use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            elapsed_s = time.perf_counter() - started_s
            passes_ms.append((elapsed_s - (model.foreroute.stats().decode.stall_s - stalled_s)) * 1e3)
    return statistics.median(passes_ms[_WARM_UP_PASSES:])
