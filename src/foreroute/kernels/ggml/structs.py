"""ggml's structs and functions as ctypes sees them, for the version in `library.py`; sizes are compared at load."""

import ctypes as c

Address = c.c_void_p


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
}
