"""Attention of one new token, as one operation of ggml's."""

import torch

from foreroute.kernels.ggml.graph import Graph, Runner
from foreroute.kernels.ggml.types import F32, TYPE_NUMBERS

_F16 = TYPE_NUMBERS["F16"]
# (heads of queries, of keys and values, size of a key, of a value, scale, whether there are sinks, and a mask)
_Form = tuple[int, int, int, int, float, bool, bool]


class TokenAttention:
    """Attention of one token per row. Not thread-safe."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._graphs: dict[_Form, _AttentionGraph] = {}
        # The step's masks, and what is added to each row's scores: layers are given one of two.
        self._seen: list[tuple[torch.Tensor, list[torch.Tensor | None] | None]] = []

    def begin_step(self) -> None:
        """Forget the masks of the step before: a caller may change one in place."""
        self._seen.clear()

    def takes(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> bool:
        """Whether these are f32, with the numbers of a head one after the other; and the mask shows or hides tokens, at
        least one to each row, and weighs none."""
        return (
            query.dtype == keys.dtype == values.dtype == torch.float32
            and keys.stride(-1) == values.stride(-1) == 1
            and (mask is None or self._masks(mask, len(query)) is not None)
        )

    def hides_nothing(self, mask: torch.Tensor) -> bool:
        """Whether one row's mask shows every token and weighs none."""
        return self._masks(mask, 1) == [None]

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


def compute_heads_whole(graph: Graph) -> None:
    """Let one thread compute each head in the attention of `graph`, which is finished.

    Otherwise, from 512 tokens on, ggml adds parts of several threads, in an order that depends on their number.
    """
    graph.plan.use_ref = True


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
        compute_heads_whole(graph)
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
