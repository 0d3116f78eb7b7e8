"""Experts as Hugging Face stores them, on ggml's kernels: pairs in a byte, gate and up in turns, bf16 biases."""

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.kernels.ggml import bf16
from foreroute.kernels.ggml.experts import ExpertGraphs
from foreroute.kernels.ggml.form import BlockForm, Gating, SlotMatrix
from foreroute.kernels.ggml.graph import shared_runner
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.slots import HostSlots
from foreroute.kernels.ggml.types import TYPE_NUMBERS
from foreroute.types import SlotClass
from tests.kernels.ggml_matrices import error, random_blocks
from tests.kernels.test_ggml_experts import EXPERTS, HIDDEN, INNER, MOST_ERROR, Layer, _Streamed, layer_of, step


def _paired(blocks: np.ndarray) -> np.ndarray:
    """ggml's MXFP4 blocks with neighbours in a byte, as Hugging Face has them."""
    found = blocks.reshape(-1, 17).copy()
    numbers = np.concatenate((found[:, 1:] & 15, found[:, 1:] >> 4), axis=1)
    found[:, 1:] = numbers[:, 0::2] | numbers[:, 1::2] << 4
    return found.reshape(blocks.shape)


def _as_published(gating: str, *, paired: bool = True, in_turns: bool = True, bias: str = "BF16") -> Layer:
    """The layer of `layer_of` with its slots written otherwise."""
    plain = layer_of("MXFP4", None, gating, biased=True)
    row_bytes = HIDDEN // 32 * 17
    offsets = (0, 2 * INNER * row_bytes, 2 * INNER * row_bytes + HIDDEN * (INNER // 32 * 17))
    slot_bytes = 3 * 2**17
    memory = mmap.mmap(-1, (EXPERTS + 2) * slot_bytes)
    array = np.frombuffer(memory, dtype=np.uint8)
    biases = []
    for expert, slot in enumerate(plain.slot_of):
        shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        stored = [random_blocks("MXFP4", *shape, seed=10 * expert + at).blocks for at, shape in enumerate(shapes)]
        gate, up, down = (_paired(one) if paired else one for one in stored)
        both = np.stack((gate, up), axis=1).reshape(2 * INNER, -1) if in_turns else np.concatenate((gate, up))
        rounded = torch.from_numpy(plain.biases[expert]).to(torch.bfloat16 if bias == "BF16" else torch.float16)
        biases.append(rounded.float().numpy())
        found = rounded.view(torch.uint8).numpy()
        for content, offset in zip((both.ravel(), down.ravel(), found), offsets, strict=True):
            array[slot * slot_bytes + offset : slot * slot_bytes + offset + content.size] = content
    kind = random_blocks("MXFP4", INNER, HIDDEN).kind
    stride, second = (2 * row_bytes, row_bytes) if in_turns else (row_bytes, INNER * row_bytes)
    first = tuple(SlotMatrix(kind, INNER, HIDDEN, start, stride) for start in (0, second))
    form = BlockForm(
        first,
        SlotMatrix(kind, HIDDEN, INNER, offsets[1], INNER // 32 * 17),
        Gating("torch" if gating == "family" else gating, _oai if gating == "swiglu_oai" else _silu, in_turns),
        (offsets[2], offsets[2] + 2 * INNER),
        offsets[2] + 4 * INNER,
        TYPE_NUMBERS[bias],
        paired,
    )
    slots = HostSlots(memory, SlotClass(slot_bytes, EXPERTS + 2, (0,), 0))
    graphs = ExpertGraphs(shared_runner(2), slots)
    return replace(plain, kernels=GgmlLayer(0, 0, graphs.of(form)), memory=memory, biases=biases)


def _silu(given: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(given[:, 0::2]) * given[:, 1::2]


def _oai(given: torch.Tensor) -> torch.Tensor:
    gate, up = given[:, 0::2].clamp(max=7), given[:, 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("gating", ["swiglu_oai", "family"])
def test_pairs_turns_and_half_biases(gating: str, tokens: int) -> None:
    layer, (hidden, routed, gates) = _as_published(gating), step(tokens)
    assert error(layer.compute(hidden, routed, gates), layer.expected(hidden, routed, gates)) < MOST_ERROR


@pytest.mark.parametrize("changed", [{"paired": False}, {"bias": "F16"}, {"in_turns": False, "paired": False}])
def test_each_of_them_by_itself(changed: dict[str, object]) -> None:
    """Of gate and up that lie one after the other, ggml's gating alone: the family's own here has turns."""
    layer, (hidden, routed, gates) = _as_published("swiglu_oai", **changed), step(3)  # type: ignore[arg-type]
    assert error(layer.compute(hidden, routed, gates), layer.expected(hidden, routed, gates)) < MOST_ERROR


def test_a_row_has_the_same_bits_alone() -> None:
    layer, (hidden, routed, gates) = _as_published("swiglu_oai"), step()
    together = layer.compute(hidden, routed, gates)
    for token, row in enumerate(routed):
        one = slice(token, token + 1)
        assert torch.equal(layer.compute(hidden[one], [row], gates[one]), together[one])


@pytest.mark.parametrize("paired", [True, False])
def test_prompts_in_bf16(paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "has_bf16", lambda: True)
    layer, (hidden, routed, gates) = _as_published("swiglu_oai", paired=paired), step(40)
    graphs = layer.kernels._graphs
    assert graphs is not None
    assert graphs.converts(40, may_convert=True), "gate and up in turns lie in rows of one matrix"
    monkeypatch.setattr(graphs, "_bf16_from", 8)
    streamed = layer.kernels.stream(_Streamed(layer), [*range(EXPERTS)], hidden, torch.tensor(routed), gates)
    assert error(streamed, layer.expected(hidden, routed, gates)) < MOST_ERROR
    assert not torch.equal(streamed, layer.compute(hidden, routed, gates)), "bf16 was to be taken"


def test_the_order_of_neighbours_matters() -> None:
    layer, (hidden, routed, gates) = _as_published("swiglu_oai"), step(3)
    graphs = layer.kernels._graphs
    assert graphs is not None
    form = replace(graphs.form, is_paired=False)
    wrong = replace(layer, kernels=GgmlLayer(0, 0, ExpertGraphs(shared_runner(2), graphs._slots).of(form)))
    assert error(wrong.compute(hidden, routed, gates), layer.expected(hidden, routed, gates)) > 10 * MOST_ERROR
