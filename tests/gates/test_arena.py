"""Experts in an arena of host memory, all or some: the code of the GPU's host control plane, with slots in RAM.

The copies are plain ones here; everything else is what runs in front of a GPU. Bits are those of the resident model.
"""

import pytest
import torch

from foreroute.errors import DeviceError
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import ExpertMath, OneToken
from foreroute.kernels.torch.layer import RowsSum, TokenSum
from foreroute.transfer.tiered import TieredTransfer
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, generate, packed_store, watch_reads


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_all_experts_in_host_memory(checkpoints, references, load, family):
    folder, told = checkpoints.get(family), []
    model = load(folder, "25%", host_memory="100%", progress=lambda done, total: told.append((done, total)))
    plan = model.foreroute.plan
    experts = plan.total_slots * plan.slot_bytes
    assert told[-1][0] == told[-1][1] > experts, "dense weights were counted too"
    assert {total for _, total in told} == {told[-1][1], told[-1][1] - experts}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert plan.host_records == plan.total_slots
    with watch_reads() as reads:
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            assert_same_bits(generate(model, batch), references.output(folder, batch))
    assert not reads.paths, "with everything in host memory the disk has nothing to do"
    stats = model.foreroute.stats()
    assert stats.evictions > 0
    assert stats.decode.misses > 0
    assert stats.prefetch_used > 0
    assert stats.read_bytes > 0
    assert isinstance(model.foreroute.engine.pool.transfer, TieredTransfer)


@pytest.mark.parametrize("store", ["safetensors", "packed"])
@pytest.mark.parametrize("share", ["30%", "3%"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_three_tiers(checkpoints, references, load, share, store, dtype):
    folder = checkpoints.get("qwen3_moe", dtype)
    packed = str(packed_store(folder)) if store == "packed" else "no"
    model = load(folder, "25%", host_memory=share, packed=packed)
    assert 0 < model.foreroute.plan.host_records < model.foreroute.plan.num_slots * 2
    with watch_reads() as reads:
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            assert_same_bits(generate(model, batch), references.output(folder, batch))
    assert reads.paths
    assert model.foreroute.stats().evictions > 0


def test_an_error_of_the_disk_reaches_the_caller_and_the_model_lives_on(checkpoints, references, load, monkeypatch):
    import os

    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "25%", host_memory="30%")
    preadv = os.preadv

    def broken(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(Exception, match="Input/output error"):
        generate(model)
    monkeypatch.setattr(os, "preadv", preadv)
    assert_same_bits(generate(model), references.output(folder))


def test_too_little_host_memory_is_said_before_experts_are_read(checkpoints, load):
    with watch_reads() as reads, pytest.raises(DeviceError, match="hold no expert"):
        load(checkpoints.get("qwen3_moe"), "25%", host_memory="100B")
    assert not reads.paths


def test_every_tensor_of_a_step_is_made_where_the_slots_are():
    """On the meta device, whose tensors cannot be added to the CPU's, as a GPU's cannot: no GPU is needed for it."""
    pool = torch.empty(4 * 4096, dtype=torch.uint8, device="meta")
    math = ExpertMath(lambda inner: inner.chunk(2, -1)[0] * inner.chunk(2, -1)[1], 0, 1)
    views = SlotViews(pool, 4096, [_layout()], [math], torch.float32)
    hidden, weights = torch.empty(3, 4, device="meta"), torch.empty(3, 2, device="meta")
    rows = RowsSum(math, lambda slot: views.operands(0, slot), hidden, [[2, 0], [0, 1], [1, 2]], weights)
    assert {gathered.device.type for gathered in rows._rows.values()} == {"meta"}
    rows.add([(1, 1), (0, 0), (2, 2)])
    assert rows.total().device.type == "meta"
    workspace = OneToken(2, 8, 4, torch.float32, "meta")
    token = TokenSum(workspace, math, lambda slot: views.operands(0, slot)).begin(hidden[:1], [2, 0], weights[:1])
    token.add([(2, 2)])
    token.add([(0, 0)])
    assert token.total().device.type == "meta"


def _layout():
    from foreroute.checkpoint.layouts import ExpertLayout, Part

    return ExpertLayout((Part("up", 0, 128, (8, 4), "F32"), Part("down", 128, 64, (4, 4), "F32")))
