"""Convert a GGUF file for transformers: to a config, and to dequantised dense tensors.

Settings come from the file's metadata, not from transformers' table for GGUF, which lacks the head width and the expert
width (5.23), and so gives models of other shapes.
"""

import math
from typing import Any

import torch

from foreroute.checkpoint.gguf_families import dense_names, settings_of
from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CheckpointError, named
from foreroute.kernels.torch.gguf_blocks import dequantise_gguf
from foreroute.model.build.config_sizes import check_sizes


def gguf_config(index: GgufIndex) -> Any:
    """Make transformers' config of the model in the file.

    Raises:
        CheckpointError: the metadata do not describe a model.
    """
    from transformers import AutoConfig

    with named(f"{index.folder}: its metadata describe no {index.architecture}", CheckpointError):
        model_type, settings = settings_of(index)
        check_sizes(settings, index.folder)
        return AutoConfig.for_model(model_type, **settings)


def gguf_dense_nbytes(index: GgufIndex) -> int:
    """Bytes of the dense weights when dequantised to 16 bit."""
    return sum(2 * math.prod(index.shapes[name]) for name in dense_names(index))


class LazyGgufTensor:
    """A dense tensor of the file, read and dequantised when it is indexed."""

    def __init__(self, index: GgufIndex, name: str, dtype: torch.dtype) -> None:
        self._index, self._name, self.dtype = index, name, dtype

    def is_floating_point(self) -> bool:
        """As in torch's tensors."""
        return True

    def __getitem__(self, at: Any) -> torch.Tensor:
        index, name = self._index, self._name
        entry, shape = index.tensors[name], index.shapes[name]
        raw = torch.empty(math.prod(shape[:-1]), entry.nbytes // math.prod(shape[:-1]), dtype=torch.uint8)
        with SourceFile(entry.path, index.files.get(entry.path)) as file:
            file.read_into(entry.offset, raw.view(-1).numpy().data)
        return dequantise_gguf(index.kinds[name], raw).view(shape).to(self.dtype)[at]


def gguf_state(index: GgufIndex, dtype: torch.dtype) -> dict[str, LazyGgufTensor]:
    """Every dense tensor of `index` by transformers' name, in `dtype` and the model's shape; no experts.

    Each is read when transformers loads it, which costs one in fp32 beside the result.

    Raises:
        ReadError: when read: the file changed since its header was read, ends too early, or the disk failed.
    """
    return {ours: LazyGgufTensor(index, name, dtype) for name, ours in dense_names(index).items()}
