"""What no cache could beat: the fewest bytes that a recorded run has to read, by Belady's eviction. Pure arithmetic."""

from collections.abc import Sequence

from foreroute.bench.oracle import Routes
from foreroute.residency.belady import belady_misses


def prefill_bytes(routes: Routes, num_slots: int, expert_bytes: Sequence[int]) -> int:
    """Bytes that a prompt has to read at least: each expert once in each of its passes, less those that the pool holds.

    Args:
        routes: of the prompt's passes, one per chunk. expert_bytes: stored bytes of an expert, per MoE layer.
    """
    total = 0
    for layers in routes:
        used = sorted(nbytes for experts, nbytes in zip(layers, expert_bytes, strict=True) for _ in experts)
        total += sum(used[: max(0, len(used) - num_slots)])
    return total


def decode_bytes(routes: Routes, num_slots: int, expert_bytes: Sequence[int]) -> int | None:
    """Bytes that passes of new tokens have to read at least, whatever the pool held when they began.

    Args:
        routes: of the passes after the prompt's.
    Returns:
        None where a layer wants more experts at once than there are slots, so that they pass through the pool.
    """
    widest = max((len(experts) for layers in routes for experts in layers), default=0)
    if widest > num_slots:
        return None
    layers_per_pass = len(expert_bytes)
    demands = [[(layer, expert) for expert in experts] for layers in routes for layer, experts in enumerate(layers)]
    keys = {key: number for number, key in enumerate(dict.fromkeys(key for step in demands for key in step))}
    missed = belady_misses([[keys[key] for key in step] for step in demands], num_slots)
    loads = [expert_bytes[step % layers_per_pass] for step, some in enumerate(missed) for _ in some]
    # Some fill an empty pool: with the best content to begin with, they are there already, and the largest are best.
    return sum(sorted(loads)[: max(0, len(loads) - num_slots)])
