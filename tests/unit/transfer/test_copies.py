"""Bytes land where the copy says, and nowhere else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreroute.transfer.load import apply_copies
from foreroute.types import Copy
from tests.unit.transfer.expert_files import flat

GUARD = 0xEE


def naive(copies, source, slot):
    for copy in copies:
        for row in range(copy.rows):
            for col in range(copy.cols):
                src = copy.src_offset + (row * copy.cols + col) * copy.itemsize
                dst = copy.dst_offset + row * copy.dst_row_stride + col * copy.dst_col_stride
                slot[dst : dst + copy.itemsize] = source[src : src + copy.itemsize]


def transposed(rows, cols, itemsize):
    return {"dst_row_stride": itemsize, "dst_col_stride": rows * itemsize}


def interleaved_rows(rows, cols, itemsize):
    return {"dst_row_stride": 2 * cols * itemsize, "dst_col_stride": itemsize}


def interleaved_cols(rows, cols, itemsize):
    return {"dst_row_stride": 2 * cols * itemsize, "dst_col_stride": 2 * itemsize}


def contiguous(rows, cols, itemsize):
    return {"dst_row_stride": cols * itemsize, "dst_col_stride": itemsize}


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    itemsize=st.sampled_from([1, 2, 3, 4, 8, 16]),
    layout=st.sampled_from([transposed, interleaved_rows, interleaved_cols, contiguous]),
    src_offset=st.integers(0, 7),
    dst_offset=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_layout_is_copied_byte_for_byte(rows, cols, itemsize, layout, src_offset, dst_offset, seed):
    source = np.random.default_rng(seed).integers(0, 256, 8 + rows * cols * itemsize, dtype=np.uint8)
    copy = Copy(src_offset, dst_offset, rows, cols, itemsize, **layout(rows, cols, itemsize))
    slot = bytearray([GUARD]) * (80 + 4 * rows * cols * itemsize)
    expected = bytearray(slot)
    naive([copy], source.tobytes(), expected)
    apply_copies([copy], source, memoryview(slot))
    assert slot == expected


def test_parts_are_put_together_in_one_slot():
    source = np.arange(12, dtype=np.uint8)
    slot = bytearray([GUARD]) * 16
    # Two 2x3 matrices of bytes: their rows interleaved, so that the first of each comes first.
    copies = [Copy(0, 0, 2, 3, 1, 6, 1), Copy(6, 3, 2, 3, 1, 6, 1)]
    apply_copies(copies, source, memoryview(slot))
    assert list(slot) == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11] + [GUARD] * 4


def test_a_large_transposition_is_right_too():
    """Larger than any tile that the copy may be cut into."""
    rows, cols = 300, 517
    source = np.random.default_rng(1).integers(0, 2**16, (rows, cols), dtype=np.uint16)
    slot = bytearray(rows * cols * 2)
    apply_copies([Copy(0, 0, rows, cols, 2, 2, rows * 2)], source.reshape(-1).view(np.uint8), memoryview(slot))
    assert slot == source.T.tobytes()


def test_a_copy_beyond_what_was_read_is_refused():
    with pytest.raises(AssertionError, match="beyond the 8 bytes"):
        apply_copies([flat(9)], np.zeros(8, np.uint8), memoryview(bytearray(16)))


@pytest.mark.parametrize("copy", [flat(8, dst_offset=12), Copy(0, 0, 2, 4, 1, 100, 1)])
def test_a_copy_beyond_the_slot_is_refused(copy):
    with pytest.raises((ValueError, TypeError)):
        apply_copies([copy], np.zeros(8, np.uint8), memoryview(bytearray(16)))
