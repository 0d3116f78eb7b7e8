"""Stored weights by name, read when they are asked for; and transformers' `from_pretrained`, given them and no folder.

They are read here and not by transformers, so that they come from the very files whose headers say where the experts
lie, and so that no file stays mapped: a mapped file that is cut off ends the process. What transformers does to names,
and what it refuses, stays its own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foreroute.checkpoint.index import CheckpointIndex, TensorEntry
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError

# Dtypes of safetensors files that torch has too.
_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
# Addresses are alike modulo this where matrix kernels give the same bits (layouts.py); also a cache line.
_ALIGNMENT = 64


class LazyTensor:
    """A tensor of the checkpoint that is read when it is indexed; transformers takes it for a slice of safetensors."""

    def __init__(self, index: CheckpointIndex, name: str) -> None:
        self._index = index
        self._name = name

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return _torch_dtype(self._index.tensors[self._name])

    def is_floating_point(self) -> bool:
        """As torch's tensors say it; asked where the config names no dtype."""
        return self.dtype.is_floating_point

    def __getitem__(self, at: Any) -> torch.Tensor:
        return _read(self._index, self._name)[at]


def stored_state(index: CheckpointIndex) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint that is not quantised, by its stored name; nothing is read yet.

    In the order in which transformers goes through the files, for the first to say the dtype where the config does not.
    Experts are among them, and never read: the model has no place for them.
    """
    names = sorted(index.tensors, key=lambda name: (index.tensors[name].path, name))
    return {name: LazyTensor(index, name) for name in names}


def from_state(
    model_class: Any, folder: Path, state: Mapping[str, Any], *, dtype: torch.dtype | str, **kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with the weights of `state`, and transformers' account of what was missing, unexpected or mismatched.

    All else is as if it had been loaded from `folder`: its name, and how to generate.

    Args:
        state: tensors by stored name, or what is one when it is indexed with `...`; it is read then, by threads.
        dtype: see load_skeleton. kwargs: passed on; `config` is among them.
    """
    common: dict[str, Any] = {
        "experts_implementation": "eager",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are reported, and refused by whoever asked
        **kwargs,
    }
    model, info = model_class.from_pretrained(None, state_dict=state, dtype=dtype, **common)
    model.name_or_path = model.config._name_or_path = str(folder)
    if folder.is_dir() and kwargs.get("generation_config") is None and model.can_generate():
        model.adjust_generation_fn(
            None, True, None, str(folder), cache_dir=None, force_download=False, proxies=None, local_files_only=True,
            token=None, revision="main", subfolder="", trust_remote_code=False,
        )  # fmt: skip
    return model, info


def read_tensor(file: SourceFile, entry: TensorEntry) -> torch.Tensor:
    """One stored tensor, in memory of its own.

    Its address is the file's offset, modulo a cache line, as it would be in a mapped file: matrix kernels give other
    bits at other alignments, and transformers' resident model, which maps its files, is what the bits are held against.

    Raises:
        ReadError: the file changed, ends too early, or the disk failed.
        UnsupportedModelError: a dtype that torch does not have.
    """
    dtype = _torch_dtype(entry)
    if entry.nbytes != math.prod(entry.shape) * dtype.itemsize:
        raise CorruptCheckpointError(f"{entry.path}: {entry.name} has {entry.nbytes} bytes, not those of its shape.")
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    # torch's memory, not numpy's: that asks for huge pages, which the system may search for longer than reading takes.
    memory = torch.empty(entry.nbytes + _ALIGNMENT, dtype=torch.uint8)
    start = (entry.offset - memory.data_ptr()) % _ALIGNMENT
    part = memory.numpy()[start : start + entry.nbytes]
    file.read_into(entry.offset, part.data)
    return torch.frombuffer(part, dtype=dtype).view(entry.shape)


def _torch_dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in _TORCH_DTYPES:
        raise UnsupportedModelError(f"{entry.path}: {entry.name} is stored as {entry.dtype}, which is not read.")
    return _TORCH_DTYPES[entry.dtype]


def _read(index: CheckpointIndex, name: str) -> torch.Tensor:
    entry = index.tensors[name]
    with SourceFile(entry.path, index.files.get(entry.path)) as file:
        return read_tensor(file, entry)
