"""A decoder layer beside its experts in one graph or in two: before attention, and after it.

A call of torch costs little by itself, but after each product its code, and Python's, have left the processor's caches:
the thirty calls that these graphs replace took 0.4 ms a layer of gpt-oss-20b, whose products take 3.4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from foreroute.kernels.ggml.decoder.attention import compute_heads_whole
from foreroute.kernels.ggml.decoder.parts import (
    FLOAT,
    AfterAttention,
    Attention,
    BeforeAttention,
    Buffers,
    Route,
    constant,
    norm_steps,
    placed,
    set_strides,
    weights_of,
)
from foreroute.kernels.ggml.graph import Graph, Runner, TensorRef, place
from foreroute.kernels.ggml.types import F32, I32

_DESCENDING = 1


class Chosen(NamedTuple):
    """What a layer's experts are given.

    Attributes:
        stream: the residual stream after attention, f32 [rows, 1, width]. normed: its norm.
        scores: the router's product [rows, experts], empty where the graph has none or chooses itself.
        ids, weights: int64 and f32 [rows, k], the choice; empty where the graph has no route.
    """

    stream: torch.Tensor
    normed: torch.Tensor
    scores: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def of_positions(self) -> "Chosen":
        """The same with rows as the positions of one row: stream and normed [1, rows, width]."""
        return self._replace(stream=self.stream.transpose(0, 1), normed=self.normed.transpose(0, 1))


@dataclass(slots=True)
class KeptTokens:
    """One row's keys and values of the tokens before, f32 [heads, tokens, size] each, with room for one more.

    Attributes:
        keys, values: address of the first token's. head_bytes: from one head to the next. count: tokens.
    """

    keys: int
    values: int
    head_bytes: int
    count: int


class _Before:
    """Operations that make q, k and v: all heads in one memory `made`, q and k turned in another, `turned`."""

    def __init__(self, graph: Graph, part: BeforeAttention, num_rows: int, cosines: int, buffers: Buffers) -> None:
        library, context = graph.library, graph.context
        width, half = sum(part.heads) * part.size, part.size // 2
        num_turned = part.heads[0] + part.heads[1]
        x = graph.tensor(F32, (part.norm.weight.shape[-1], num_rows))
        *_, normed = norm_steps(graph, x, part.norm, buffers.address("normed", x.contents.ne[0] * num_rows))
        # Tensor -> bytes after the address of its memory: of q, k and v, which are made in one; of what is turned.
        made: list[tuple[TensorRef, int]] = []
        turned: list[tuple[TensorRef, int]] = []
        self.steps, at = list[TensorRef](), 0
        for matrix in part.matrices:
            product = library.ggml_mul_mat(context, weights_of(graph, matrix), normed)
            set_strides(product, width, width * num_rows)
            made.append((product, FLOAT * at))
            self.steps.append(product)
            at += matrix.rows
        if part.bias is not None:
            whole = graph.tensor(F32, (width, num_rows))
            biased = library.ggml_add(context, whole, constant(graph, part.bias))
            made += [(whole, 0), (biased, 0)]
            self.steps.append(biased)
        if part.head_norm is None:
            inputs, row = made, width
        else:
            heads = graph.tensor(F32, (part.size, num_turned, num_rows))
            set_strides(heads, part.size, width)
            made.append((heads, 0))
            address, row = buffers.address("heads", part.size * num_turned * num_rows), part.size * num_turned
            self.steps.append(norm_steps(graph, heads, part.head_norm, address)[-1])
            inputs = None
        first, second = (graph.tensor(F32, (half, num_turned, num_rows)) for _ in range(2))
        for tensor, offset in ((first, 0), (second, FLOAT * half)):
            set_strides(tensor, part.size, row)
            if inputs is None:
                place(tensor, address + offset)
            else:
                inputs.append((tensor, offset))
        cosine, sine = (graph.tensor(F32, (half, 1, num_rows)) for _ in range(2))
        for tensor in (cosine, sine):
            set_strides(tensor, cosines, cosines)
        count = half * num_turned * num_rows
        for combine, angles, offset in (
            (library.ggml_sub, (cosine, sine), 0), (library.ggml_add, (sine, cosine), FLOAT * half)
        ):  # fmt: skip
            parts = [library.ggml_mul(context, one, angle) for one, angle in zip((first, second), angles, strict=True)]
            for name, one in zip(("first", "second"), parts, strict=True):
                place(one, buffers.address(name, count))
            result = combine(context, *parts)
            set_strides(result, part.size, part.size * num_turned)
            turned.append((result, offset))
            self.steps.append(result)
        # The structs behind the pointers: looking them up at each run would cost as much as the call.
        self._x, self._cosine, self._sine = x.contents, cosine.contents, sine.contents
        self._made, self._turned = ([(one.contents, at) for one, at in group] for group in (made, turned))

    def read(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Take inputs and angles from these in the next run."""
        self._x.data, self._cosine.data, self._sine.data = x.data_ptr(), cosine.data_ptr(), sine.data_ptr()

    def write(self, made: int, turned: int) -> None:
        """Write to these addresses from the next run on."""
        for group, address in ((self._made, made), (self._turned, turned)):
            for tensor, offset in group:
                tensor.data = address + offset


class _After:
    """Operations that make the residual stream of attention's outputs, and what experts are given."""

    def __init__(self, graph: Graph, part: AfterAttention, num_rows: int, buffers: Buffers) -> None:
        library, context, matrix = graph.library, graph.context, part.matrix
        attended, residual = (graph.tensor(F32, (width, num_rows)) for width in (matrix.columns, matrix.rows))
        sums = [library.ggml_mul_mat(context, weights_of(graph, matrix), attended)]
        if part.bias is not None:
            sums.append(library.ggml_add(context, sums[-1], constant(graph, part.bias)))
        sums.append(library.ggml_add(context, sums[-1], residual))
        norms = norm_steps(graph, sums[-1], part.norm)
        self.steps = [norms[-1]]
        self._shape, self._route = (num_rows, 1, matrix.rows), part.route
        self._scores = (num_rows, 0 if part.router is None or part.route is not None else part.router.rows)
        scores, self._weights = list[TensorRef](), list[TensorRef]()
        self._chosen = (num_rows, 0 if part.route is None else part.route.top_k)
        self._order = np.empty((num_rows, 0), dtype=np.int32)
        self._nothing = torch.empty((num_rows, 0), dtype=torch.float32, device="cpu")
        if part.router is not None:
            scores.append(library.ggml_mul_mat(context, weights_of(graph, part.router), norms[-1]))
            self.steps += scores
        if part.route is not None:
            place(scores.pop(), buffers.address("scores", num_rows * part.router.rows if part.router else 0))
            self._choose(graph, self.steps[-1], part.route, buffers)
        self._attended, self._residual = attended.contents, residual.contents
        self._out = [[one.contents for one in group] for group in (sums, norms, scores, self._weights)]

    def _choose(self, graph: Graph, scores: TensorRef, route: Route, buffers: Buffers) -> None:
        """The operations that choose by `scores` [experts, rows]."""
        library, context = graph.library, graph.context
        experts, rows = scores.contents.ne[:2]
        address = scores.contents.data
        if route.bias is not None:
            scores = library.ggml_add(context, scores, constant(graph, route.bias))
            place(scores, address)
        if route.is_share_of_all:
            scores = library.ggml_soft_max(context, scores)
            place(scores, address)
        order = library.ggml_argsort(context, scores, _DESCENDING)
        memory = buffers.tensor("order", rows * experts)
        place(order, memory.data_ptr())
        best = placed(graph, (route.top_k, rows), memory.data_ptr(), I32)
        set_strides(best, experts, experts * rows)
        weights = library.ggml_get_rows(context, placed(graph, (1, experts, rows), address), best)
        self.steps += [order, weights]
        self._weights.append(weights)
        if not route.is_share_of_all:
            chosen = graph.tensor(F32, (route.top_k, rows))
            self._weights += [chosen, library.ggml_soft_max(context, chosen)]
            self.steps.append(self._weights[-1])
        self._order = memory.numpy().view(np.int32).reshape(rows, experts)[:, : route.top_k]

    def read(self, attended: int, residual: int) -> None:
        """Take inputs from these addresses from the next run on."""
        self._attended.data, self._residual.data = attended, residual

    def write(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Memory for what the next run computes: stream, norm, scores, weights; see `Chosen`."""
        made = stream, normed, scores, weights = (
            torch.empty(self._shape, dtype=torch.float32, device="cpu"),
            torch.empty(self._shape, dtype=torch.float32, device="cpu"),
            torch.empty(self._scores, dtype=torch.float32, device="cpu") if self._scores[1] else self._nothing,
            torch.empty(self._chosen, dtype=torch.float32, device="cpu") if self._chosen[1] else self._nothing,
        )
        for tensors, memory in zip(self._out, made, strict=True):
            if tensors:
                address = memory.data_ptr()
                for tensor in tensors:
                    tensor.data = address
        return stream, normed, scores, weights

    def chosen(self) -> torch.Tensor:
        """The ids [rows, k] that the last run chose."""
        return torch.from_numpy(self._order.astype(np.int64))


class BeforeGraph:
    """Computes `part` for `num_rows` tokens, one of each row. Not thread-safe.

    Args:
        cosines: width of a row of cosines, at least half a head's.
    """

    def __init__(self, runner: Runner, part: BeforeAttention, num_rows: int, cosines: int, buffers: Buffers) -> None:
        self._graph = Graph(runner, 40)
        self._before = _Before(self._graph, part, num_rows, cosines, buffers)
        self._graph.finish(*self._before.steps)
        self._width, self._heads, self._size = sum(part.heads) * part.size, part.heads, part.size
        # Their memory is the graph's.
        self._kept = (part, buffers)

    def run(
        self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute q, k and v [rows, heads, 1, size], of `x` [rows, ..., width], with angles [rows, cosines]."""
        num_rows, (queries, keys, _), size = len(x), self._heads, self._size
        made = torch.empty((num_rows, self._width), dtype=torch.float32, device="cpu")
        turned = torch.empty((num_rows, queries + keys, 1, size), dtype=torch.float32, device="cpu")
        self._before.read(x, cosine, sine)
        self._before.write(made.data_ptr(), turned.data_ptr())
        self._graph.run()
        values = made[:, (queries + keys) * size :].view(num_rows, -1, 1, size)
        return turned[:, :queries], turned[:, queries:], values


class AfterGraph:
    """Computes `part` for `num_rows` tokens. Not thread-safe."""

    def __init__(self, runner: Runner, part: AfterAttention, num_rows: int, buffers: Buffers) -> None:
        self._graph = Graph(runner, 32)
        self._after = _After(self._graph, part, num_rows, buffers)
        self._graph.finish(*self._after.steps)
        self._kept = (part, buffers)

    def run(self, attended: torch.Tensor, residual: torch.Tensor) -> Chosen:
        """Compute what the experts are given.

        Args:
            attended: f32 [rows, ..., size], a row's heads one after the other. residual: f32 [rows, ..., width].
        """
        self._after.read(attended.data_ptr(), residual.data_ptr())
        stream, normed, scores, weights = self._after.write()
        self._graph.run()
        return Chosen(stream, normed, scores, self._after.chosen(), weights)


class LayerGraph:
    """Computes both parts of one row, and attention of its token over those before it in between. Not thread-safe.

    Args:
        cosines: as of `BeforeGraph`.
    """

    def __init__(
        self,
        runner: Runner,
        before: BeforeAttention,
        attention: Attention,
        after: AfterAttention,
        cosines: int,
        buffers: Buffers,
    ) -> None:
        graph = self._graph = Graph(runner, 80)
        library, context = graph.library, graph.context
        (queries, shared, _), size = before.heads, before.size
        made = buffers.address("made", sum(before.heads) * size)
        turned = buffers.address("turned", (queries + shared) * size)
        self._before, self._after = _Before(graph, before, 1, cosines, buffers), _After(graph, after, 1, buffers)
        self._before.write(made, turned)
        # The new token's keys and values are copied behind those of the tokens before.
        copies = [
            library.ggml_cpy(context, placed(graph, (size, shared), address), graph.tensor(F32, (size, shared)))
            for address in (turned + FLOAT * queries * size, made + FLOAT * (queries + shared) * size)
        ]
        query = placed(graph, (size, 1, queries), turned)
        keys, values = (graph.tensor(F32, (size, 1, shared)) for _ in range(2))
        attended = library.ggml_flash_attn_ext(context, query, keys, values, None, attention.scale, 0.0, 0.0)
        if attention.sinks is not None:
            library.ggml_flash_attn_ext_add_sinks(attended, constant(graph, attention.sinks))
        self._attended = buffers.address("attended", queries * size)
        place(attended, self._attended)
        graph.finish(*self._before.steps, *copies, attended, *self._after.steps)
        compute_heads_whole(graph)
        self._copies, self._states = ([one.contents for one in group] for group in (copies, (keys, values)))
        self._token_bytes = FLOAT * size
        self._kept = (before, attention, after, buffers)

    def run(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, kept: KeptTokens) -> Chosen:
        """Compute what the experts are given of `x` [1, ..., width], and write its key and value behind the kept.

        Args:
            cosine, sine: [1, cosines].
        """
        count, head_bytes = kept.count, kept.head_bytes
        behind, addresses = self._token_bytes * count, (kept.keys, kept.values)
        for copy, states, address in zip(self._copies, self._states, addresses, strict=True):
            copy.data, states.data = address + behind, address
            copy.nb[1:4] = (head_bytes,) * 3
            states.ne[1] = count + 1
            states.nb[1:4] = (self._token_bytes, head_bytes, head_bytes * states.ne[2])
        self._before.read(x, cosine, sine)
        self._after.read(self._attended, x.data_ptr())
        stream, normed, scores, weights = self._after.write()
        self._graph.run()
        return Chosen(stream, normed, scores, self._after.chosen(), weights)
