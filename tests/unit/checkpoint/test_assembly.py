"""Where an expert's bytes come from: the same operations on real tensors, by transformers, give the same bytes."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist, Transpose

from foreroute.checkpoint.assembly import Operation, assemble, whole
from foreroute.checkpoint.index import TensorEntry
from foreroute.checkpoint.layouts import ExpertTable, PartSource, layer_experts
from foreroute.checkpoint.locate import read_index
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.model.build.expert_sources import _operation
from foreroute.transfer.load import apply_copies

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONVERTER = SimpleNamespace(target_patterns=["target"])


def as_transformers(groups, operations):
    """The fused tensor: `groups` is per source pattern a list of tensors per expert, or one fused tensor."""
    tensors = {f"pattern{index}": list(group) for index, group in enumerate(groups)}
    for operation in operations:
        tensors = operation.convert(dict(tensors), source_patterns=list(tensors), target_patterns=["target"])
    (result,) = tensors.values()
    return result[0] if isinstance(result, list) else result


def as_foreroute(groups, operations, shape, folder):
    """The same, put together expert by expert from the stored file's bytes."""
    stored = {f"p{index}.{at}": tensor for index, group in enumerate(groups) for at, tensor in enumerate(group)}
    save_file(stored, folder / "model.safetensors")
    index = read_index(folder)
    names = tuple(tuple(f"p{at}.{expert}" for expert in range(len(group))) for at, group in enumerate(groups))
    source = PartSource("target", tuple(shape[1:]), names, tuple(_operation(op, CONVERTER) for op in operations))
    table = ExpertTable((layer_experts("experts", shape[0], [source], index),), index)
    return torch.stack([one_expert(table, expert, groups[0][0].dtype) for expert in range(shape[0])])


def one_expert(table, expert, dtype):
    (part,) = table.layers[0].layout.parts
    slot = bytearray(table.slot_bytes)
    for read in table.reads(expert):
        raw = np.fromfile(read.path, dtype=np.uint8, count=read.nbytes, offset=read.offset)
        assert sum(copy.nbytes for copy in read.copies) <= read.nbytes
        apply_copies(read.copies, raw, memoryview(slot))
    raw = bytes(slot[part.offset : part.offset + part.nbytes])
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(part.shape)


@st.composite
def stored_experts(draw):
    """Tensors as checkpoints have them, each value its own bits, and operations that make one of them."""
    dtype = draw(st.sampled_from(DTYPES))
    num_experts, num_patterns = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    cols = 2 * draw(st.integers(1, 4))
    is_fused, is_bias = draw(st.booleans()), draw(st.booleans())
    rows = [2 * draw(st.integers(1, 4)) for _ in range(num_patterns)]
    groups, start = [], 0
    for extent in rows:
        one = (extent,) if is_bias else (extent, cols)
        shapes = [(num_experts, *one)] if is_fused else [one] * num_experts
        group = []
        for shape in shapes:
            count = int(np.prod(shape))
            bits = torch.arange(start, start + count, dtype=torch.int32 if dtype == torch.float32 else torch.int16)
            group.append(bits.view(dtype).view(shape))
            start += count
        groups.append(group)
    operations = [] if is_fused else [MergeModulelist(dim=0)]
    if num_patterns > 1:
        operations.append(Concatenate(dim=1))
    more = [] if is_bias else [Transpose(1, 2), Interleave(1), Interleave(1, inverse=True), Interleave(2, inverse=True)]
    if more:
        operations += draw(st.lists(st.sampled_from(more), max_size=2))
    return groups, operations


@settings(max_examples=300, deadline=None)
@given(stored_experts())
def test_bytes_are_those_that_transformers_makes(case):
    groups, operations = case
    expected = as_transformers(groups, operations)
    with tempfile.TemporaryDirectory() as folder:
        try:
            ours = as_foreroute(groups, operations, expected.shape, Path(folder))
        except UnsupportedModelError:
            # What must not be refused is listed below; this much is never.
            assert any(isinstance(operation, Interleave) for operation in operations)
            return
    as_int = torch.int32 if ours.element_size() == 4 else torch.int16
    assert torch.equal(ours.view(as_int), expected.contiguous().view(as_int))


def tensors(*shapes):
    """Per shape a tensor of distinct numbers."""
    made, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        made.append(torch.arange(start, start + count, dtype=torch.float32).view(shape))
        start += count
    return made


FOUND_IN_MODELS = {
    "experts one by one": ([[(6, 4)] * 3], [MergeModulelist(0)]),
    "gate and up one by one": ([[(6, 4)] * 3, [(6, 4)] * 3], [MergeModulelist(0), Concatenate(1)]),
    "gate and up fused": ([[(3, 6, 4)], [(3, 6, 4)]], [Concatenate(1)]),
    "transposed": ([[(3, 6, 4)]], [Transpose(1, 2)]),
    "transposed where needed": ([[(3, 6, 4)]], [Transpose(1, 2, check_dims=True)]),
    "gate and up transposed": ([[(6, 4)] * 3, [(6, 4)] * 3], [MergeModulelist(0), Concatenate(1), Transpose(1, 2)]),
    "gate and up interleaved": ([[(3, 6, 4)]], [Interleave(1)]),
    "gate and up to be interleaved": ([[(3, 6, 4)]], [Interleave(1, inverse=True)]),
    "interleaved and transposed": ([[(3, 6, 4)]], [Interleave(1), Transpose(1, 2)]),
    "biases": ([[(3, 6)]], []),
    "interleaved biases": ([[(3, 6)]], [Interleave(1, inverse=True)]),
}


@pytest.mark.parametrize("name", FOUND_IN_MODELS)
def test_what_models_need_is_not_refused(name, tmp_path):
    shapes, operations = FOUND_IN_MODELS[name]
    flat = tensors(*[shape for group in shapes for shape in group])
    groups, at = [], 0
    for group in shapes:
        groups.append(flat[at : at + len(group)])
        at += len(group)
    if getattr(operations[-1] if operations else None, "check_dims", False):
        expected = groups[0][0].transpose(1, 2)
    else:
        expected = as_transformers(groups, operations)
    assert torch.equal(as_foreroute(groups, operations, expected.shape, tmp_path), expected)


def test_a_transposition_that_is_not_needed(tmp_path):
    (stored,) = tensors((3, 6, 4))
    assert torch.equal(as_foreroute([[stored]], [Transpose(1, 2, check_dims=True)], stored.shape, tmp_path), stored)


ENTRY = TensorEntry("stored.experts", "file", 0, 96, "F32", (6, 4))


def test_an_unknown_operation_is_named():
    with pytest.raises(UnsupportedModelError, match="RotateColumns"):
        assemble([whole(ENTRY)], [Operation("RotateColumns", 1)], (6, 4))


def test_an_unknown_operation_is_named_before_what_else_is_absent(tmp_path):
    """Such a checkpoint may store none of the tensors that a known one does."""
    save_file({"stored": torch.zeros(2, 6, 4)}, tmp_path / "model.safetensors")
    part = PartSource("target", (6, 4), (("stored",), ()), (Operation("RotateColumns", 1),))
    with pytest.raises(UnsupportedModelError, match="RotateColumns"):
        layer_experts("experts", 2, [part], read_index(tmp_path))


@pytest.mark.parametrize("kind", ["Concatenate", "Interleave", "Transpose"])
def test_operations_across_experts_are_refused(kind):
    with pytest.raises(UnsupportedModelError, match=f"{kind} across experts"):
        assemble([whole(ENTRY)], [Operation(kind, 0)], (6, 4))


def test_another_shape_is_named():
    with pytest.raises(CorruptCheckpointError, match=r"stored\.experts: .*\[6, 4\], the config says \[4, 6\]"):
        assemble([whole(ENTRY)], [], (4, 6))


def test_several_targets_are_refused():
    several = SimpleNamespace(target_patterns=["a", "b"])
    with pytest.raises(UnsupportedModelError, match="Chunk"):
        _operation(Chunk(1), several)
