"""On a GPU: the kernels do what their references do, compiled and not interpreted."""

import pytest
import torch

from foreroute.device import paging
from foreroute.device.paging import CopyList, PagingState
from foreroute.transfer.memory import Arena

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, STAGING, TOP_K = 3, 24, 20, 6, 4
RECORD = 8192


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("foreroute.device.triton_paging", reason="the kernels do not exist yet")


def states() -> list[PagingState]:
    return [
        PagingState.create(NUM_SLOTS, NUM_LAYERS * NUM_EXPERTS, NUM_EXPERTS, staging_slots=STAGING, device=device)
        for device in ("cpu", "cuda")
    ]


def test_the_planner_decides_as_its_reference(kernels):
    reference, tested = states()
    generator = torch.Generator().manual_seed(0)
    for step in range(2000):
        layer = step % NUM_LAYERS
        ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(2)])
        guesses = torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K]
        seen = []
        for module, state in ((paging, reference), (kernels, tested)):
            device = state.counters.device
            slots = torch.empty(2, TOP_K, dtype=torch.int32, device=device)
            demanded, guessed = CopyList.create(2 * TOP_K, device), CopyList.create(TOP_K, device)
            module.plan(state, layer, ids.to(device), slots, demanded, arrived=step % 3 > 0)
            module.plan_prefetch(state, (layer + 1) % NUM_LAYERS, guesses.to(device), guessed, arrived=True)
            seen.append((slots.tolist(), demanded.pairs(), guessed.pairs()))
        assert seen[0] == seen[1], f"step {step}"
    for name in ("slot_of_key", "key_of_slot", "stamp", "staged_at", "in_flight", "marks", "counters"):
        assert torch.equal(getattr(reference, name), getattr(tested, name).cpu()), name


def test_fetch_reads_pinned_memory(kernels):
    arena = Arena(10, RECORD, is_pinned=True)
    arena.tensor.copy_(torch.randint(0, 256, arena.tensor.shape, dtype=torch.uint8))
    slots = torch.zeros(6, RECORD, dtype=torch.uint8, device="cuda")
    copies = CopyList.create(4, "cuda")
    copies.keys[:3] = torch.tensor([7, 0, 9])
    copies.slots[:3] = torch.tensor([2, 5, 0])
    copies.count.fill_(3)
    offsets = torch.arange(10, device="cuda") * RECORD
    kernels.fetch(arena.address, offsets, copies, slots, record_bytes=RECORD)
    torch.cuda.synchronize()
    for key, slot in ((7, 2), (0, 5), (9, 0)):
        assert torch.equal(slots[slot].cpu(), arena.tensor[key])
    assert not slots[1].any()
    arena.close()
