"""Keep the dense weights of a GGUF file in their blocks: linear layers and embeddings over them, in place of torch's.

transformers builds the model by its own constructor; what that made for a matrix in blocks is replaced before weights
are loaded, so that such a matrix is read once, as it is stored, and never becomes floats.
"""

import math
from typing import Any

import torch
from torch import nn

from foreroute.checkpoint.gguf_families import dense_names
from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CorruptCheckpointError
from foreroute.kernels.ggml.linear import BlockEmbedding, BlockLinear, BlockMatrix, BlockProducts, compute_together
from foreroute.kernels.ggml.scales import has_bad_scale
from foreroute.kernels.ggml.types import BlockType

# Layers of one parent that are given the same input, in the order in which families call them.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Floats of torch's own: norms, biases, routers.
_PLAIN = "F32"
_ALIGNMENT = 64


class DenseBlocks:
    """The dense matrices of a file that stay in blocks.

    Args:
        products: computes with them. dtype: of biases and of an embedding's rows.
    Attributes:
        kept: names of the weights that stay in blocks, once the model was made.
    """

    def __init__(self, index: GgufIndex, products: BlockProducts, dtype: torch.dtype) -> None:
        self._index, self._products, self._dtype = index, products, dtype
        self._stored = {ours: name for name, ours in dense_names(index).items() if is_kept(index, name, products)}
        self._matrices: dict[str, BlockMatrix] = {}
        self.kept: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that are in memory."""
        return sum(matrix.blocks.nbytes for matrix in self._matrices.values())

    def build(self, model_class: type[Any]) -> type[Any]:
        """A subclass of transformers' `model_class` that passes for it, whose constructor replaces those layers."""
        blocks = self

        def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            model_class.__init__(self, config, *args, **kwargs)
            blocks.replace(self)

        own = {"__module__": model_class.__module__, "__init__": construct}
        return type(model_class.__name__, (model_class,), own)

    def replace(self, model: Any) -> None:
        """Replace the layers of `model` whose weights stay in blocks."""
        with torch.device("cpu"), torch.inference_mode(False):
            for name, module in [*model.named_modules()]:
                matrix = self._matrix(f"{name}.weight", module)
                if matrix is not None:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, self._module(module, matrix))
        self.kept = frozenset(self._matrices)
        head = model.get_output_embeddings()
        if isinstance(head, BlockLinear):
            head.is_head = True
        for parent_module in model.modules():
            for names in _TOGETHER:
                layers = [getattr(parent_module, name, None) for name in names]
                linear = [layer for layer in layers if isinstance(layer, BlockLinear)]
                if len(linear) == len(names) and len({layer.in_features for layer in linear}) == 1:
                    compute_together(linear)

    def _matrix(self, name: str, module: nn.Module) -> BlockMatrix | None:
        """The blocks of `module`'s weight, read; None where it does not stay in blocks."""
        if type(module) not in (nn.Linear, nn.Embedding):
            return None
        if name == _HEAD and name not in self._stored and _HEAD not in dense_names(self._index).values():
            return self._matrices.get(_EMBEDDING)  # tied
        if name not in self._stored:
            return None
        stored = self._stored[name]
        kind = self._products.library.types[self._index.kinds[stored]]
        rows, columns = self._index.shapes[stored]
        self._matrices[name] = BlockMatrix(kind, columns, _read(self._index, stored, kind, rows, columns))
        return self._matrices[name]

    def _module(self, module: nn.Module, matrix: BlockMatrix) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return BlockEmbedding(matrix, self._products, module.padding_idx, self._dtype)
        assert isinstance(module, nn.Linear)
        with torch.device("meta"):
            return BlockLinear(matrix, self._products, module.bias is not None, self._dtype)


def is_kept(index: GgufIndex, name: str, products: BlockProducts) -> bool:
    """Whether a dense tensor is a matrix whose type ggml multiplies, and not one of plain floats."""
    kind = products.library.types.get(index.kinds[name])
    shape = index.shapes[name]
    return len(shape) == 2 and kind is not None and kind.name != _PLAIN and shape[1] % kind.weights == 0


def dense_block_nbytes(index: GgufIndex, products: BlockProducts) -> int:
    """Bytes of the dense weights when matrices stay in blocks and all else is in f32."""
    return sum(
        index.tensors[name].nbytes if is_kept(index, name, products) else 4 * math.prod(index.shapes[name])
        for name in dense_names(index)
    )


def _read(index: GgufIndex, name: str, kind: BlockType, rows: int, columns: int) -> torch.Tensor:
    """The stored bytes [rows, bytes of a row], aligned to a cache line."""
    entry = index.tensors[name]
    memory = torch.empty(entry.nbytes + _ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % _ALIGNMENT
    blocks = memory[start : start + entry.nbytes]
    with SourceFile(entry.path, index.files.get(entry.path)) as file:
        file.read_into(entry.offset, blocks.numpy().data)
    if has_bad_scale(kind, blocks.numpy()):
        raise CorruptCheckpointError(
            f"{entry.path}: {name} has a scale that is no number (NaN or infinite). The file is damaged, or its "
            "quantiser was at fault: download it again, or take another."
        )
    return blocks.view(rows, kind.row_bytes(columns))
