"""Linear layers and embeddings whose weights stay in blocks, as modules in a transformers model.

Weights are no parameters: a block has no dtype of torch's. Layers that are given the same input, such as q, k and v,
are computed by one graph, when the first of them is called. A router's weight stays a parameter, in floats.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from foreroute.kernels.ggml.bf16 import rows_in_bf16, shared_products
from foreroute.kernels.ggml.graph import Graph, Runner
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.ggml.types import F32, BlockType

# Graphs kept, of some 3 KB each: of all forms, and by one group of matrices.
_MOST_GRAPHS, _MOST_OF_GROUP = 256, 32


class BlockMatrix:
    """A matrix in memory.

    Args:
        blocks: uint8 [rows, bytes of a row].
    Attributes:
        rows: outputs of a linear layer, or tokens of an embedding. address: of the blocks.
    """

    def __init__(self, kind: BlockType, columns: int, blocks: torch.Tensor) -> None:
        self.kind, self.columns, self.blocks = kind, columns, blocks
        self.rows, self.address = int(blocks.shape[0]), blocks.data_ptr()


class _LinearGraph:
    """Multiplies `num_rows` rows by several matrices of given forms; where they lie is said at each run."""

    def __init__(self, runner: Runner, forms: Sequence[tuple[BlockType, int, int]], num_rows: int) -> None:
        graph = self._graph = Graph(runner, 1 + 2 * len(forms))
        x = graph.tensor(F32, (forms[0][2], num_rows))
        weights = [graph.tensor(kind.number, (columns, rows)) for kind, rows, columns in forms]
        products = [graph.library.ggml_mul_mat(graph.context, one, x) for one in weights]
        graph.finish(*products)
        # The structs behind the pointers: looking them up at each run would cost as much as the call.
        self._x, self._weights, self._products = (
            x.contents, [one.contents for one in weights], [one.contents for one in products]
        )  # fmt: skip

    def run(self, x: torch.Tensor, weights: Sequence[int], products: Sequence[torch.Tensor]) -> None:
        """Compute into `products` [rows, out] each."""
        self._x.data = x.data_ptr()
        for tensor, address in zip(self._weights, weights, strict=True):
            tensor.data = address
        for tensor, product in zip(self._products, products, strict=True):
            tensor.data = product.data_ptr()
        self._graph.run()


class BlockGroup:
    """Matrices of as many columns, multiplied by the same rows in one graph."""

    def __init__(self, matrices: Sequence[BlockMatrix], library: Library) -> None:
        self.matrices = tuple(matrices)
        self.forms = tuple((matrix.kind, matrix.rows, matrix.columns) for matrix in matrices)
        self.addresses = [matrix.address for matrix in matrices]
        self.bf16_from = rows_in_bf16([(matrix.kind, matrix.rows * matrix.columns) for matrix in matrices], library)
        self.graphs: dict[int, _LinearGraph] = {}


class BlockProducts:
    """Products of rows and matrices in blocks; graphs are shared by all matrices of one form."""

    def __init__(self, runner: Runner) -> None:
        self.library = runner.library
        self.runner = runner
        # Whether a step of single tokens runs: its rows keep blocks, so that their bits are the same in any company.
        self.decodes: Callable[[], bool] = lambda: False
        self._in_bf16 = shared_products(runner.num_threads)
        self._graphs: OrderedDict[tuple[object, ...], _LinearGraph] = OrderedDict()

    def __call__(self, x: torch.Tensor, group: BlockGroup) -> list[torch.Tensor]:
        """Multiply `x` [rows, columns], f32 and contiguous, by the matrices of `group`: f32 [rows, out] each."""
        num_rows = x.shape[0]
        if num_rows >= group.bf16_from and not self.decodes():
            narrow = x.to(torch.bfloat16)
            return [
                self._in_bf16(narrow, matrix.kind, matrix.address, (matrix.rows, matrix.columns))
                for matrix in group.matrices
            ]
        products = [
            torch.empty((num_rows, matrix.rows), dtype=torch.float32, device="cpu") for matrix in group.matrices
        ]
        graph = group.graphs.get(num_rows)
        (graph or self._graph(group, num_rows)).run(x, group.addresses, products)
        return products

    def _graph(self, group: BlockGroup, num_rows: int) -> _LinearGraph:
        """The graph of the group's form, and from now on the group's; of each the oldest goes."""
        key = (group.forms, num_rows)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = _LinearGraph(self.runner, group.forms, num_rows)
        if len(group.graphs) >= _MOST_OF_GROUP:
            group.graphs.pop(next(iter(group.graphs)))
        group.graphs[num_rows] = graph
        return graph


class BlockLinear(nn.Module):
    """A linear layer over blocks.

    Args:
        matrix: [out, in]. products: computes them. bias: whether there is one; it is loaded like any parameter.
        dtype: of the bias.
    Attributes:
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
        self._group = BlockGroup([matrix], products.library)
        # Layers behind this one that are given the same input; `_ready`: an (input, output) of such a one.
        self._followers: tuple[BlockLinear, ...] = ()
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # What changes at each call is no parameter, and followers are no submodules.
        if name in ("_followers", "_ready"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def followed_by(self, layers: "Sequence[BlockLinear]") -> None:
        """From now on compute `layers` too, which are called next and with the same input."""
        self._followers = tuple(layers)
        self._group = BlockGroup([self.matrix, *(layer.matrix for layer in layers)], self._products.library)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in]: [..., out], in the dtype of `x`."""
        ready = self._ready
        if ready is not None:
            self._ready = None
        product = ready[1] if ready is not None and ready[0] is x else self._compute(x)
        if self.bias is not None:
            product = product + self.bias
        product = product.view(*x.shape[:-1], self.out_features)
        return product if x.dtype == torch.float32 else product.to(x.dtype)

    @property
    def weight(self) -> "BlockWeight":
        """For the few families whose code takes the matrix in place of calling the layer (Jamba's steps)."""
        return BlockWeight(self)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if rows.dtype != torch.float32 or not rows.is_contiguous():
            rows = rows.float().contiguous()
        products = self._products(rows, self._group)
        for layer, product in zip(self._followers, products[1:], strict=True):
            layer._ready = (x, product)
        if self.is_head and not math.isfinite(rows.sum()):
            products[0][~rows.isfinite().all(1)] = math.nan
        return products[0]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.matrix.kind.name}, bias={self.bias is not None}"


class BlockWeight:
    """The matrix [out, in] of a layer over blocks, as far as families use one: it multiplies, and has a dtype."""

    dtype = torch.float32

    def __init__(self, layer: BlockLinear) -> None:
        self._layer = layer

    def __matmul__(self, columns: torch.Tensor) -> torch.Tensor:
        """Multiply columns [batch, in, number]: [batch, out, number]."""
        rows = columns.transpose(-1, -2).contiguous()
        product = self._layer._compute(rows).view(*rows.shape[:-1], self._layer.out_features)
        return product.to(columns.dtype).transpose(-1, -2)


class BlockEmbedding(nn.Module):
    """An embedding over blocks: only the rows that are asked for become numbers.

    Args:
        matrix: [vocabulary, width]. products: has ggml's functions.
        padding_idx: as in nn.Embedding, which others read. dtype: of the rows. scale: they are multiplied by it.
    """

    def __init__(
        self,
        matrix: BlockMatrix,
        products: BlockProducts,
        padding_idx: int | None,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = matrix.rows, matrix.columns, padding_idx
        self.matrix = matrix
        self._to_float = products.library.to_float(matrix.kind.name)
        self._dtype, self._scale = dtype, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up token ids [...]: [..., width]."""
        blocks = self.matrix.blocks.index_select(0, ids.reshape(-1))
        rows = torch.empty(len(blocks), self.embedding_dim, dtype=torch.float32, device="cpu")
        self._to_float(blocks.data_ptr(), rows.data_ptr(), rows.numel())
        rows = rows.view(*ids.shape, self.embedding_dim).to(self._dtype)
        # By a number of that dtype, as Gemma does it.
        return rows if self._scale == 1 else rows * torch.tensor(self._scale, dtype=self._dtype, device="cpu")

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.kind.name}"


def compute_together(layers: Sequence[BlockLinear]) -> None:
    """Let layers that are given the same input, called in this order, be computed by one graph."""
    for at, layer in enumerate(layers):
        layer.followed_by(layers[at + 1 :])


class RouterWeight(nn.Parameter):
    """A float32 weight [experts, hidden] that F.linear multiplies by ggml while tokens are decoded.

    torch's product of one row is rounded otherwise than that of several; ggml's is not. In prompts torch multiplies:
    that is quicker for many rows, and a prompt's bits depend on the pieces that it is computed in anyway.
    """

    products: BlockProducts
    matrix: BlockMatrix
    group: BlockGroup
    # Inputs [rows, hidden] whose product with this weight is known, and the product.
    ready: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply by ggml where this is what F.linear was given as its weight; anything else is torch's."""
        with torch._C.DisableTorchFunctionSubclass():
            weight = args[1] if func is nn.functional.linear and len(args) > 1 else None
            if type(weight) is RouterWeight and weight.products.decodes() and not kwargs:
                return _router_product(weight, *args[:1], *args[2:])
            return func(*args, **(kwargs or {}))


def keep_router_alike(router: nn.Module, products: BlockProducts) -> None:
    """Replace the float32 matrices of `router`, a module that chooses experts, by `RouterWeight`s."""
    for module in router.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.ndim == 2 and parameter.dtype == torch.float32 and parameter.is_contiguous():
                kind = products.library.types["F32"]
                weight = RouterWeight(parameter.detach(), requires_grad=False)
                weight.products = products
                blocks = parameter.detach().view(torch.uint8)
                weight.matrix = BlockMatrix(kind, parameter.shape[1], blocks)
                weight.group = BlockGroup([weight.matrix], products.library)
                setattr(module, name, weight)


def _router_product(weight: RouterWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    ready, weight.ready = weight.ready, None
    if ready is not None and ready[0].data_ptr() == x.data_ptr() and ready[0].numel() == x.numel():
        product = ready[1]
    else:
        (product,) = weight.products(x.reshape(-1, x.shape[-1]).float().contiguous(), weight.group)
    if bias is not None:
        product = product + bias
    return product.view(*x.shape[:-1], product.shape[-1]).to(x.dtype)
