"""Graphs that run rows through experts in slots: built once per form and number of rows, for all layers alike.

A slot's number is the id of an expert in ggml's products: slots lie one after the other in the pool, so that experts
are multiplied where they were read to. The memory between the products is shared by all graphs.
"""

import ctypes
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from math import inf

import numpy as np
import torch

from foreroute.kernels.ggml.bf16 import INTERLEAVED_IN_BF16, Bf16Products, rows_in_bf16, shared_products
from foreroute.kernels.ggml.form import OAI_ALPHA, OAI_LIMIT, BlockForm, SlotMatrix, in_order, join
from foreroute.kernels.ggml.graph import Graph, Runner, TensorRef, place
from foreroute.kernels.ggml.interleaved import interleaver, plain_rows
from foreroute.kernels.ggml.slots import FLOATS, HostSlots, Scratch
from foreroute.kernels.ggml.types import F32, I32

# Graphs kept of a form: one for each shape of a step. Some 10 KB each.
_MOST_GRAPHS = 256
_FIRST = ("gate", "up")


class ExpertGraph:
    """Computes `rows` rows, each through `per_row` experts: out [rows, per_row, hidden], before gate weights.

    Where ggml lacks the family's gating, there are two graphs with the family's own in between. Not thread-safe.

    Args:
        is_sum: for one row: the outputs are weighted by `set_gates` and added in the order of the ids: out [hidden].
    Attributes:
        ids: int32 [rows, per_row], the slots of each row's experts, to be written before `run`.
        is_finite: of a sum, whether it is of numbers, after `run`.
    """

    def __init__(
        self,
        runner: Runner,
        form: BlockForm,
        slots: HostSlots,
        rows: int,
        per_row: int,
        scratch: Scratch,
        *,
        is_sum: bool = False,
    ) -> None:
        self.ids = np.zeros((rows, per_row), dtype=np.int32)
        self._form, self._slots, self._scratch = form, slots, scratch
        self._count = rows * per_row
        self._generation = -1
        # Tensors that lie in one memory: a product, and the sum of it and a bias.
        self._placed: dict[str, list[TensorRef]] = {}
        # Rows of "summands", with the number of floats before each.
        self._apart = list[tuple[TensorRef, int]]()
        num_tensors = 48 + 4 * per_row if is_sum else 48
        graph = self._first = Graph(runner, num_tensors)
        x = graph.tensor(F32, (form.first[0].columns, 1, rows))
        self._placed["x"] = [x]
        x = self._in_order(graph, x, "x")
        ids = self._id_tensor(graph)
        biases = form.first_biases or (-1,) * len(form.first)
        inner = [
            self._product(graph, matrix, x, ids, bias, name)
            for name, matrix, bias in zip(_FIRST, form.first, biases, strict=False)
        ]
        if form.gating.kind == "torch":
            graph.finish(*inner)
            graph = Graph(runner, num_tensors)
            ids = self._id_tensor(graph)
            gated = graph.tensor(F32, (form.intermediate, per_row, rows))
        else:
            gated = _gate(graph, form.gating.kind, *inner)
        self._second = graph
        self._placed["gated"] = [gated]
        scratch.reserve("gated", self._count * form.intermediate)
        gated = self._in_order(graph, gated, "gated")
        outputs = self._product(graph, form.down, gated, ids, form.down_bias, "out")
        self._gates, self.is_finite = list[ctypes.c_float](), True
        steps = self._weighted_sum(graph, per_row) if is_sum else []
        # NaN and infinities last through sums: of what is between the products, per row, and of the sum.
        self._sums = np.zeros(self._count + 1, dtype=np.float32)
        self._read_sums = self._sums.data
        checked = [(gated, 0), *([(steps[-1], self._count)] if is_sum else [])]
        graph.finish(outputs, *steps, *(self._sum_of(graph, *one) for one in checked))
        # The structs behind the pointers, which each run changes.
        self._x, self._out = ([tensor.contents for tensor in self._placed.pop(name)] for name in ("x", "out"))
        self._gated = np.empty((0, 0), dtype=np.float32)

    def run(self, x: int, out: int) -> None:
        """Compute the rows at address `x` (f32 [rows, hidden]) through the experts in `ids`, into address `out`.

        What is no number between the products gives an output that is none: the second product would round it to one.
        """
        if self._generation != self._scratch.generation:
            self._place_scratch()
        for tensor in self._x:
            tensor.data = x
        for tensor in self._out:
            tensor.data = out
        self._first.run()
        if self._second is not self._first:
            self._gate_by_family()
            self._second.run()
        self.is_finite = math.isfinite(sum(self._read_sums))
        if not self.is_finite and not np.isfinite(self._gated).all():
            count = 1 if self._gates else self._count
            outputs = np.ctypeslib.as_array((ctypes.c_float * (count * self._form.hidden)).from_address(out))
            is_bad = ~np.isfinite(self._gated).all(1)
            outputs.reshape(count, -1)[is_bad.any(keepdims=True) if self._gates else is_bad] = np.nan

    def _sum_of(self, graph: Graph, rows: TensorRef, at: int) -> TensorRef:
        """The sum of each of `rows`, to `at` among the sums."""
        width = rows.contents.ne[0]
        ones = graph.tensor(F32, (width, 1))
        self._placed.setdefault("ones", []).append(ones)
        if self._scratch.reserve("ones", width):
            self._scratch.array("ones", 1, width).fill(1.0)
        sums = graph.library.ggml_mul_mat(graph.context, ones, rows)
        place(sums, self._sums.ctypes.data + 4 * at)
        return sums

    def set_gates(self, gates: Sequence[float]) -> None:
        """The weights of a sum's outputs, in the order of the ids."""
        for place_of, gate in zip(self._gates, gates, strict=True):
            place_of.value = gate

    def _weighted_sum(self, graph: Graph, count: int) -> list[TensorRef]:
        """The steps that weight each output and add it to those before, into the memory of "out"."""
        library, hidden, steps = graph.library, self._form.hidden, list[TensorRef]()
        products = self._placed["out"]
        self._placed["summands"], self._placed["out"] = products, []
        self._scratch.reserve("summands", count * hidden)
        for at in range(count):
            output = graph.tensor(F32, (hidden, 1))
            weighted = library.ggml_scale(graph.context, output, 1.0)
            self._gates.append(ctypes.c_float.from_buffer(weighted.contents.op_params))
            self._apart += [(one, at * hidden) for one in ([output, weighted] if at else [output])]
            total = library.ggml_add(graph.context, steps[-1], weighted) if at else weighted
            self._placed["out"].append(total)
            steps += [weighted, total] if at else [total]
        return steps

    def _in_order(self, graph: Graph, rows: TensorRef, name: str) -> TensorRef:
        """`rows` with the numbers of every 32 in the order of the matrices' blocks.

        A block whose bytes hold neighbours is ggml's block of the same weights in another order: the even ones, then
        the odd ones.
        """
        if not self._form.is_paired:
            return rows
        library, context = graph.library, graph.context
        width, *others = rows.contents.ne[:3]
        count = width * others[0] * others[1]
        pairs = library.ggml_reshape_3d(context, rows, 2, 16, count // 32)
        halves = library.ggml_permute(context, pairs, 1, 0, 2, 3)
        self._placed[name] += [pairs, halves]
        ordered = library.ggml_cont(context, halves)
        again = library.ggml_reshape_3d(context, ordered, width, *others)
        self._placed[f"{name} in order"] = [ordered, again]
        self._scratch.reserve(f"{name} in order", count)
        return again

    def _id_tensor(self, graph: Graph) -> TensorRef:
        ids = graph.tensor(I32, (self.ids.shape[1], self.ids.shape[0]))
        place(ids, self.ids.ctypes.data)
        return ids

    def _product(
        self, graph: Graph, matrix: SlotMatrix, x: TensorRef, ids: TensorRef, bias: int, name: str
    ) -> TensorRef:
        """The product, with the bias at offset `bias` of a slot added where there is one."""
        slots, library = self._slots, graph.library
        weights = graph.matrices(
            matrix.kind,
            (matrix.rows, matrix.columns),
            slots.num_slots,
            (matrix.row_stride, slots.slot_bytes),
            slots.address + matrix.offset,
        )
        if matrix.is_interleaved:
            interleaver(matrix.kind.name, matrix.columns).mark(weights)
        product = library.ggml_mul_mat_id(graph.context, weights, x, ids)
        tensors = self._placed[name] = [product]
        if bias >= 0:
            values = graph.tensor(self._form.bias_type, (matrix.rows, slots.num_slots))
            values.contents.nb[1] = slots.slot_bytes
            place(values, slots.address + bias)
            if self._form.bias_type == F32:
                tensors.append(library.ggml_add_id(graph.context, product, values, ids))
            else:
                tensors.append(library.ggml_add(graph.context, product, self._floats(graph, values, name)))
        if name != "out":
            self._scratch.reserve(name, self._count * matrix.rows)
        return tensors[-1]

    def _floats(self, graph: Graph, values: TensorRef, name: str) -> TensorRef:
        """The rows of 16-bit `values` that the ids name, as floats, for each row and expert."""
        library = graph.library
        ids = graph.tensor(I32, (self._count, 1))
        place(ids, self.ids.ctypes.data)
        picked = library.ggml_get_rows(graph.context, values, ids)
        width, (num_rows, per_row) = values.contents.ne[0], self.ids.shape
        shaped = library.ggml_reshape_3d(graph.context, picked, width, per_row, num_rows)
        self._placed[f"{name} bias"] = [picked, shaped]
        self._scratch.reserve(f"{name} bias", self._count * width)
        return shaped

    def _place_scratch(self) -> None:
        for name, tensors in self._placed.items():
            for tensor in tensors:
                place(tensor, self._scratch.address(name))
        for tensor, before in self._apart:
            place(tensor, self._scratch.address("summands") + 4 * before)
        self._gated = self._scratch.array("gated", self._count, self._form.intermediate)
        self._generation = self._scratch.generation

    def _gate_by_family(self) -> None:
        form, scratch = self._form, self._scratch
        inner = [
            scratch.tensor(name, self._count, matrix.rows)
            for name, matrix in zip(_FIRST, form.first, strict=False)
        ]  # fmt: skip
        given = inner[0] if len(inner) == 1 else join(inner[0], inner[1], form.gating.is_interleaved)
        scratch.tensor("gated", self._count, form.intermediate).copy_(form.gating.family(given))


def _gate(graph: Graph, kind: str, gate: TensorRef, up: TensorRef) -> TensorRef:
    library = graph.library
    if kind == "swiglu_oai":
        return library.ggml_swiglu_oai(graph.context, gate, up, OAI_ALPHA, OAI_LIMIT)
    join_of = library.ggml_swiglu_split if kind == "swiglu" else library.ggml_geglu_split
    return join_of(graph.context, gate, up)


class FormGraphs:
    """The graphs of one form of experts, made as they are needed; the oldest is dropped first.

    Attributes:
        form: of the experts. outputs: f32 [most experts of a token, hidden], for the one token of a step; `address`
            is where it lies.
    """

    def __init__(self, runner: Runner, form: BlockForm, slots: HostSlots, scratch: Scratch, bf16: Bf16Products) -> None:
        self.form = form
        self._runner, self._slots, self._scratch, self._bf16 = runner, slots, scratch, bf16
        self.lanes = bf16.lanes
        # Of each lane: graphs of its own.
        self._own = threading.local()
        matrices = (*form.first, form.down)
        # As `in_bf16` reads them.
        read = (*(form.first if form.in_turns is None else (form.in_turns,)), form.down)
        may_convert = all(
            (INTERLEAVED_IN_BF16 or not matrix.is_interleaved)
            and matrix.row_stride == matrix.kind.row_bytes(matrix.columns)
            for matrix in read
        )
        weights = [(matrix.kind, matrix.rows * matrix.columns) for matrix in matrices]
        self._bf16_from = rows_in_bf16(weights, runner.library) if may_convert else inf
        self._graphs: OrderedDict[tuple[int, int, bool], ExpertGraph] = OrderedDict()
        self.outputs = np.empty((1, form.hidden), dtype=np.float32)
        self.address = int(self.outputs.ctypes.data)

    def count_waits_anew(self) -> None:
        """After lanes had the cores: what this thread waited for one beside them is none of its own graphs' waits."""
        self._runner.count_waits_anew()

    def reserve(self, top_k: int) -> None:
        """Have room for the outputs of a token's experts."""
        if len(self.outputs) < top_k:
            self.outputs = np.empty((top_k, self.form.hidden), dtype=np.float32)
            self.address = int(self.outputs.ctypes.data)

    def stored(self, slot: int) -> list[torch.Tensor]:
        """The bytes that are read of the expert in `slot`: matrices [rows, bytes of a row], then biases [bytes].

        Rows one after the other, as copies where they do not lie so.
        """
        form, biases = self.form, self.form.biases
        itemsize = FLOATS[form.bias_type].itemsize
        matrices = [self._rows(slot, matrix) for matrix in (*form.first, form.down)]
        return [*matrices, *(self._slots.stored(slot, offset, count * itemsize) for offset, count in biases)]

    def _rows(self, slot: int, matrix: SlotMatrix) -> torch.Tensor:
        row_bytes = matrix.kind.row_bytes(matrix.columns)
        nbytes = (matrix.rows - 1) * matrix.row_stride + row_bytes
        stored = self._slots.stored(slot, matrix.offset, nbytes)
        rows = stored.as_strided((matrix.rows, row_bytes), (matrix.row_stride, 1)).contiguous()
        return plain_rows(matrix.kind.name, rows) if matrix.is_interleaved else rows

    def of(self, rows: int, per_row: int, *, is_sum: bool = False) -> ExpertGraph:
        """The graph of `rows` rows with `per_row` experts each; see `ExpertGraph`."""
        key = (rows, per_row, is_sum)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = ExpertGraph(
                self._runner, self.form, self._slots, rows, per_row, self._scratch, is_sum=is_sum
            )  # fmt: skip
        return graph

    def on_lane(self, rows: torch.Tensor, slot: int, *, may_convert: bool) -> torch.Tensor:
        """Compute the expert in `slot` for f32 `rows` [rows, hidden], called by a lane: [rows, hidden].

        Args:
            may_convert: in bf16 where that is quicker.
        """
        if self.converts(len(rows), may_convert=may_convert):
            return self.in_bf16(rows, slot)
        if not hasattr(self._own, "graphs"):
            self._own.graphs = FormGraphs(self.lanes.runner, self.form, self._slots, Scratch(), self._bf16)
        graphs: FormGraphs = self._own.graphs
        return graphs.in_blocks(rows, slot)

    def scratch_bytes(self, num_rows: int) -> int:
        """Bytes of intermediate activations, inputs and outputs of `num_rows` rows, each routed to one expert."""
        form = self.form
        return 4 * num_rows * (sum(matrix.rows for matrix in form.first) + form.intermediate + 3 * form.hidden)

    def converts(self, num_rows: int, *, may_convert: bool) -> bool:
        """Whether `on_lane` multiplies an expert's `num_rows` rows in bf16."""
        return may_convert and num_rows >= self._bf16_from

    def in_blocks(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        """Compute the expert in `slot` for f32 `rows` [rows, hidden] as its weights lie: [rows, hidden]."""
        outputs = torch.empty_like(rows)
        graph = self.of(len(rows), 1)
        graph.ids.fill(slot)
        graph.run(rows.data_ptr(), outputs.data_ptr())
        return outputs

    def in_bf16(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        """The same by weights in bf16, on the calling thread."""
        form, start = self.form, self._slots.address + slot * self._slots.slot_bytes

        def product(x: torch.Tensor, matrix: SlotMatrix) -> torch.Tensor:
            x = in_order(x) if form.is_paired else x
            shape, is_interleaved = (matrix.rows, matrix.columns), matrix.is_interleaved
            return self._bf16.alone(x.to(torch.bfloat16), matrix.kind, start + matrix.offset, shape, is_interleaved)

        def biased(out: torch.Tensor, bias: int) -> torch.Tensor:
            return out if bias < 0 else out.add_(self._slots.floats(slot, bias, out.shape[1], form.bias_type))

        biases = form.first_biases or (-1,) * len(form.first)
        if form.in_turns is not None:
            both = product(rows, form.in_turns)
            for which, bias in enumerate(biases):
                biased(both[:, which::2], bias)
            return biased(product(form.gating.family(both), form.down), form.down_bias)
        inner = [biased(product(rows, matrix), bias) for matrix, bias in zip(form.first, biases, strict=True)]
        given = inner[0] if len(inner) == 1 else join(inner[0], inner[1], form.gating.is_interleaved)
        return biased(product(form.gating.family(given), form.down), form.down_bias)


class ExpertGraphs:
    """The graphs of one pool, by form: layers of one form share them, and all share the memory between products."""

    def __init__(self, runner: Runner, slots: HostSlots) -> None:
        self._runner, self._slots = runner, slots
        self._scratch, self._bf16 = Scratch(), shared_products(runner.num_threads)
        self._by_form: dict[BlockForm, FormGraphs] = {}

    def of(self, form: BlockForm) -> FormGraphs:
        """The graphs of a form."""
        if form not in self._by_form:
            self._by_form[form] = FormGraphs(self._runner, form, self._slots, self._scratch, self._bf16)
        return self._by_form[form]
