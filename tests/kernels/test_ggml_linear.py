"""Dense layers over blocks, in graphs and in bf16; matrices with rows side by side; the library itself."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch

from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS
from foreroute.kernels.ggml import bf16, known_answers, library
from foreroute.kernels.ggml.graph import Graph, ThreadCount, place, shared_runner
from foreroute.kernels.ggml.interleaved import ROWS, Interleaver, fingerprint, interleaver, orders
from foreroute.kernels.ggml.known_answers import check_types
from foreroute.kernels.ggml.lanes import shared_lanes
from foreroute.kernels.ggml.library import GgmlError, Library, open_library
from foreroute.kernels.ggml.linear import BlockEmbedding, BlockLinear, BlockMatrix, BlockProducts, compute_together
from foreroute.kernels.ggml.types import F32, MATRIX_TYPES, BlockType
from tests.kernels.ggml_matrices import Blocks, error, random_blocks, random_rows, types

OUT, IN = 48, 512
# Of a made-up order of eight rows side by side.
ROW_BYTES = 24
BITS = 8 * ROWS * ROW_BYTES


@pytest.fixture(scope="module")
def products() -> BlockProducts:
    return BlockProducts(shared_runner(2))


def matrix_of(blocks: Blocks) -> BlockMatrix:
    return BlockMatrix(blocks.kind, blocks.columns, torch.from_numpy(blocks.blocks.copy()))


def expected(blocks: Blocks, x: torch.Tensor) -> torch.Tensor:
    return x @ torch.from_numpy(blocks.numbers).t()


@pytest.mark.parametrize("name", types())
def test_a_linear_layer_in_every_type(name: str, products: BlockProducts) -> None:
    blocks, x = random_blocks(name, OUT, IN), random_rows(7, IN)
    layer = BlockLinear(matrix_of(blocks), products, bias=False, dtype=torch.float32)
    assert error(layer(x), expected(blocks, x)) < 0.03
    rows = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(rows, layer(x)), "a row's bits are its own"


@pytest.mark.parametrize("name", types())
def test_known_answers(name: str) -> None:
    check_types(open_library(), [name])


def test_types_have_the_gguf_package_s_sizes() -> None:
    for name, kind in open_library().types.items():
        assert (kind.weights, kind.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]], name


def test_every_type_of_matrices_is_read_from_a_gguf_with_the_size_that_ggml_says() -> None:
    types = open_library().types
    assert set(EXPERT_BLOCKS) == set(MATRIX_TYPES)
    assert {name: (types[name].weights, types[name].nbytes) for name in EXPERT_BLOCKS} == dict(EXPERT_BLOCKS)


def test_layers_of_one_input_are_one_graph(products: BlockProducts) -> None:
    matrices = [random_blocks("Q8_0", rows, IN, seed=rows) for rows in (64, 32, 32)]
    layers = [BlockLinear(matrix_of(one), products, bias=True, dtype=torch.float32) for one in matrices]
    for layer in layers:
        assert layer.bias is not None
        layer.bias.data = random_rows(1, layer.out_features, seed=5)[0]
    alone = [layer(random_rows(3, IN)) for layer in layers]
    compute_together(layers)
    x, other = random_rows(3, IN), random_rows(3, IN, seed=9)
    for _ in range(2):
        for layer, right in zip(layers, alone, strict=True):
            assert torch.equal(layer(x), right)
    layers[0](x)
    assert error(layers[1](other) - layers[1].bias, expected(matrices[1], other)) < 0.03, "another input is its own"


def test_a_linear_layer_keeps_dtype_and_shape(products: BlockProducts) -> None:
    blocks = random_blocks("Q8_0", OUT, IN)
    layer = BlockLinear(matrix_of(blocks), products, bias=False, dtype=torch.float32)
    found = layer(random_rows(6, IN).view(2, 3, IN).bfloat16())
    assert found.shape == (2, 3, OUT)
    assert found.dtype == torch.bfloat16
    assert not list(layer.parameters())


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q6_K", "MXFP4"])
def test_an_embedding_looks_up_rows(name: str, products: BlockProducts) -> None:
    blocks = random_blocks(name, 40, IN)
    ids = torch.tensor([[3, 39], [0, 3]])
    found = BlockEmbedding(matrix_of(blocks), products, None, torch.float32)(ids)
    assert torch.equal(found, torch.from_numpy(blocks.numbers)[ids])


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F32"])
def test_bf16_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "_PANEL_WEIGHTS", 40 * IN)  # panels, the last one narrower
    monkeypatch.setattr(bf16, "_TILE_WEIGHTS", 7 * IN)
    blocks, x = random_blocks(name, OUT, IN), random_rows(20, IN)
    make = bf16.Bf16Products(shared_lanes(2))
    with torch.inference_mode():
        make(x[:1].bfloat16(), blocks.kind, blocks.blocks.ctypes.data, (OUT, IN))
    given = (x.bfloat16(), blocks.kind, blocks.blocks.ctypes.data, (OUT, IN))
    found = make(*given)
    assert error(found, expected(blocks, x)) < 0.01
    assert torch.equal(make.alone(*given), found)


def test_all_lanes_are_done_with_a_matrix_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, make = random_blocks("Q8_0", OUT, IN), bf16.Bf16Products(shared_lanes(2))
    begun, ended, both = list[int](), list[int](), threading.Barrier(2)

    def into(out: torch.Tensor, *given: Any) -> None:
        begun.append(out.data_ptr())
        both.wait(10)
        if out.data_ptr() == min(begun):
            raise OSError("gone")  # the first share, which is waited for first
        time.sleep(0.2)
        ended.append(1)

    monkeypatch.setattr(make, "_into", into)
    with pytest.raises(OSError, match="gone"):
        make(random_rows(9, IN).bfloat16(), blocks.kind, blocks.blocks.ctypes.data, (OUT, IN))
    assert ended == [1]


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "BF16"])
def test_bf16_is_taken_by_rows_and_type_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = open_library().types[name]
    monkeypatch.setattr(bf16, "has_bf16", lambda: True)
    assert 2 < bf16.rows_in_bf16([(kind, 512)], open_library()) < 512
    monkeypatch.setattr(bf16, "has_bf16", lambda: False)
    assert bf16.rows_in_bf16([(kind, 512)], open_library()) == float("inf")


def test_the_slower_to_convert_the_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of several types takes one way for all: between those of its types, by their sizes."""
    monkeypatch.setattr(bf16, "has_bf16", lambda: True)
    library = open_library()
    quick, slow = library.types["Q4_K"], library.types["Q6_K"]
    first, both, more, last = (
        bf16.rows_in_bf16(given, library)
        for given in ([(quick, 1)], [(quick, 2), (slow, 1)], [(quick, 1), (slow, 2)], [(slow, 1)])
    )
    assert first < both < more < last


@pytest.mark.parametrize(("name", "is_quick"), [("Q4_K", True), ("IQ4_XS", True), ("Q4_0", False), ("MXFP4", False)])
def test_a_build_that_is_as_quick_in_blocks_keeps_them(
    name: str, is_quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "has_bf16", lambda: True)
    library = SimpleNamespace(ggml_cpu_has_avx512_vnni=lambda: 1)
    found = bf16.rows_in_bf16([(open_library().types[name], 512)], cast(Any, library))
    assert (found == float("inf")) == is_quick


@pytest.mark.parametrize("name", ["F32", "F16"])
def test_finer_numbers_than_bf16_are_never_rounded_to_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "has_bf16", lambda: True)
    assert bf16.rows_in_bf16([(open_library().types[name], 512)], open_library()) == float("inf")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ4_NL", "MXFP4"])
def test_rows_side_by_side_give_the_same_products(name: str) -> None:
    blocks, x = random_blocks(name, OUT, IN), random_rows(1, IN).numpy()
    side_by_side = interleaver(name, IN)
    if not side_by_side.is_possible:
        pytest.skip(f"this CPU's build of ggml has no such form of {name}")
    converted = side_by_side.convert(blocks.blocks)
    assert not np.array_equal(converted, blocks.blocks)
    assert fingerprint(name) == fingerprint(name) != ""
    found = []
    for array, is_converted in ((blocks.blocks, False), (converted, True)):
        graph = Graph(shared_runner(1), 4)
        weights, row = graph.tensor(blocks.kind.number, (IN, OUT)), graph.tensor(F32, (IN, 1))
        if is_converted:
            side_by_side.mark(weights)
        product = graph.library.ggml_mul_mat(graph.context, weights, row)
        out = np.zeros((1, OUT), dtype=np.float32)
        for tensor, memory in ((weights, array), (row, x), (product, out)):
            place(tensor, memory.ctypes.data)
        graph.finish(product)
        graph.run()
        found.append(torch.from_numpy(out))
    assert OUT % ROWS == 0
    assert error(found[1], found[0]) < 1e-5


class Order(Interleaver):
    """An order that ggml has not: bit i of a group of eight rows comes from `bits[i]`, and is flipped by `flips`."""

    def __init__(self, bits: np.ndarray, flips: int) -> None:
        self._row_bytes, self._bits, self._flips = ROW_BYTES, bits, flips
        self._kind, self._library = BlockType("Q9", 0, 32, ROW_BYTES), open_library()

    def convert(self, blocks: np.ndarray) -> np.ndarray:
        groups = np.unpackbits(blocks.reshape(-1, ROWS * ROW_BYTES), axis=1, bitorder="little")
        moved = np.packbits(groups[:, self._bits], axis=1, bitorder="little") ^ np.uint8(self._flips)
        return moved.reshape(blocks.shape)


def moved(unit: int, seed: int = 0) -> np.ndarray:
    """A shuffle of pieces of `unit` bits."""
    pieces = np.random.default_rng(seed).permutation(BITS // unit)
    return (pieces[:, None] * unit + np.arange(unit)).reshape(-1)


def some(rows: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 256, (rows, nbytes), dtype=np.uint8)


@pytest.mark.parametrize("unit", [1, 2, 4, 8, 16, 32, 64])
def test_whatever_moves_bits_is_undone(unit: int) -> None:
    blocks, order = some(40, ROW_BYTES), Order(moved(unit), 0x88)
    assert not np.array_equal(order.convert(blocks), blocks)
    assert np.array_equal(order.plain(order.convert(blocks)), blocks)


def test_some_bits_of_whole_words_are_moved_alone() -> None:
    bits = moved(64)
    bits[[3, 77]] = bits[[77, 3]]
    blocks, order = some(16, ROW_BYTES), Order(bits, 0)
    assert np.array_equal(order.plain(order.convert(blocks)), blocks)


def test_what_loses_bits_is_no_order() -> None:
    bits = moved(8)
    bits[1] = bits[0]
    with pytest.raises(GgmlError, match="orders rows of Q9 in an unknown way"):
        Order(bits, 0).plain(some(8, ROW_BYTES))


@pytest.mark.parametrize("columns", [256, 768, 2048])
@pytest.mark.parametrize("name", orders())
def test_this_machine_s_orders_are_undone(name: str, columns: int) -> None:
    kind, form = open_library().types[name], interleaver(name, columns)
    blocks = some(48, kind.row_bytes(columns))
    converted = form.convert(blocks)
    assert not np.array_equal(converted, blocks)
    assert np.array_equal(form.plain(converted), blocks)
    by_eights = [form.convert(blocks[first : first + ROWS]) for first in range(0, 48, ROWS)]
    assert np.array_equal(np.concatenate(by_eights), converted), "each eight rows are a matrix of their own"
    assert orders()[name] == fingerprint(name) != ""


@pytest.mark.parametrize("name", orders())
def test_wrong_products_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interleaver, "convert", lambda self, blocks: np.zeros_like(blocks))
    with pytest.raises(GgmlError, match=f"wrong products of {name} with rows side by side"):
        known_answers._check.__wrapped__(open_library(), name)


class Machine:
    """A clock, the time that threads waited for cores, and the time that cores were idle, set by hand."""

    def __init__(self) -> None:
        self.now = self.waited = self.idle = 0.0
        self.count = ThreadCount(4, lambda: self.waited, lambda: self.idle, lambda: self.now)


def test_threads_that_wait_for_cores_are_halved_and_come_back() -> None:
    machine = Machine()
    assert machine.count.active == 4
    assert machine.count.is_slow(0.1, 0.001)
    assert not machine.count.is_slow(0.0011, 0.001)
    machine.count.look(0.1)
    assert machine.count.active == 4, "slow, but no thread waited for a core: a page fault, a larger step"
    machine.waited = 0.08
    machine.count.look(0.1)
    assert machine.count.active == 2
    machine.count.look(0.1)
    assert machine.count.active == 2, "nothing was waited for since"
    machine.now, machine.idle = 0.3, 0.6
    machine.count.before_run(machine.now)
    assert machine.count.active == 2, "too early"
    machine.now, machine.idle = 1.3, 0.6
    machine.count.before_run(machine.now)
    assert machine.count.active == 2, "half a core was idle, two are wanted"
    machine.now, machine.idle = 1.6, 1.2
    machine.count.before_run(machine.now)
    assert machine.count.active == 4, "idle since the last look: what was before, a prompt, does not count"


def test_what_another_calling_thread_waited_before_does_not_count() -> None:
    machine = Machine()
    machine.waited = 5.0  # of a thread that calls for the first time
    machine.count.begin()
    machine.count.look(0.1)
    assert machine.count.active == 4
    machine.waited += 0.08
    machine.count.look(0.1)
    assert machine.count.active == 2


def test_threads_that_go_and_come_wait_longer_each_time() -> None:
    machine = Machine()
    waits = []
    for _ in range(4):
        machine.waited += 1.0
        machine.count.look(0.1)
        assert machine.count.active == 2
        began = machine.now
        while machine.count.active == 2:
            machine.now += 0.1
            machine.idle += 0.4
            machine.count.before_run(machine.now)
        waits.append(machine.now - began)
    assert waits == pytest.approx([0.4, 0.8, 1.6, 3.2], abs=0.11)


@pytest.fixture
def no_library() -> Iterator[None]:
    open_library.cache_clear()
    yield
    open_library.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_a_library_that_cannot_be_used_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREROUTE_GGML", str(tmp_path / "absent"))
    with pytest.raises(GgmlError, match="no folder"):
        open_library()
    with pytest.raises(GgmlError, match=r"ggml-base\S* is not there"):
        Library(tmp_path)
    for name in ("libggml-base.so", "libggml-cpu.so"):
        (tmp_path / name).write_text("no library")
    with pytest.raises(GgmlError, match="cannot be opened"):
        Library(tmp_path)


def test_another_version_and_other_structs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_library().folder
    monkeypatch.setattr(library, "_VERSIONS", ("0.99.",))
    with pytest.raises(GgmlError, match=r"holds ggml 0\.20"):
        Library(folder)
    monkeypatch.undo()
    monkeypatch.setattr(library, "_OBJECT_BYTES", 40)
    with pytest.raises(GgmlError, match="other structs"):
        Library(folder)


def test_a_cpu_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the flags are those of x86")
    monkeypatch.setattr(Path, "read_text", lambda *_: "flags\t\t: fpu avx fma f16c bmi2")
    with pytest.raises(GgmlError, match="lacks avx2"):
        library._check_cpu()
