"""Read stored weights by name on demand, and pass them to transformers' `from_pretrained` in place of a folder.

They are read here and not by transformers, so that they come from the very files whose headers were read, and so that
no file stays mapped: truncating a mapped file kills the process. transformers' renaming and checks still apply.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foreroute.checkpoint.index import CheckpointIndex, TensorEntry
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError

# Dtypes that safetensors and torch share.
_TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
# Kernels give the same bits for addresses that are equal modulo this (layouts.py); also a cache line.
_ALIGNMENT = 64


class LazyTensor:
    """A tensor of the checkpoint, read when it is indexed; transformers treats it as a slice of safetensors."""

    def __init__(self, index: CheckpointIndex, name: str) -> None:
        self._index = index
        self._name = name

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return _torch_dtype(self._index.tensors[self._name])

    def is_floating_point(self) -> bool:
        """As in torch's tensors; transformers calls it where the config names no dtype."""
        return self.dtype.is_floating_point

    def __getitem__(self, at: Any) -> torch.Tensor:
        return _read(self._index, self._name)[at]


def stored_state(index: CheckpointIndex) -> dict[str, LazyTensor]:
    """Every tensor of an unquantised checkpoint by its stored name; nothing is read yet.

    The order is that in which transformers reads files: the first gives the dtype if the config has none. Experts are
    included but never read, as the model has no parameters for them.
    """
    names = sorted(index.tensors, key=lambda name: (index.tensors[name].path, name))
    return {name: LazyTensor(index, name) for name in names}


class CountedTensor:
    """A tensor of a state that tells `noted` its bytes when it is read, and is that tensor in all else."""

    def __init__(self, tensor: Any, noted: Callable[[int], None]) -> None:
        self._tensor, self._noted = tensor, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def __getitem__(self, at: Any) -> torch.Tensor:
        found: torch.Tensor = self._tensor[at]
        self._noted(found.nbytes)
        return found


def from_state(
    model_class: Any, folder: Path, state: Mapping[str, Any], *, dtype: torch.dtype | str,
    noted: Callable[[int], None] | None = None, **kwargs: Any,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """Make a model with the weights of `state`, and transformers' report of missing, unexpected and mismatched keys.

    Name and generation settings are those of a model loaded from `folder`.

    Args:
        model_class: transformers'. state: by stored name, tensors or objects that threads read by indexing with `...`.
        dtype: see load_skeleton. noted: called with the bytes of each tensor as it is read, by any thread.
        kwargs: for `from_pretrained`, `config` among them.
    """
    common: dict[str, Any] = {
        "experts_implementation": "eager",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # the caller refuses those reported
        **kwargs,
    }
    if noted is not None:
        state = {
            name: tensor if isinstance(tensor, torch.Tensor) else CountedTensor(tensor, noted)
            for name, tensor in state.items()
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
    """Read the stored tensor `entry` into its own memory, in its stored shape [...].

    Its address equals the file offset modulo a cache line, as in a mapped file: kernels give different bits at other
    alignments, and the reference for exactness, transformers' resident model, maps its files.

    Raises:
        ReadError: the file changed, ends too early, or the disk failed.
        UnsupportedModelError: torch lacks the dtype.
    """
    dtype = _torch_dtype(entry)
    if entry.nbytes != math.prod(entry.shape) * dtype.itemsize:
        raise CorruptCheckpointError(f"{entry.path}: {entry.name} has {entry.nbytes} bytes, not those of its shape.")
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    # torch's memory, not numpy's: that requests huge pages, which can take the system longer than the read itself.
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
