"""Orders of eight rows side by side: whatever moves and flips bits is undone, and nothing else is taken for one."""

from types import SimpleNamespace

import numpy as np
import pytest

from foreroute.kernels.ggml import known_answers
from foreroute.kernels.ggml.interleaved import ROWS, Interleaver, fingerprint, interleaver, orders
from foreroute.kernels.ggml.library import GgmlError, open_library

ROW_BYTES = 24
BITS = 8 * ROWS * ROW_BYTES


class Order(Interleaver):
    """An order that ggml has not: bit i of a group of eight rows comes from `bits[i]`, and is flipped by `flips`."""

    def __init__(self, bits: np.ndarray, flips: int) -> None:
        self._row_bytes, self._bits, self._flips = ROW_BYTES, bits, flips
        self._kind, self._library = SimpleNamespace(name="Q9"), SimpleNamespace(version="9")  # type: ignore[assignment]

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
