"""What a decoder layer computes beside experts, as graphs: before attention, attention of one token, and after it.

A call of torch costs little by itself, but after each product its code, and Python's, have left the processor's caches:
the twenty calls that these graphs replace took 0.4 ms a layer of gpt-oss-20b, whose products take 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreroute.kernels.ggml.graph import Graph, Runner, TensorRef, place
from foreroute.kernels.ggml.linear import BlockMatrix
from foreroute.kernels.ggml.types import F32, TYPE_NUMBERS

_FLOAT = 4
_F16 = TYPE_NUMBERS["F16"]
# (heads of queries, of keys and values, size of a key, of a value, scale, whether there are sinks, and a mask)
_Form = tuple[int, int, int, int, float, bool, bool]


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
class AfterAttention:
    """What makes a layer's residual stream of attention's outputs, and the inputs of its experts.

    Attributes:
        matrix: of the output. bias: f32, or None. norm: of the residual stream.
        router: the matrix whose product chooses experts; None without.
    """

    matrix: BlockMatrix
    bias: torch.Tensor | None
    norm: Norm
    router: BlockMatrix | None = None


class Buffers:
    """Memory between operations, shared by all layers of a model."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def address(self, name: str, count: int) -> int:
        """Where `count` floats of this name lie, now and always."""
        key = (name, count)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(count, dtype=torch.float32, device="cpu")
        return self._buffers[key].data_ptr()


class BeforeGraph:
    """Computes `part` for `num_rows` tokens, one of each row. Not thread-safe.

    Args:
        cosines: width of a row of cosines, at least half a head's.
    """

    def __init__(self, runner: Runner, part: BeforeAttention, num_rows: int, cosines: int, buffers: Buffers) -> None:
        self._graph = graph = Graph(runner, 40)
        library, context = graph.library, graph.context
        width, half = sum(part.heads) * part.size, part.size // 2
        num_turned = part.heads[0] + part.heads[1]
        self._width, self._heads, self._size = width, part.heads, part.size
        # Their memory is the graph's.
        self._kept = (part, buffers)
        x = graph.tensor(F32, (part.norm.weight.shape[-1], num_rows))
        *_, normed = _norm(graph, x, part.norm, buffers.address("normed", x.contents.ne[0] * num_rows))
        # Tensor -> bytes after the address of its memory: of q, k and v, which are made in one; of what is turned.
        made: list[tuple[TensorRef, int]] = []
        turned: list[tuple[TensorRef, int]] = []
        steps, at = list[TensorRef](), 0
        for matrix in part.matrices:
            product = library.ggml_mul_mat(context, _matrix(graph, matrix), normed)
            _set_strides(product, width, width * num_rows)
            made.append((product, _FLOAT * at))
            steps.append(product)
            at += matrix.rows
        if part.bias is not None:
            whole = graph.tensor(F32, (width, num_rows))
            biased = library.ggml_add(context, whole, _constant(graph, part.bias))
            made += [(whole, 0), (biased, 0)]
            steps.append(biased)
        if part.head_norm is None:
            inputs, row = made, width
        else:
            heads = graph.tensor(F32, (part.size, num_turned, num_rows))
            _set_strides(heads, part.size, width)
            made.append((heads, 0))
            address, row = buffers.address("heads", part.size * num_turned * num_rows), part.size * num_turned
            steps.append(_norm(graph, heads, part.head_norm, address)[-1])
            inputs = None
        first, second = (graph.tensor(F32, (half, num_turned, num_rows)) for _ in range(2))
        for tensor, offset in ((first, 0), (second, _FLOAT * half)):
            _set_strides(tensor, part.size, row)
            if inputs is None:
                place(tensor, address + offset)
            else:
                inputs.append((tensor, offset))
        cosine, sine = (graph.tensor(F32, (half, 1, num_rows)) for _ in range(2))
        for tensor in (cosine, sine):
            _set_strides(tensor, cosines, cosines)
        count = half * num_turned * num_rows
        for combine, angles, offset in (
            (library.ggml_sub, (cosine, sine), 0), (library.ggml_add, (sine, cosine), _FLOAT * half)
        ):  # fmt: skip
            parts = [library.ggml_mul(context, one, angle) for one, angle in zip((first, second), angles, strict=True)]
            for name, one in zip(("first", "second"), parts, strict=True):
                place(one, buffers.address(name, count))
            result = combine(context, *parts)
            _set_strides(result, part.size, part.size * num_turned)
            turned.append((result, offset))
            steps.append(result)
        graph.finish(*steps)
        # The structs behind the pointers: looking them up at each run would cost as much as the call.
        self._x, self._cosine, self._sine = x.contents, cosine.contents, sine.contents
        self._made, self._turned = ([(one.contents, at) for one, at in group] for group in (made, turned))

    def run(
        self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute q, k and v [rows, heads, 1, size], of `x` [rows, ..., width], with angles [rows, cosines]."""
        num_rows, (queries, keys, _), size = len(x), self._heads, self._size
        made = torch.empty((num_rows, self._width), dtype=torch.float32, device="cpu")
        turned = torch.empty((num_rows, queries + keys, 1, size), dtype=torch.float32, device="cpu")
        self._x.data, self._cosine.data, self._sine.data = x.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        for group, memory in ((self._made, made), (self._turned, turned)):
            address = memory.data_ptr()
            for tensor, offset in group:
                tensor.data = address + offset
        self._graph.run()
        values = made[:, (queries + keys) * size :].view(num_rows, -1, 1, size)
        return turned[:, :queries], turned[:, queries:], values


class AfterGraph:
    """Computes `part` for `num_rows` tokens. Not thread-safe."""

    def __init__(self, runner: Runner, part: AfterAttention, num_rows: int) -> None:
        self._graph = graph = Graph(runner, 16)
        library, context, matrix = graph.library, graph.context, part.matrix
        self._shape, self._kept = (num_rows, 1, matrix.rows), part
        attended, residual = (graph.tensor(F32, (width, num_rows)) for width in (matrix.columns, matrix.rows))
        sums = [library.ggml_mul_mat(context, _matrix(graph, matrix), attended)]
        if part.bias is not None:
            sums.append(library.ggml_add(context, sums[-1], _constant(graph, part.bias)))
        sums.append(library.ggml_add(context, sums[-1], residual))
        norms = _norm(graph, sums[-1], part.norm)
        routed = []
        if part.router is not None:
            routed.append(library.ggml_mul_mat(context, _matrix(graph, part.router), norms[-1]))
        graph.finish(norms[-1], *routed)
        self._scores = (num_rows, 0 if part.router is None else part.router.rows)
        self._routed = [one.contents for one in routed]
        self._attended, self._residual = attended.contents, residual.contents
        self._sums, self._norms = [one.contents for one in sums], [one.contents for one in norms]

    def run(self, attended: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the residual stream, its norm, [rows, 1, width] each, and the router's product [rows, experts].

        Args:
            attended: f32 [rows, ..., size], a row's heads one after the other. residual: f32 [rows, ..., width].
        """
        stream, normed, scores = (
            torch.empty(shape, dtype=torch.float32, device="cpu") for shape in (self._shape, self._shape, self._scores)
        )
        self._attended.data, self._residual.data = attended.data_ptr(), residual.data_ptr()
        for tensors, memory in ((self._sums, stream), (self._norms, normed), (self._routed, scores)):
            address = memory.data_ptr()
            for tensor in tensors:
                tensor.data = address
        self._graph.run()
        return stream, normed, scores


class TokenAttention:
    """Attention of one token per row, over fewer tokens than `MOST_TOKENS`. Not thread-safe.

    A head is computed by one thread: from that many tokens on ggml adds parts of several threads, in an order that
    depends on their number. torch is quicker by then.
    """

    MOST_TOKENS = 512

    def __init__(self, runner: Runner) -> None:
        self._runner, self.num_threads = runner, runner.num_threads
        self._graphs: dict[_Form, _AttentionGraph] = {}
        # The step's masks, and what is added to each row's scores: layers are given one of two.
        self._seen: list[tuple[torch.Tensor, list[torch.Tensor | None] | None]] = []

    def begin_step(self) -> None:
        """Forget the masks of the step before: a caller may change one in place."""
        self._seen.clear()

    def takes(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> bool:
        """Whether these are f32, with few enough tokens and the numbers of a head one after the other; and the mask
        shows or hides tokens, at least one to each row, and weighs none."""
        return (
            query.dtype == keys.dtype == values.dtype == torch.float32
            and keys.shape[2] < self.MOST_TOKENS
            and keys.stride(-1) == values.stride(-1) == 1
            and (mask is None or self._masks(mask, len(query)) is not None)
        )

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute [rows, 1, heads, value size].

        Args:
            query: [rows, heads, 1, size]. keys, values: [rows, shared heads, tokens, size].
            mask: None, or [rows or 1, 1, 1, tokens]: added to scores, or True where a token is seen.
            sinks: f32 [heads], which take a share of each head's softmax; or None.
        """
        num_rows, heads, _, size = query.shape
        query = query.contiguous()
        out = torch.empty((num_rows, 1, heads, values.shape[-1]), dtype=torch.float32, device="cpu")
        masks = None if mask is None else self._masks(mask, num_rows)
        for row, added in enumerate(masks or [None] * num_rows):
            form = (heads, keys.shape[1], size, values.shape[-1], scaling, sinks is not None, added is not None)
            graph = self._graphs.get(form)
            if graph is None:
                graph = self._graphs[form] = _AttentionGraph(self._runner, form)
            graph.run(row, query, keys, values, out, added, sinks)
        return out

    def _masks(self, mask: torch.Tensor, num_rows: int) -> list[torch.Tensor | None] | None:
        """What is added to each row's scores, f16 [tokens]; None where that is nothing. None for a mask that f16 cannot
        say, or that hides all of a row."""
        for given, rows in self._seen:
            if given is mask and (rows is None or len(rows) == num_rows):
                return rows
        added = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        narrow = added.expand(num_rows, -1, -1, -1)[:, 0, 0].to(torch.float16).contiguous()
        is_seen = narrow == 0
        found: list[torch.Tensor | None] | None = None
        if bool((is_seen | narrow.isneginf()).all() and is_seen.any(1).all()):
            found = [None if row_seen.all() else row for row, row_seen in zip(narrow, is_seen, strict=True)]
        self._seen = [(mask, found), *self._seen[:1]]
        return found


class _AttentionGraph:
    """One row's attention."""

    def __init__(self, runner: Runner, form: _Form) -> None:
        heads, shared, size, value_size, scale, has_sinks, is_masked = form
        graph = self._graph = Graph(runner, 8)
        library, context = graph.library, graph.context
        query = graph.tensor(F32, (size, 1, heads))
        keys, values = graph.tensor(F32, (size, 1, shared)), graph.tensor(F32, (value_size, 1, shared))
        mask = graph.tensor(_F16, (1, 1)) if is_masked else None
        out = library.ggml_flash_attn_ext(context, query, keys, values, mask, scale, 0.0, 0.0)
        sinks = graph.tensor(F32, (heads, 1)) if has_sinks else None
        if sinks is not None:
            library.ggml_flash_attn_ext_add_sinks(out, sinks)
        graph.finish(out)
        self._query, self._keys, self._values, self._out = (one.contents for one in (query, keys, values, out))
        self._mask, self._sinks = (None if one is None else one.contents for one in (mask, sinks))

    def run(
        self,
        row: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Compute the row of this number: tensors as in `TokenAttention`, mask f16 [tokens]."""
        tokens = keys.shape[2]
        self._query.data, self._out.data = (one.data_ptr() + 4 * row * one.stride(0) for one in (query, out))
        for tensor, states in ((self._keys, keys), (self._values, values)):
            per_row, per_head, per_token, _ = states.stride()
            strides, extents = tensor.nb, tensor.ne
            tensor.data, extents[1] = states.data_ptr() + 4 * row * per_row, tokens
            strides[1], strides[2] = 4 * per_token, 4 * per_head
            strides[3] = 4 * per_head * extents[2]
        if self._mask is not None and mask is not None:
            self._mask.data, self._mask.ne[0] = mask.data_ptr(), tokens
            self._mask.nb[1] = self._mask.nb[2] = self._mask.nb[3] = 2 * tokens
        if self._sinks is not None and sinks is not None:
            self._sinks.data = sinks.data_ptr()
        self._graph.run()


def _norm(graph: Graph, x: TensorRef, norm: Norm, address: int = 0) -> list[TensorRef]:
    """The steps that norm `x`, the last of which is the result, all in memory at `address`."""
    scaled = graph.library.ggml_rms_norm(graph.context, x, norm.epsilon)
    steps = [scaled, graph.library.ggml_mul(graph.context, scaled, _constant(graph, norm.weight))]
    for one in steps:
        place(one, address)
    return steps


def _matrix(graph: Graph, matrix: BlockMatrix) -> TensorRef:
    """A tensor over a matrix, which must be kept."""
    tensor = graph.tensor(matrix.kind.number, (matrix.columns, matrix.rows))
    place(tensor, matrix.address)
    return tensor


def _constant(graph: Graph, values: torch.Tensor) -> TensorRef:
    """A tensor over contiguous f32 `values` [width] or [rows, width], which must be kept."""
    tensor = graph.tensor(F32, (values.shape[-1], values.shape[0] if values.ndim > 1 else 1))
    place(tensor, values.data_ptr())
    return tensor


def _set_strides(tensor: Any, row: int, matrix: int) -> None:
    """Set the strides of a tensor's rows and matrices, in floats."""
    strides: Sequence[int] = (row, matrix, matrix * tensor.contents.ne[2])
    for at, stride in enumerate(strides, 1):
        tensor.contents.nb[at] = _FLOAT * stride
