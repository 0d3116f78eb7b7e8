"""ggml's quantiser: the gguf package's blocks where it has a quantiser, and its numbers for every type."""

import gguf
import numpy as np
import pytest
import torch

from foreroute.checkpoint.codecs import CODECS, QUANTS
from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS
from foreroute.kernels.ggml.library import open_library
from foreroute.kernels.ggml.quantiser import UnfitWeightError, dequantise, quantise
from tests.support.packs import by_ggml

KINDS = sorted({kind for name in QUANTS for kind in CODECS[name].kinds})
WITH_REFERENCE = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"}


def weights(rows: int = 6, columns: int = 512) -> torch.Tensor:
    """Normal ones, with a row of zeros, one of equal numbers and one of small ones."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    made[1], made[2] = 0, 0.25
    made[3] *= 1e-6
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_packages(kind):
    blocks, number = by_ggml(weights(), kind), gguf.GGMLQuantizationType[kind]
    try:
        theirs = gguf.quants.quantize(weights().numpy(), number)
    except NotImplementedError:
        theirs = None
    assert (theirs is not None) == (kind in WITH_REFERENCE)
    assert theirs is None or (blocks == theirs).all()
    library = open_library()
    ours = dequantise(library, library.types[kind], torch.from_numpy(blocks), 512)
    numbers = torch.from_numpy(np.array(gguf.quants.dequantize(blocks, number), dtype=np.float32))
    assert torch.equal(ours, numbers)
    most = {"Q2_K": 0.4, "Q3_K": 0.2, "MXFP4": 0.15, "Q8_0": 0.01}.get(kind, 0.1)
    assert most / 20 < float((ours - weights()).norm() / weights().norm()) < most


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_quantised_one_by_one(kind):
    """So that threads and pieces change no byte."""
    whole = by_ggml(weights(), kind)
    assert all((by_ggml(row[None], kind) == blocks).all() for row, blocks in zip(weights(), whole, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_the_librarys(kind):
    found = open_library().types[kind]
    assert (found.weights, found.nbytes) == EXPERT_BLOCKS[kind]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -65536.0])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "MXFP4"])
def test_what_is_no_weight(kind, weight):
    rows = weights()
    rows[4, 300] = weight
    with pytest.raises(UnfitWeightError, match=f"which the scales of {kind} cannot hold"):
        by_ggml(rows, kind)


def test_floats_are_copied_whatever_they_are():
    library = open_library()
    rows, out = torch.tensor([[1e9], [float("inf")]]), torch.zeros(2, 4, dtype=torch.uint8)
    quantise(library, library.types["F32"], rows, out)
    assert torch.equal(out.view(torch.float32), rows)
