"""ggml as ctypes sees it: tensor types, structs and functions of the version in library.py.

Of a type: its number in a file, how many weights and bytes a block has, and where its scales are. The sizes of structs
are compared at load.
"""

import ctypes as c
from dataclasses import dataclass

import numpy as np

# Numbers are part of GGUF's format and never reused; names as the gguf package spells them. "F32" is the type of
# activations and biases, "I32" that of ids.
TYPE_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "I32": 26, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40,
}  # fmt: skip
F32, I32 = TYPE_NUMBERS["F32"], TYPE_NUMBERS["I32"]
# Those that a matrix may have.
MATRIX_TYPES = tuple(name for name in TYPE_NUMBERS if name != "I32")
# Where the fp16 scales and offsets are in a block.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "F16": (0,),
}  # fmt: skip
_HALF_EXPONENT, _BF16_EXPONENT, _NO_POWER = 0x7C00, 0x7F80, 0xFF
_BLOCKS_AT_ONCE = 2**20

Address = c.c_void_p


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of matrices: `weights` in a row share a block of `nbytes`."""

    name: str
    number: int
    weights: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns`, which are whole blocks."""
        assert columns % self.weights == 0, f"{columns} columns are no whole blocks of {self.name}"
        return columns // self.weights * self.nbytes


def has_bad_scale(kind: BlockType, blocks: np.ndarray) -> bool:
    """Whether a scale in `blocks`, uint8 and whole blocks of `kind`, is NaN or infinite.

    ggml's products would not show it: activations are rounded to 8-bit integers before the next product, and what is no
    number becomes some integer there.
    IQ1_M's and NVFP4's are not looked at: those of the first are in pieces, the second's are below infinity.
    """
    rows = blocks.reshape(-1, kind.nbytes)
    return any(
        _is_bad(kind.name, rows[first : first + _BLOCKS_AT_ONCE]) for first in range(0, len(rows), _BLOCKS_AT_ONCE)
    )


def _is_bad(name: str, rows: np.ndarray) -> bool:
    if name == "MXFP4":
        return bool((rows[:, 0] == _NO_POWER).any())
    if name == "BF16":
        return _have_exponent(rows, 0, _BF16_EXPONENT)
    return any(_have_exponent(rows, at, _HALF_EXPONENT) for at in _HALVES.get(name, ()))


def _have_exponent(rows: np.ndarray, at: int, exponent: int) -> bool:
    """Whether one of the 16-bit floats at byte `at` has this greatest exponent."""
    halves = np.ndarray((len(rows),), "<u2", buffer=rows, offset=at, strides=(rows.strides[0],))
    return bool(((halves & exponent) == exponent).any())


class Tensor(c.Structure):
    """`struct ggml_tensor`: extents `ne` from the innermost, strides `nb` in bytes."""

    _fields_ = [
        ("type", c.c_int), ("buffer", Address), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4), ("op", c.c_int),
        ("op_params", c.c_int32 * 16), ("flags", c.c_int32), ("src", Address * 10), ("view_src", Address),
        ("view_offs", c.c_size_t), ("data", Address), ("name", c.c_char * 64), ("extra", Address),
        ("padding", c.c_char * 8),
    ]  # fmt: skip


class ContextParams(c.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", c.c_size_t), ("mem_buffer", Address), ("no_alloc", c.c_bool)]


class ComputePlan(c.Structure):
    """`struct ggml_cplan`."""

    _fields_ = [
        ("work_size", c.c_size_t), ("work_data", Address), ("n_threads", c.c_int), ("threadpool", Address),
        ("abort_callback", Address), ("abort_callback_data", Address), ("use_ref", c.c_bool),
    ]  # fmt: skip


class PoolParams(c.Structure):
    """`struct ggml_threadpool_params`."""

    _fields_ = [
        ("cpumask", c.c_bool * 512), ("n_threads", c.c_int), ("prio", c.c_int), ("poll", c.c_uint32),
        ("strict_cpu", c.c_bool), ("paused", c.c_bool),
    ]  # fmt: skip


class TypeTraits(c.Structure):
    """`struct ggml_type_traits`: to_float(blocks, floats, count) dequantises."""

    _fields_ = [
        ("type_name", c.c_char_p), ("blck_size", c.c_int64), ("blck_size_interleave", c.c_int64),
        ("type_size", c.c_size_t), ("is_quantized", c.c_bool),
        ("to_float", c.CFUNCTYPE(None, Address, Address, c.c_int64)), ("from_float_ref", Address),
    ]  # fmt: skip


TensorPointer = c.POINTER(Tensor)
# (level, text, user data).
LogCallback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, Address)
# Name -> result, arguments.
_T, _I, _L, _Z = TensorPointer, c.c_int, c.c_int64, c.c_size_t
BASE_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ggml_version": (c.c_char_p, []),
    "ggml_log_set": (None, [LogCallback, Address]),
    "ggml_init": (Address, [ContextParams]),
    "ggml_free": (None, [Address]),
    "ggml_tensor_overhead": (_Z, []),
    "ggml_graph_overhead_custom": (_Z, [_Z, c.c_bool]),
    "ggml_new_graph_custom": (Address, [Address, _Z, c.c_bool]),
    "ggml_build_forward_expand": (None, [Address, _T]),
    "ggml_new_tensor_2d": (_T, [Address, _I, _L, _L]),
    "ggml_new_tensor_3d": (_T, [Address, _I, _L, _L, _L]),
    "ggml_mul_mat": (_T, [Address, _T, _T]),
    "ggml_mul_mat_id": (_T, [Address, _T, _T, _T]),
    "ggml_add_id": (_T, [Address, _T, _T, _T]),
    "ggml_add": (_T, [Address, _T, _T]),
    "ggml_sub": (_T, [Address, _T, _T]),
    "ggml_mul": (_T, [Address, _T, _T]),
    "ggml_flash_attn_ext": (_T, [Address, _T, _T, _T, _T, c.c_float, c.c_float, c.c_float]),
    "ggml_flash_attn_ext_add_sinks": (None, [_T, _T]),
    "ggml_scale": (_T, [Address, _T, c.c_float]),
    "ggml_rms_norm": (_T, [Address, _T, c.c_float]),
    "ggml_get_rows": (_T, [Address, _T, _T]),
    "ggml_cpy": (_T, [Address, _T, _T]),
    "ggml_soft_max": (_T, [Address, _T]),
    "ggml_argsort": (_T, [Address, _T, _I]),
    "ggml_reshape_3d": (_T, [Address, _T, _L, _L, _L]),
    "ggml_permute": (_T, [Address, _T, _I, _I, _I, _I]),
    "ggml_cont": (_T, [Address, _T]),
    "ggml_swiglu_split": (_T, [Address, _T, _T]),
    "ggml_geglu_split": (_T, [Address, _T, _T]),
    "ggml_swiglu_oai": (_T, [Address, _T, _T, c.c_float, c.c_float]),
    "ggml_blck_size": (_L, [_I]),
    "ggml_type_size": (_Z, [_I]),
    "ggml_type_name": (c.c_char_p, [_I]),
    "ggml_get_type_traits": (c.POINTER(TypeTraits), [_I]),
    "ggml_quantize_chunk": (_Z, [_I, Address, Address, _L, _L, _L, Address]),
    "ggml_quantize_requires_imatrix": (c.c_bool, [_I]),
    "ggml_threadpool_params_default": (PoolParams, [_I]),
    "ggml_backend_reg_dev_get": (Address, [Address, _Z]),
    "ggml_backend_reg_get_proc_address": (Address, [Address, c.c_char_p]),
    "ggml_backend_buft_name": (c.c_char_p, [Address]),
    "ggml_backend_buft_alloc_buffer": (Address, [Address, _Z]),
    "ggml_backend_buffer_get_base": (Address, [Address]),
    "ggml_backend_buffer_free": (None, [Address]),
    "ggml_backend_tensor_alloc": (_I, [Address, _T, Address]),
    "ggml_backend_tensor_set": (None, [_T, Address, _Z, _Z]),
}
CPU_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ggml_cpu_init": (None, []),
    "ggml_graph_plan": (ComputePlan, [Address, _I, Address]),
    "ggml_graph_compute": (_I, [Address, c.POINTER(ComputePlan)]),
    "ggml_threadpool_new": (Address, [c.POINTER(PoolParams)]),
    "ggml_threadpool_free": (None, [Address]),
    "ggml_threadpool_pause": (None, [Address]),
    "ggml_threadpool_resume": (None, [Address]),
    "ggml_backend_cpu_reg": (Address, []),
    "ggml_cpu_has_avx512_vnni": (c.c_int, []),
}
