"""A GGUF file as transformers wants it: a config, and the dense tensors as numbers.

Settings are read from the file's own metadata, not through transformers' table for GGUF, which leaves out the width of
a head and of an expert (5.23), and so gives models of another shape.
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
    """transformers' config of the model in the file.

    Raises:
        CheckpointError: the metadata describe no model.
    """
    from transformers import AutoConfig

    with named(f"{index.folder}: its metadata describe no {index.architecture}", CheckpointError):
        model_type, settings = settings_of(index)
        check_sizes(settings, index.folder)
        return AutoConfig.for_model(model_type, **settings)


def gguf_dense_nbytes(index: GgufIndex) -> int:
    """Bytes that the dense weights will take as numbers of two bytes."""
    return sum(2 * math.prod(index.shapes[name]) for name in dense_names(index))


def gguf_state(index: GgufIndex, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every dense tensor by transformers' name, in `dtype`; experts are not read.

    Numbers are those of the gguf package's dequantiser. Cost: one dense tensor in fp32 beside the result.

    Raises:
        ReadError: the file changed since its header was read, ends too early, or the disk failed.
    """
    import numpy

    gguf = gguf_package()
    state: dict[str, torch.Tensor] = {}
    path = str(index.folder)
    with SourceFile(path, index.files.get(path)) as file:
        for name, ours in dense_names(index).items():
            entry, kind = index.tensors[name], gguf.GGMLQuantizationType[index.kinds[name]]
            raw = numpy.empty(entry.nbytes, dtype=numpy.uint8)
            file.read_into(entry.offset, raw.data)
            shape = index.shapes[name]
            plain = {"F32": numpy.float32, "F16": numpy.float16}.get(kind.name)
            numbers = raw.view(plain) if plain else gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), kind)
            state[ours] = torch.from_numpy(numpy.array(numbers)).view(shape).to(dtype)
    return state
