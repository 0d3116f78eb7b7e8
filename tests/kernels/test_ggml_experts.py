"""ggml's backend computes a MoE layer from blocks in slots: right numbers, and bits that no other row changes."""

import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch

from foreroute.kernels.ggml.experts import ExpertGraphs
from foreroute.kernels.ggml.form import BlockForm, Gating, SlotMatrix
from foreroute.kernels.ggml.graph import shared_runner
from foreroute.kernels.ggml.interleaved import interleaver, orders
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.slots import HostSlots
from foreroute.types import SlotClass
from tests.kernels.ggml_matrices import error, random_blocks, random_rows, types

HIDDEN, INNER, EXPERTS, TOP_K = 256, 256, 5, 3
# Activations are rounded to 8 bits in blocks; weights are compared as they are.
MOST_ERROR = 0.05


@dataclass
class Layer:
    """A layer whose expert e lies in slot `slot_of[e]`, and its numbers in f64."""

    kernels: GgmlLayer
    memory: mmap.mmap
    slot_of: list[int]
    weights: list[list[np.ndarray]]
    biases: list[np.ndarray]
    gating: str

    def expected(self, hidden: torch.Tensor, routed: list[list[int]], gates: torch.Tensor) -> torch.Tensor:
        rows = []
        for x, experts, shares in zip(hidden.double().numpy(), routed, gates.double().numpy(), strict=True):
            total = np.zeros(HIDDEN)
            for expert, share in zip(experts, shares, strict=True):
                if expert < 0:
                    continue
                (gate, up, down), bias = self.weights[expert], self.biases[expert]
                inner, linear = gate @ x + bias[:INNER], up @ x + bias[INNER : 2 * INNER]
                total += share * (down @ self._joined(inner, linear) + bias[2 * INNER :])
            rows.append(total)
        return torch.from_numpy(np.stack(rows)).float()

    def _joined(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        if self.gating == "swiglu_oai":
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
            return gate / (1 + np.exp(-1.702 * gate)) * up
        with np.errstate(over="ignore"):
            return gate / (1 + np.exp(-gate)) * up

    def slot(self, key: int) -> int:
        return self.slot_of[key]

    def compute(
        self, hidden: torch.Tensor, routed: list[list[int]], gates: torch.Tensor, *groups: list[int]
    ) -> torch.Tensor:
        """The layer's sum, its experts added group by group; one group of all where none is given."""
        total = self.kernels.begin(hidden, routed, gates)
        keys = sorted({key for row in routed for key in row if key >= 0})
        for group in groups or (keys,):
            total.add([(key, self.slot_of[key]) for key in group if key in keys])
        return total.total()


@lru_cache(maxsize=64)
def layer_of(
    name: str,
    down_name: str | None = None,
    gating: str = "swiglu",
    biased: bool = False,
    interleaved: tuple[str, ...] = (),
    threads: int = 2,
) -> Layer:
    """Its experts' matrices have eight rows side by side where their type is one of `interleaved`."""
    down_name = down_name or name
    shapes = ((name, INNER, HIDDEN), (name, INNER, HIDDEN), (down_name, HIDDEN, INNER))
    parts = [
        [random_blocks(*shape, seed=10 * expert + at) for at, shape in enumerate(shapes)] for expert in range(EXPERTS)
    ]
    offsets = [0]
    for part in parts[0]:
        offsets.append(-(-(offsets[-1] + part.blocks.nbytes) // 64) * 64)
    slot_bytes = -(-(offsets[-1] + 4 * (2 * INNER + HIDDEN)) // 4096) * 4096
    slots = EXPERTS + 2
    memory = mmap.mmap(-1, slots * slot_bytes)
    array = np.frombuffer(memory, dtype=np.uint8)
    slot_of = [6, 0, 3, 5, 1]
    biases = []
    for expert, matrices in enumerate(parts):
        bias = np.random.default_rng(expert).standard_normal(2 * INNER + HIDDEN).astype(np.float32) * biased
        biases.append(bias)
        start = slot_of[expert] * slot_bytes
        for part, offset in zip(matrices, offsets, strict=False):
            blocks = part.blocks
            if part.kind.name in interleaved:
                blocks = interleaver(part.kind.name, part.columns).convert(blocks)
            array[start + offset : start + offset + blocks.nbytes] = blocks.ravel()
        array[start + offsets[3] : start + offsets[3] + bias.nbytes] = bias.view(np.uint8)
    first = tuple(
        SlotMatrix(part.kind, INNER, HIDDEN, offset, part.blocks.shape[1], part.kind.name in interleaved)
        for part, offset in zip(parts[0][:2], offsets, strict=False)
    )
    kind, row_bytes = parts[0][2].kind, parts[0][2].blocks.shape[1]
    down = SlotMatrix(kind, HIDDEN, INNER, offsets[2], row_bytes, kind.name in interleaved)
    start = offsets[3]
    form = BlockForm(
        first,
        down,
        Gating("torch" if gating == "family" else gating, _family),  # type: ignore[arg-type]
        (start, start + 4 * INNER) if biased else (),
        start + 8 * INNER if biased else -1,
    )
    graphs = ExpertGraphs(shared_runner(threads), HostSlots(memory, SlotClass(slot_bytes, slots, (0,), 0)))
    numbers = [[part.numbers.astype(np.float64) for part in matrices] for matrices in parts]
    return Layer(GgmlLayer(0, 0, graphs.of(form)), memory, slot_of, numbers, biases, gating)


def _family(joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def step(tokens: int = 6) -> tuple[torch.Tensor, list[list[int]], torch.Tensor]:
    """Hidden states, experts with one that is none, and gate weights."""
    rng = np.random.default_rng(tokens)
    routed = [rng.permutation(EXPERTS)[:TOP_K].tolist() for _ in range(tokens)]
    routed[-1][1] = -1
    return random_rows(tokens, HIDDEN), routed, random_rows(tokens, TOP_K, seed=1).abs()


@pytest.mark.parametrize("name", types())
def test_a_layer_in_every_type(name: str) -> None:
    layer, (hidden, routed, gates) = layer_of(name), step()
    assert error(layer.compute(hidden, routed, gates), layer.expected(hidden, routed, gates)) < MOST_ERROR


@pytest.mark.parametrize("name", types())
def test_a_row_has_the_same_bits_whatever_shares_its_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreroute.kernels.ggml.experts.rows_in_bf16", lambda *_: float("inf"))
    layer, (hidden, routed, gates) = layer_of.__wrapped__(name), step()
    check_rows_keep_their_bits(layer, hidden, routed, gates)


@pytest.mark.parametrize("name", orders())
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_rows_side_by_side_keep_a_row_s_bits(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert has up to some dozen rows: ggml's product of one tensor would take another way from four rows on."""
    monkeypatch.setattr("foreroute.kernels.ggml.experts.rows_in_bf16", lambda *_: float("inf"))
    layer, (hidden, routed, gates) = layer_of.__wrapped__(name, interleaved=(name,)), step(tokens)
    check_rows_keep_their_bits(layer, hidden, routed, gates)
    assert error(layer.compute(hidden, routed, gates), layer.expected(hidden, routed, gates)) < MOST_ERROR


@pytest.mark.parametrize("name", orders())
def test_rows_side_by_side_are_read_and_streamed_as_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that `verify` hashes, and bf16's products, are those of rows one after the other."""
    monkeypatch.setattr("foreroute.kernels.ggml.experts.rows_in_bf16", lambda *_: 2)
    hidden, routed, gates = step(40)
    keys, ids = [*range(EXPERTS)], torch.tensor(routed)
    found = []
    for interleaved in ((), (name,)):
        layer = layer_of.__wrapped__(name, "Q6_K", biased=True, interleaved=interleaved)
        stored = [part for expert in keys for part in layer.kernels.stored(layer.slot(expert))]
        streamed = layer.kernels.stream(_Streamed(layer), keys, hidden, ids, gates)
        found.append((streamed, torch.cat([part.flatten() for part in stored])))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def check_rows_keep_their_bits(
    layer: Layer, hidden: torch.Tensor, routed: list[list[int]], gates: torch.Tensor
) -> None:
    together = layer.compute(hidden, routed, gates)
    for token, row in enumerate(routed):
        one = slice(token, token + 1)
        keys = [key for key in row if key >= 0]
        for groups in ([keys], [keys[-1:], keys[:-1]], [[key] for key in keys]):
            alone = layer.compute(hidden[one], [row], gates[one], *groups)
            assert torch.equal(alone, together[one]), (token, groups)
    assert torch.equal(layer.compute(hidden, routed, gates, [4, 0], [1, 2, 3]), together)
    for resident in ((), (0, 2), range(EXPERTS)):
        slots = _Streamed(layer, resident)
        streamed = layer.kernels.stream(slots, [*range(EXPERTS)], hidden, torch.tensor(routed), gates)
        assert torch.equal(streamed, together)


class _Streamed:
    """Gives slots one after the other, or those of `resident` at once."""

    def __init__(self, layer: Layer, resident: Sequence[int] = (), held: int = 9) -> None:
        self.slot_of, self._resident, self._layer, self.most_held = layer.slot, resident, layer, held

    def resident(self, keys: Sequence[int]) -> dict[int, int]:
        return {key: self._layer.slot(key) for key in keys if key in self._resident}


@pytest.mark.parametrize("converts", [True, False])
@pytest.mark.parametrize("held", [1, 2, 9])
def test_the_number_of_lanes_and_of_slots_that_are_held_changes_no_bit(
    converts: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreroute.kernels.ggml.experts.rows_in_bf16", lambda *_: 2 if converts else float("inf"))
    monkeypatch.setattr("foreroute.kernels.ggml.layer._MOST_AT_ONCE_BYTES", 0)
    hidden, routed, gates = step(40)
    found = []
    for threads in (1, 2, 3):
        layer = layer_of.__wrapped__("Q4_K", threads=threads)
        slots = _Streamed(layer, held=held)
        found.append(layer.kernels.stream(slots, [*range(EXPERTS)], hidden, torch.tensor(routed), gates))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert error(found[0], layer.expected(hidden, routed, gates)) < MOST_ERROR


def test_waits_beside_lanes_are_not_those_of_the_next_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of busy cores would decode on one thread after each prompt."""
    monkeypatch.setattr("foreroute.kernels.ggml.layer._MOST_AT_ONCE_BYTES", 0)
    layer, (hidden, routed, gates) = layer_of.__wrapped__("Q8_0"), step(40)
    begun = list[int]()
    monkeypatch.setattr(shared_runner(2).threads, "begin", lambda: begun.append(1))
    layer.kernels.stream(_Streamed(layer), [*range(EXPERTS)], hidden, torch.tensor(routed), gates)
    assert begun == [1]


def test_lanes_are_done_with_their_slots_when_a_read_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreroute.kernels.ggml.layer._MOST_AT_ONCE_BYTES", 0)
    layer, (hidden, routed, gates) = layer_of.__wrapped__("Q8_0"), step(40)
    under_way, graphs = [0], layer.kernels._graphs
    assert graphs is not None
    on_lane = graphs.on_lane

    def slow(rows: torch.Tensor, slot: int, *, may_convert: bool) -> torch.Tensor:
        under_way[0] += 1
        time.sleep(0.05)
        outputs = on_lane(rows, slot, may_convert=may_convert)
        under_way[0] -= 1
        return outputs

    monkeypatch.setattr(graphs, "on_lane", slow)

    class Failing(_Streamed):
        def __init__(self) -> None:
            super().__init__(layer)
            self.slot_of = self.fail_at_the_third

        def fail_at_the_third(self, key: int) -> int:
            if key == 2:
                raise OSError("gone")
            return layer.slot(key)

    with pytest.raises(OSError, match="gone"):
        layer.kernels.stream(Failing(), [*range(EXPERTS)], hidden, torch.tensor(routed), gates)
    assert under_way == [0]


def test_a_swapped_slot_is_seen() -> None:
    layer, (hidden, routed, gates) = layer_of("Q8_0"), step()
    right = layer.compute(hidden, routed, gates)
    layer.slot_of[0], layer.slot_of[1] = layer.slot_of[1], layer.slot_of[0]
    try:
        assert error(layer.compute(hidden, routed, gates), right) > 3 * MOST_ERROR
    finally:
        layer.slot_of[0], layer.slot_of[1] = layer.slot_of[1], layer.slot_of[0]


@pytest.mark.parametrize("gating", ["swiglu", "swiglu_oai", "family"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_biases_and_gatings(gating: str, tokens: int) -> None:
    layer, (hidden, routed, gates) = layer_of("MXFP4", "Q4_0", gating, biased=True), step(tokens)
    assert error(layer.compute(hidden, routed, gates), layer.expected(hidden, routed, gates)) < MOST_ERROR


def test_an_expert_named_twice_counts_twice() -> None:
    layer, (hidden, _, gates) = layer_of("Q8_0"), step(1)
    routed = [[2, 2, 4]]
    assert error(layer.compute(hidden, routed, gates), layer.expected(hidden, routed, gates)) < MOST_ERROR


def test_a_substitute_takes_the_expert_s_place() -> None:
    layer, (hidden, _, gates) = layer_of("Q8_0"), step(2)
    routed, vector = [[0, 1, 2], [1, 3, 4]], random_rows(1, HIDDEN, seed=7)
    total = layer.kernels.begin(hidden, routed, gates)
    total.add([(key, layer.slot_of[key]) for key in (0, 2, 3, 4)])
    total.substitute([1], vector)
    without = layer.expected(hidden, [[0, -1, 2], [-1, 3, 4]], gates)
    expected = without + vector * torch.stack((gates[0, 1], gates[1, 0]))[:, None]
    assert error(total.total(), expected) < MOST_ERROR


def test_nothing_routed_is_zero() -> None:
    layer, (hidden, _, gates) = layer_of("Q8_0"), step(1)
    assert not layer.kernels.begin(hidden, [[-1, -1, -1]], gates).total().any()


def test_in_bf16_a_prompt_s_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreroute.kernels.ggml.experts.rows_in_bf16", lambda *_: 8)
    layer = layer_of.__wrapped__("Q4_K", "Q6_K", biased=True)
    hidden, routed, gates = step(40)
    streamed = layer.kernels.stream(_Streamed(layer), [*range(EXPERTS)], hidden, torch.tensor(routed), gates)
    assert error(streamed, layer.expected(hidden, routed, gates)) < MOST_ERROR
    assert not torch.equal(streamed, layer.compute(hidden, routed, gates)), "bf16 was to be taken"


def test_half_precision_states_give_half_precision_sums() -> None:
    layer, (hidden, routed, gates) = layer_of("Q8_0"), step()
    total = layer.compute(hidden.bfloat16(), routed, gates.bfloat16())
    assert total.dtype == torch.bfloat16
    assert error(total.float(), layer.expected(hidden, routed, gates)) < MOST_ERROR
