"""Stores in GGUF's blocks, made from tiny checkpoints; and the resident models of their numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreroute.checkpoint.codecs import CODECS, STORED
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.records import store_name
from foreroute.kernels.ggml.library import open_library
from foreroute.kernels.ggml.quantiser import quantise
from foreroute.loading.block_kernels import dense_type
from foreroute.model.build.skeleton import outline
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import DenseQuantiser, HeldTypes, Int4Blocks, Quantiser, find_held


def quiet(done: int, total: int) -> None:
    """No progress."""


def quantiser_of(folder: Path, quant: str, num_threads: int = 1) -> Quantiser:
    """What quantises the experts of the checkpoint in `folder`."""
    sketch = outline(folder, read_index(folder))
    return Quantiser(sketch.table, CODECS[quant], open_library(), num_threads)


def pack_quantised(folder: Path, quant: str, path: Path | None = None, num_threads: int = 1) -> Path:
    """Pack the checkpoint in `folder`, beside it or to `path`."""
    quantiser, path = quantiser_of(folder, quant, num_threads), path or folder / store_name(quant)
    pack(quantiser.source, path, progress=quiet, quantiser=quantiser)
    return path


def pack_exact(folder: Path, path: Path) -> HeldTypes:
    """Pack the checkpoint in `folder` to `path` as `foreroute pack --layout plain` does, without --quant."""
    table = outline(folder, read_index(folder)).table
    held = find_held(table, quiet)
    pack(table, path, progress=quiet, quantiser=Int4Blocks(table, held.types))
    return held


def by_ggml(rows: torch.Tensor, kind: str) -> np.ndarray:
    """Rows [n, columns] in blocks of `kind` by ggml: uint8 [n, bytes of a row]."""
    library = open_library()
    blocks = torch.zeros(len(rows), library.types[kind].row_bytes(rows.shape[1]), dtype=torch.uint8)
    quantise(library, library.types[kind], rows.float().contiguous(), blocks)
    return blocks.numpy()


def numbers_again(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """What rows [n, columns] are after `kind`, by the gguf package as far as it quantises: float32."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    try:
        blocks = gguf.quants.quantize(rows.float().contiguous().numpy(), number)
    except NotImplementedError:
        blocks = by_ggml(rows, kind)
    return torch.from_numpy(np.array(gguf.quants.dequantize(blocks, number), dtype=np.float32))


def dequantised(folder: Path, quant: str) -> Any:
    """transformers' resident model with every expert matrix quantised and turned back."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", dtype="auto").eval()
    matrices = [(name, p) for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    layers = sorted({name.rpartition(".")[0] for name, _ in matrices}, key=lambda name: int(name.split(".")[2]))
    for name, parameter in matrices:
        stem, _, part = name.rpartition(".")
        if part.endswith("_bias"):
            continue
        kind = CODECS[quant].kind_of(part, layers.index(stem), len(layers))
        is_transposed = model.get_submodule(stem).is_transposed
        for expert in parameter.data:
            back = numbers_again(expert.t() if is_transposed else expert, kind)
            expert.copy_(back.t() if is_transposed else back)
    return model


def dense_quantiser_of(folder: Path, dense: str, num_threads: int = 1) -> DenseQuantiser:
    """What quantises the dense weights of the checkpoint in `folder`."""
    library = open_library()
    sketch = outline(folder, read_index(folder))
    return DenseQuantiser(sketch, dense_type(dense.upper(), sketch, library), library, num_threads)


def pack_dense(folder: Path, dense: str, quant: str | None = None, num_threads: int = 1, **options: Any) -> Path:
    """Pack the checkpoint in `folder` with its dense weights, beside it."""
    quantiser = None if quant is None else quantiser_of(folder, quant, num_threads)
    path = folder / store_name(quant or STORED, dense)
    table = in_blocks(outline(folder, read_index(folder)).table) if quantiser is None else quantiser.source
    of_dense = dense_quantiser_of(folder, dense, num_threads)
    pack(table, path, **{"progress": quiet, "quantiser": quantiser, "dense": of_dense, **options})
    return path
