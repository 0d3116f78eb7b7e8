"""On a GPU: a decode step waits for the host nowhere, and memory is pinned, read by kernels and freed."""

import pytest
import torch

from foreroute.errors import DeviceError
from foreroute.generation.graph_decoder import GraphDecoder
from foreroute.transfer.memory import Arena
from tests.support.runs import ONE_PROMPT


def decoder_of(checkpoints, load) -> GraphDecoder:
    model = load(checkpoints.get("qwen3_moe"), "25%", device="cuda", control="device")
    decoder = GraphDecoder(model, 1, 128)
    token = decoder.prefill(ONE_PROMPT.ids).argmax(-1, keepdim=True)
    decoder.step(token)  # captures
    return decoder


def test_a_replayed_step_has_no_synchronisation(checkpoints, load):
    decoder = decoder_of(checkpoints, load)
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            token = decoder.step(token).argmax(-1, keepdim=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decoder.is_captured


def test_the_profiler_sees_graph_launches_and_no_waiting(checkpoints, load):
    from torch.profiler import ProfilerActivity, profile

    decoder = decoder_of(checkpoints, load)
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(4):
            decoder.step(token)
    names = [event.name for event in profiled.events()]
    assert sum("cudaGraphLaunch" in name for name in names) == 4
    waits = [name for name in names if "Synchronize" in name and "cudaDeviceSynchronize" not in name]
    assert not waits, f"the host waited: {waits}"
    # The profiler itself waits once, when it ends.
    assert sum("cudaDeviceSynchronize" in name for name in names) <= 1


def test_the_sync_check_goes_red():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_arena_is_pinned_and_freed():
    for _ in range(2):  # the second one could not register what the first one left registered
        arena = Arena(4, 4096, is_pinned=True)
        assert arena.is_pinned
        assert arena.tensor.is_pinned()
        arena.records[2][:3] = b"abc"
        assert bytes(arena.tensor[2].cuda().cpu().numpy()[:3]) == b"abc"
        arena.close()


def test_more_than_the_gpu_has_is_named(checkpoints, load):
    from foreroute.transfer.memory import out_of_memory_named

    with pytest.raises(DeviceError, match="ran out of memory for a test"), out_of_memory_named("a test", "Ask less."):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
