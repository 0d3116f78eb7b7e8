"""How much memory and time it takes to be ready, and how many bytes a token really reads.

    python -m benchmarks.footprint MODEL [--memory 1.5GiB] [--tokens 24]

One process loads the model within the budget and decodes; figures: seconds from the call of `load` to a usable model,
peak resident memory against dense weights + budget, and bytes read per token against misses x expert bytes.
"""

import argparse
import resource
import time

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch
import transformers.models.auto.modeling_auto  # noqa: F401 - so that ready_s is loading, not importing

from benchmarks import _harness
from foreroute import EngineConfig
from foreroute.loading.load import load


def main() -> None:
    """Measure one load and one decode, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--memory", default="1.5GiB")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--packed", default="no", help='"no" reads the safetensors, "auto" the store beside them')
    parser.add_argument("--prefetch", default="lookahead", choices=("lookahead", "none"))
    asked = parser.parse_args()
    started = time.perf_counter()
    model = load(asked.model, asked.memory, config=EngineConfig(packed=asked.packed, prefetch=asked.prefetch))
    ready_s = time.perf_counter() - started
    plan = model.foreroute.plan
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, model.config.vocab_size, (1, asked.prompt_tokens), generator=generator)
    model.generate(prompt, max_new_tokens=asked.tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    stats = model.foreroute.stats()
    loads = sum(phase.demand_loads + phase.prefetch_loads for phase in (stats.prefill, stats.decode))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "foreroute": foreroute.__version__,
        "source": plan.source,
        "memory_bytes": plan.memory_bytes,
        "dense_bytes": plan.dense_bytes,
        "ready_s": ready_s,
        "peak_rss_bytes": peak_bytes,
        "peak_beyond_dense_and_budget_mb": (peak_bytes - plan.dense_bytes - plan.memory_bytes) / 1e6,
        "experts_read": loads,
        "bytes_read_per_expert_byte": stats.read_bytes / (loads * plan.expert_bytes),
        "read_gb_per_s": stats.read_bytes / max(stats.read_s, 1e-9) / 1e9,
        "decode": {
            "hits": stats.decode.hits,
            "late_hits": stats.decode.late_hits,
            "misses": stats.decode.misses,
            "demand_mb_per_token": stats.decode.demand_bytes / stats.decode.steps / 1e6,
            "prefetch_mb_per_token": stats.decode.prefetch_bytes / stats.decode.steps / 1e6,
            "stall_ms_per_token": 1e3 * stats.decode.stall_s / stats.decode.steps,
        },
        "evictions": stats.evictions,
    }
    _harness.record(f"footprint-{plan.source}", _harness.rounded(result))


if __name__ == "__main__":
    main()
