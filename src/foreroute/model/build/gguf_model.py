"""Convert a GGUF file for transformers: to a config, and to dequantised dense tensors.

Settings come from the file's metadata, not from transformers' table for GGUF, which lacks the head width and the expert
width (5.23), and so gives models of other shapes.
"""

import math
from typing import Any

import torch

from foreroute.checkpoint.gguf_families import dense_names, settings_of
from foreroute.checkpoint.gguf_file import GgufIndex, gguf_package
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CheckpointError, named
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
    """A dense tensor of the file, read and dequantised by the gguf package when it is indexed."""

    def __init__(self, index: GgufIndex, name: str, dtype: torch.dtype) -> None:
        self._index, self._name, self.dtype = index, name, dtype

    def is_floating_point(self) -> bool:
        """As in torch's tensors."""
        return True

    def __getitem__(self, at: Any) -> torch.Tensor:
        import numpy

        gguf, index, name = gguf_package(), self._index, self._name
        entry, kind = index.tensors[name], gguf.GGMLQuantizationType[index.kinds[name]]
        raw = numpy.empty(entry.nbytes, dtype=numpy.uint8)
        with SourceFile(entry.path, index.files.get(entry.path)) as file:
            file.read_into(entry.offset, raw.data)
        shape = index.shapes[name]
        plain = {"F32": numpy.float32, "F16": numpy.float16}.get(kind.name)
        numbers = raw.view(plain) if plain else gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), kind)
        return torch.from_numpy(numpy.array(numbers)).view(shape).to(self.dtype)[at]


def gguf_state(index: GgufIndex, dtype: torch.dtype) -> dict[str, LazyGgufTensor]:
    """Every dense tensor of `index` by transformers' name, in `dtype` and the model's shape; no experts.

    Each is read when transformers loads it, which costs one in fp32 beside the result.

    Raises:
        ReadError: when read: the file changed since its header was read, ends too early, or the disk failed.
    """
    return {ours: LazyGgufTensor(index, name, dtype) for name, ours in dense_names(index).items()}
