"""What the graphs of a decoder layer compute, and the operations that they have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreroute.kernels.ggml.graph import Graph, TensorRef, place
from foreroute.kernels.ggml.linear import BlockMatrix
from foreroute.kernels.ggml.types import F32

FLOAT = 4


@dataclass(frozen=True)
class Norm:
    """An RMS norm: weight, f32 [width] or [heads, width], and what is added to the mean square."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True)
class BeforeAttention:
    """What makes q, k and v of a layer's inputs, and turns q and k by their positions.

    Attributes:
        norm: of the inputs. matrices: of q, k and v. bias: of all three, f32, concatenated; None without.
        heads: of q, k and v. size: of a head. head_norm: of the heads of q and k; None without.
    """

    norm: Norm
    matrices: tuple[BlockMatrix, BlockMatrix, BlockMatrix]
    bias: torch.Tensor | None
    heads: tuple[int, int, int]
    size: int
    head_norm: Norm | None


@dataclass(frozen=True)
class Attention:
    """What scales scores, and f32 [heads] sinks that take a share of each head's softmax; None without."""

    scale: float
    sinks: torch.Tensor | None


@dataclass(frozen=True)
class Route:
    """How a router's scores choose experts: the `top_k` of the highest score.

    Attributes:
        bias: f32 [experts], added to the product; None without.
        is_share_of_all: weights are the shares of a softmax over all experts; else of one over the chosen.
    """

    top_k: int
    bias: torch.Tensor | None
    is_share_of_all: bool


@dataclass(frozen=True)
class AfterAttention:
    """What makes a layer's residual stream of attention's outputs, and the inputs of its experts.

    Attributes:
        matrix: of the output. bias: f32, or None. norm: of the residual stream.
        router: the matrix whose product chooses experts; None without. route: how it chooses; None without.
    """

    matrix: BlockMatrix
    bias: torch.Tensor | None
    norm: Norm
    router: BlockMatrix | None = None
    route: Route | None = None


class Buffers:
    """Memory between operations, shared by all layers of a model."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def tensor(self, name: str, count: int) -> torch.Tensor:
        """f32 [count] of this name, now and always the same."""
        key = (name, count)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(count, dtype=torch.float32, device="cpu")
        return self._buffers[key]

    def address(self, name: str, count: int) -> int:
        """Where `count` floats of this name lie."""
        return self.tensor(name, count).data_ptr()


def norm_steps(graph: Graph, x: TensorRef, norm: Norm, address: int = 0) -> list[TensorRef]:
    """The steps that norm `x`, the last of which is the result, all in memory at `address`."""
    scaled = graph.library.ggml_rms_norm(graph.context, x, norm.epsilon)
    steps = [scaled, graph.library.ggml_mul(graph.context, scaled, constant(graph, norm.weight))]
    for one in steps:
        place(one, address)
    return steps


def weights_of(graph: Graph, matrix: BlockMatrix) -> TensorRef:
    """A tensor over a matrix, which must be kept."""
    tensor = graph.tensor(matrix.kind.number, (matrix.columns, matrix.rows))
    place(tensor, matrix.address)
    return tensor


def constant(graph: Graph, values: torch.Tensor) -> TensorRef:
    """A tensor over contiguous f32 `values` [width] or [rows, width], which must be kept."""
    return placed(graph, (values.shape[-1], values.shape[0] if values.ndim > 1 else 1), values.data_ptr())


def placed(graph: Graph, extents: Sequence[int], address: int, number: int = F32) -> TensorRef:
    """A tensor of these `extents`, from the innermost, over the memory at `address`."""
    tensor = graph.tensor(number, extents)
    place(tensor, address)
    return tensor


def set_strides(tensor: Any, row: int, matrix: int) -> None:
    """Set the strides of a tensor's rows and matrices, in numbers of 4 bytes."""
    strides: Sequence[int] = (row, matrix, matrix * tensor.contents.ne[2])
    for at, stride in enumerate(strides, 1):
        tensor.contents.nb[at] = FLOAT * stride
