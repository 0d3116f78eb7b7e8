"""Lower bounds for any cache: the fewest bytes that a recorded run must read, by Belady's eviction. Pure arithmetic."""

from collections.abc import Sequence

from foreroute.bench.oracle import Routes
from foreroute.residency.belady import belady_misses


def prefill_bytes(routes: Routes, num_slots: int, expert_bytes: Sequence[int]) -> int:
    """Fewest bytes that a prompt must read: each expert once per pass, less those that the pool keeps.

    Args:
        routes: of the prompt's passes, one per chunk. num_slots: of the pool.
        expert_bytes: stored bytes of an expert, per MoE layer.
    """
    total = 0
    for layers in routes:
        used = sorted(nbytes for experts, nbytes in zip(layers, expert_bytes, strict=True) for _ in experts)
        total += sum(used[: max(0, len(used) - num_slots)])
    return total


def decode_bytes(routes: Routes, num_slots: int, expert_bytes: Sequence[int]) -> int | None:
    """Fewest bytes that passes of new tokens must read, whatever the pool held when they began.

    Args:
        routes: of the passes after the prompt's. num_slots, expert_bytes: as for `prefill_bytes`.
    Returns:
        None where a layer demands more experts at once than there are slots, so that they stream through the pool.
    """
    widest = max((len(experts) for layers in routes for experts in layers), default=0)
    if widest > num_slots:
        return None
    layers_per_pass = len(expert_bytes)
    demands = [[(layer, expert) for expert in experts] for layers in routes for layer, experts in enumerate(layers)]
    keys = {key: number for number, key in enumerate(dict.fromkeys(key for step in demands for key in step))}
    missed = belady_misses([[keys[key] for key in step] for step in demands], num_slots)
    loads = [expert_bytes[step % layers_per_pass] for step, some in enumerate(missed) for _ in some]
    # Some loads fill an empty pool: with the best initial content they are saved, and the largest save most.
    return sum(sorted(loads)[: max(0, len(loads) - num_slots)])
