"""What every published format is held to: the bits of the dequantised resident model, and the bytes that it stores."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.dequantise import Workspaces, dequantising
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from foreroute.types import ExpertReads
from tests.support.runs import (
    ONE_PROMPT,
    THREE_PROMPTS,
    assert_same_bits,
    generate,
    packed_store,
    watch_reads,
)


def check_same(load: Any, folder: Path, resident: Callable[[Any], Any], stored_as: str, store: str) -> Any:
    """Generate at a quarter of the experts and compare with what `resident` says of a batch; returns the model."""
    packed = str(packed_store(folder)) if store == "packed" else "no"
    model = load(folder, "25%", packed=packed, math="torch")
    with watch_reads() as reads:
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            theirs = resident(batch)
            assert theirs.num_distinct > 6, "the reference repeats itself: such tokens test little"
            assert_same_bits(generate(model, batch), theirs)
    plan, stats = model.foreroute.plan, model.foreroute.stats()
    assert (plan.stored_dtype, plan.math, plan.source) == (stored_as, "own", store)
    assert reads.names == ({Path(packed).name} if store == "packed" else {"model.safetensors"})
    assert stats.evictions > 0
    assert stats.decode.hits > 0
    assert stats.decode.misses > 0
    return model


def check_bytes(model: Any, bits: float, other_bytes: int = 0) -> None:
    """See that what decoding moved is experts of `bits` per weight, and of `other_bytes` beside their matrices."""
    plan, stats = model.foreroute.plan, model.foreroute.stats()
    layer = model.foreroute.table.layers[0]
    weights = sum(math.prod(part.shape) for part in layer.family_layout.parts if len(part.shape) == 2)
    moved = stats.decode.demand_bytes / stats.decode.demand_loads
    found = 8 * (moved - other_bytes) / weights
    print(f"{plan.stored_dtype}: {found:.4f} bits per weight moved, {moved:.0f} bytes an expert")
    assert found == bits
    assert plan.expert_bytes == moved
    assert plan.slot_bytes < plan.expert_bytes + 4096 + 64 * len(layer.layout.parts)


def numbers_of(table: ExpertTable, key: int, reads: Callable[[int], ExpertReads], dtype: torch.dtype) -> Any:
    """The family's tensors of an expert, read and dequantised as the engine does it."""
    memory, slots = allocate_slots(1, table.slot_bytes)
    transfer = DiskTransfer(reads, slots.__getitem__, label=table.label)
    layer = table.layers[key // table.num_experts]
    try:
        transfer.demand(key, 0)
        (completion,) = transfer.wait()
        assert completion.error is None
        math = dequantising(None, layer.parts, dtype, Workspaces())
        views = SlotViews(memory, table.slot_bytes, [layer.layout], [math], dtype)
        made = views.as_family(0, views.operands(0, 0))
        views.clear()
        return made
    finally:
        transfer.close()
        slots.clear()
