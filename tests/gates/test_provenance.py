"""Every weight a number of its own: what lands in an expert's slot is what transformers' fused parameters hold."""

from math import prod

import pytest
import torch

from foreroute.checkpoint.records import PackedStore
from foreroute.kernels.slot_views import TORCH_DTYPES
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from tests.support.checkpoints import save_checkpoint
from tests.support.families import FAMILIES
from tests.support.runs import expert_table, packed_store


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, _torch_setup):
    """Checkpoints in which no two weights of experts are equal: integers in fp32, bit patterns in bf16."""
    from transformers import AutoModelForCausalLM

    made = {}

    def get(family, dtype, sharded):
        if (family, dtype, sharded) not in made:
            model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
            start = 0
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    numbers = torch.arange(start, start + parameter.numel())
                    start += parameter.numel()
                    parameter.data = number_as(dtype, numbers).view(parameter.shape)
            assert start < 2**24, "not exactly representable"
            folder = tmp_path_factory.mktemp("numbered") / f"{family}-{dtype}"
            made[family, dtype, sharded] = save_checkpoint(model, folder, dtype, sharded=sharded)
        return made[family, dtype, sharded]

    return get


def number_as(dtype, numbers):
    """fp32: the integer itself. bf16 has 256 such integers: the number's low bits are its exponent and mantissa."""
    if dtype == "fp32":
        return numbers.float()
    return (numbers % 0x7F00).to(torch.int16).view(torch.bfloat16).float()


def all_slots(table, reads_of):
    """Every expert read into a slot of its own, by the same readers as ever; parts by (layer, expert)."""
    memory, slots = allocate_slots(table.num_keys, table.slot_bytes)
    transfer = DiskTransfer(reads_of, slots.__getitem__, label=table.label)
    try:
        for key in range(table.num_keys):
            transfer.demand(key, key)
        while transfer.num_in_flight:
            for completion in transfer.wait():
                assert completion.error is None
                assert completion.nbytes >= table.layers[0].layout.nbytes
    finally:
        transfer.close()
    return {table.expert_id(key): parts_in(memory, table, key) for key in range(table.num_keys)}


def parts_in(memory, table, key):
    described = table.layers[table.expert_id(key).layer].layout.parts
    offsets = [key * table.slot_bytes + part.offset for part in described]
    return [
        torch.frombuffer(memory, dtype=TORCH_DTYPES[part.dtype], count=prod(part.shape), offset=offset).view(part.shape)
        for part, offset in zip(described, offsets, strict=True)
    ]


@pytest.mark.parametrize("source", ["single", "sharded", "packed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_g40_slots_hold_the_fused_parameters(numbered, references, family, dtype, source):
    folder = numbered(family, dtype, source == "sharded")
    table = expert_table(folder)
    reads_of = PackedStore(packed_store(folder), table).reads_of(table) if source == "packed" else table.reads
    resident = dict(references.model(folder).named_parameters())
    seen = 0
    for (layer, expert), parts in all_slots(table, reads_of).items():
        described = table.layers[layer]
        assert f"{described.name}.{described.layout.parts[0].name}" in resident
        for part, tensor in zip(described.layout.parts, parts, strict=True):
            fused = resident[f"{described.name}.{part.name}"]
            assert tensor.dtype == fused.dtype
            assert tensor.data_ptr() % 64 == 0
            assert torch.equal(tensor, fused[expert]), f"{described.name}.{part.name}[{expert}]"
            seen += tensor.numel()
    assert seen == sum(p.numel() for name, p in resident.items() if ".experts." in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_g40_no_two_weights_are_equal(numbered, references, family):
    """Else a swapped pair could pass."""
    resident = references.model(numbered(family, "fp32", False))
    weights = torch.cat([p.flatten() for name, p in resident.named_parameters() if ".experts." in name])
    assert len(torch.unique(weights)) == len(weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_g41_the_engines_slots(checkpoints, references, load, family):
    """After a generation every expert that is READY in the pool is the one that its key says, in the right slot."""
    from foreroute.residency.slots import READY
    from tests.support.runs import generate

    folder = checkpoints.get(family)
    model = load(folder, "50%")
    generate(model)
    engine, table, resident = (
        model.foreroute.engine,
        model.foreroute.table,
        dict(references.model(folder).named_parameters()),
    )
    engine.pool.drain()
    residency = engine.pool.residency
    ready = [key for key in range(residency.num_keys) if residency.state(key) == READY]
    assert len(ready) > residency.num_slots // 2
    for key in ready:
        layer, expert = table.expert_id(key)
        described, slot = table.layers[layer], residency.slot_of(key)
        operands = engine.kernels[0].views.operands(layer, slot)
        for part, operand in zip(described.layout.parts, operands, strict=True):
            fused = resident[f"{described.name}.{part.name}"][expert]
            assert torch.equal(operand if operand.is_contiguous() else operand.t(), fused)
