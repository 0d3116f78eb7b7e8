"""Linear layers and embeddings whose weights stay in blocks, as modules in a transformers model.

Weights are no parameters: a block has no dtype of torch's. Layers that are given the same input, such as q, k and v,
are computed by one graph, when the first of them is called.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foreroute.kernels.ggml.bf16 import Bf16Products, is_quicker
from foreroute.kernels.ggml.graph import Graph, Runner, TensorRef, place
from foreroute.kernels.ggml.types import F32, BlockType

_MOST_GRAPHS = 256


@dataclass(frozen=True, eq=False)
class BlockMatrix:
    """A matrix in memory: `blocks` uint8 [rows, bytes of a row]."""

    kind: BlockType
    columns: int
    blocks: torch.Tensor

    @property
    def rows(self) -> int:
        """Rows: outputs of a linear layer, or tokens of an embedding."""
        return len(self.blocks)


class _LinearGraph:
    """Multiplies `num_rows` rows by several matrices of given forms; where they lie is said at each run."""

    def __init__(self, runner: Runner, forms: Sequence[tuple[BlockType, int, int]], num_rows: int) -> None:
        graph = self._graph = Graph(runner, 1 + 2 * len(forms))
        self._x = graph.tensor(F32, (forms[0][2], num_rows))
        self._weights: list[TensorRef] = []
        self._products: list[TensorRef] = []
        for kind, rows, columns in forms:
            weights = graph.tensor(kind.number, (columns, rows))
            self._weights.append(weights)
            self._products.append(graph.library.ggml_mul_mat(graph.context, weights, self._x))
        graph.finish(*self._products)

    def run(self, x: int, weights: Sequence[int], products: Sequence[int]) -> None:
        """Compute from and into these addresses."""
        place(self._x, x)
        for tensor, address in zip(self._weights, weights, strict=True):
            place(tensor, address)
        for tensor, address in zip(self._products, products, strict=True):
            place(tensor, address)
        self._graph.run()


class BlockProducts:
    """Products of rows and matrices in blocks; graphs are shared by all matrices of one form."""

    def __init__(self, runner: Runner) -> None:
        self.library = runner.library
        self._runner = runner
        # Whether a step of single tokens runs: its rows keep blocks, so that their bits are the same in any company.
        self.decodes: Callable[[], bool] = lambda: False
        self._in_bf16 = Bf16Products(runner)
        self._graphs: OrderedDict[tuple[object, ...], _LinearGraph] = OrderedDict()

    def __call__(self, x: torch.Tensor, matrices: Sequence[BlockMatrix]) -> list[torch.Tensor]:
        """Multiply `x` [rows, columns], f32 and contiguous, by matrices of as many columns: f32 [rows, out] each."""
        if not self.decodes() and all(is_quicker(matrix.kind, len(x)) for matrix in matrices):
            narrow = x.to(torch.bfloat16)
            return [
                self._in_bf16(narrow, matrix.kind, matrix.blocks.data_ptr(), (matrix.rows, matrix.columns))
                for matrix in matrices
            ]
        forms = tuple((matrix.kind, matrix.rows, matrix.columns) for matrix in matrices)
        key = (forms, len(x))
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = _LinearGraph(self._runner, forms, len(x))
        products = [torch.empty(len(x), matrix.rows, dtype=torch.float32) for matrix in matrices]
        graph.run(
            x.data_ptr(),
            [matrix.blocks.data_ptr() for matrix in matrices],
            [product.data_ptr() for product in products],
        )
        return products


class BlockLinear(nn.Module):
    """A linear layer over blocks.

    Args:
        matrix: [out, in]. products: computes them. bias: whether there is one; it is loaded like any parameter.
        dtype: of the bias.
    Attributes:
        together: the layers that are given the same input, this one among them, in the order of their calls.
        is_head: rows that are no numbers give outputs that are none, as torch has it, where ggml's product would
            round them to some.
    """

    is_head = False

    def __init__(self, matrix: BlockMatrix, products: BlockProducts, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.matrix = matrix
        self._products = products
        self.bias = nn.Parameter(torch.empty(matrix.rows, dtype=dtype), requires_grad=False) if bias else None
        self.together: list[BlockLinear] = [self]
        # (input, output) computed together with an earlier layer's.
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Not a list of submodules: the others are where the model has them.
        if name in ("together", "matrix", "_products", "_ready"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in]: [..., out], in the dtype of `x`."""
        ready, self._ready = self._ready, None
        product = ready[1] if ready is not None and ready[0] is x else self._compute(x)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float().contiguous()
        layers = self.together[self.together.index(self) :]
        own, *others = self._products(rows, [layer.matrix for layer in layers])
        for layer, product in zip(layers[1:], others, strict=True):
            layer._ready = (x, product)
        if self.is_head and not math.isfinite(rows.sum()):
            own[~rows.isfinite().all(1)] = math.nan
        return own

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.matrix.kind.name}, bias={self.bias is not None}"


class BlockEmbedding(nn.Module):
    """An embedding over blocks: only the rows that are asked for become numbers.

    Args:
        matrix: [vocabulary, width]. products: has ggml's functions.
        padding_idx: as in nn.Embedding, which others read. dtype: of the rows.
    """

    def __init__(
        self, matrix: BlockMatrix, products: BlockProducts, padding_idx: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = matrix.rows, matrix.columns, padding_idx
        self.matrix = matrix
        self._to_float = products.library.to_float(matrix.kind.name)
        self._dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up token ids [...]: [..., width]."""
        blocks = self.matrix.blocks.index_select(0, ids.reshape(-1))
        rows = torch.empty(len(blocks), self.embedding_dim, dtype=torch.float32)
        self._to_float(blocks.data_ptr(), rows.data_ptr(), rows.numel())
        return rows.view(*ids.shape, self.embedding_dim).to(self._dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.kind.name}"


def compute_together(layers: Sequence[BlockLinear]) -> None:
    """Let layers that are given the same input, called in this order, be computed by one graph."""
    for layer in layers:
        layer.together = list(layers)
