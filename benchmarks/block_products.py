"""What ggml's products cost at the shapes of published models: experts of one token, and of a prompt's rows.

    python -m benchmarks.block_products            # one token: blocks as GGUF has them, and eight rows side by side
    python -m benchmarks.block_products --rows     # a prompt: from how many rows on bf16 is quicker, on one core
    python -m benchmarks.block_products --costs    # of each type, on one core: the constants of kernels/ggml/bf16.py

Experts are taken from more memory than the caches hold. Forms take turns; medians.
"""

import argparse
import mmap
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

import foreroute  # noqa: F401  before torch spins
from benchmarks._harness import record, rounded
from benchmarks.published import memory_rate
from benchmarks.published_files import stock
from foreroute.kernels.ggml.bf16 import Bf16Products
from foreroute.kernels.ggml.experts import ExpertGraphs
from foreroute.kernels.ggml.form import BlockForm, Gating, SlotMatrix
from foreroute.kernels.ggml.graph import Graph, Runner, place
from foreroute.kernels.ggml.interleaved import interleaver
from foreroute.kernels.ggml.lanes import Lanes
from foreroute.kernels.ggml.library import open_library
from foreroute.kernels.ggml.slots import HostSlots
from foreroute.kernels.ggml.types import F32
from foreroute.memory.host import usable_cpus
from foreroute.types import SlotClass

# Hidden, intermediate, experts per token.
SHAPES = {"gpt-oss-20b": (2880, 2880, 4), "Qwen3-30B-A3B": (2048, 768, 8)}
CASES = {"gpt-oss-20b": ("MXFP4", "Q4_0", "Q8_0"), "Qwen3-30B-A3B": ("Q4_K", "Q6_K", "Q4_0", "IQ4_NL", "Q5_K", "Q8_0")}
POOL_BYTES = 2**30
ROWS = (8, 16, 24, 32, 48, 64, 128)


# Slots full of experts, the form that reads them, and how many there are.
Pool = tuple[ExpertGraphs, BlockForm, int]


def pool_of(model: str, name: str, runner: Runner, is_interleaved: bool) -> Pool:
    """Slots full of random experts, the form that reads them, and how many there are."""
    hidden, inner, _ = SHAPES[model]
    kind = open_library().types[name]
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    parts, offset = [], 0
    for rows, columns in shapes:
        parts.append(SlotMatrix(kind, rows, columns, offset, kind.row_bytes(columns), is_interleaved))
        offset += -(-rows * kind.row_bytes(columns) // 64) * 64
    slot_bytes = -(-offset // 4096) * 4096
    slots = POOL_BYTES // slot_bytes
    memory = mmap.mmap(-1, slots * slot_bytes)
    array = np.frombuffer(memory, dtype=np.uint8).reshape(slots, slot_bytes)
    for part in parts:
        blocks = stock(name, part.columns, part.columns**-0.5)[: part.rows * part.row_stride]
        blocks = blocks.reshape(part.rows, part.row_stride)
        if is_interleaved:
            blocks = interleaver(name, part.columns).convert(blocks)
        array[:, part.offset : part.offset + blocks.nbytes] = blocks.ravel()
    form = BlockForm((parts[0], parts[1]), parts[2], Gating("swiglu", _swiglu))
    return ExpertGraphs(runner, HostSlots(memory, SlotClass(slot_bytes, slots, (0,), 0))), form, slots


def _swiglu(joined: torch.Tensor) -> torch.Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def token_run(model: str, graphs: ExpertGraphs, form: BlockForm, slots: int) -> Callable[[], float]:
    """One token's experts of one layer; the seconds that they took."""
    hidden, _, top_k = SHAPES[model]
    graph = graphs.of(form).of(1, top_k)
    x, out = torch.randn(1, hidden), torch.empty(top_k, hidden)
    rng = np.random.default_rng(0)

    def run() -> float:
        graph.ids[0] = np.sort(rng.permutation(slots)[:top_k])
        started = time.perf_counter()
        graph.run(x.data_ptr(), out.data_ptr())
        return time.perf_counter() - started

    return run


def measured(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs) if repeat % 2 else list(runs)[::-1]:
            times[name].append(runs[name]())
    return {name: median(some[len(some) // 4 :]) for name, some in times.items()}


def tokens(threads: int) -> list[dict[str, Any]]:
    """Blocks as GGUF has them beside rows side by side, a token at a time."""
    rows = []
    for model, names in CASES.items():
        hidden, inner, top_k = SHAPES[model]
        for name in names:
            runner = Runner(open_library(), threads)
            forms = {"plain": False, "interleaved": True} if interleaver(name, hidden).is_possible else {"plain": False}
            pools = {label: pool_of(model, name, runner, flag) for label, flag in forms.items()}
            took = measured({label: token_run(model, *pool) for label, pool in pools.items()}, 120)
            nbytes = (
                top_k * 3 * hidden * inner // open_library().types[name].weights * open_library().types[name].nbytes
            )
            row = {"model": model, "type": name, "threads": threads}
            row |= {f"{label}_us": 1e6 * seconds for label, seconds in took.items()}
            row |= {f"{label}_gb_per_s": nbytes / seconds / 1e9 for label, seconds in took.items()}
            print(rounded(row), flush=True)
            rows.append(row)
    return rows


def row_run(pool: Pool, way: str, x: torch.Tensor) -> Callable[[], float]:
    """A random expert for the rows `x`; the seconds that it took."""
    graphs, form, slots = pool
    rng = np.random.default_rng(0)

    def run() -> float:
        slot = int(rng.integers(0, slots))
        started = time.perf_counter()
        getattr(graphs.of(form), way)(x, slot)
        return time.perf_counter() - started

    return run


def prompt_rows(threads: int) -> list[dict[str, Any]]:
    """An expert for a prompt's rows: in blocks, side by side, and in bf16."""
    rows = []
    for model, names in CASES.items():
        hidden = SHAPES[model][0]
        for name in names:
            runner = Runner(open_library(), threads)
            plain = pool_of(model, name, runner, False)
            beside = pool_of(model, name, runner, True) if interleaver(name, hidden).is_possible else None
            for count in ROWS:
                x = torch.randn(count, hidden)
                runs = {"blocks": row_run(plain, "in_blocks", x), "bf16": row_run(plain, "in_bf16", x)}
                if beside is not None:
                    runs["interleaved"] = row_run(beside, "in_blocks", x)
                took = measured(runs, 12)
                row = {"model": model, "type": name, "rows": count, "threads": threads}
                row |= {f"{label}_us": 1e6 * seconds for label, seconds in took.items()}
                print(rounded(row), flush=True)
                rows.append(row)
    return rows


def costs() -> list[dict[str, Any]]:
    """Of each type, on one core: nanoseconds for a weight to become bf16, and for a weight and row in blocks."""
    rows, columns, count = 768, 2048, 16
    library, products = open_library(), Bf16Products(Lanes(open_library(), 1))
    runner, x, found = Runner(library, 1), torch.randn(count, columns), list[dict[str, Any]]()
    out, panel = torch.empty(count, rows), torch.empty(rows, columns, dtype=torch.bfloat16)
    for kind in library.types.values():
        if kind.name in ("I32", "F32"):
            continue
        blocks = np.random.default_rng(0).integers(0, 60, rows * kind.row_bytes(columns), dtype=np.uint8)
        graph = Graph(runner, 4)
        matrix, inputs = graph.tensor(kind.number, (columns, rows)), graph.tensor(F32, (columns, count))
        product = library.ggml_mul_mat(graph.context, matrix, inputs)
        for tensor, address in (
            (matrix, blocks.ctypes.data), (inputs, x.data_ptr()), (product, out.data_ptr())
        ):  # fmt: skip
            place(tensor, address)
        graph.finish(product)
        took = measured({
            "convert": _seconds(products._convert, kind, blocks.ctypes.data, panel), "blocks": _seconds(graph.run)
        }, 12)  # fmt: skip
        row = {"type": kind.name, "convert_ns": 1e9 * took["convert"] / (rows * columns)}
        row["blocks_ns"] = 1e9 * took["blocks"] / (rows * columns * count)
        print(rounded(row), flush=True)
        found.append(row)
    return found


def _seconds(work: Callable[..., object], *given: object) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        work(*given)
        return time.perf_counter() - started

    return run


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", action="store_true", help="a prompt's rows in place of a token")
    parser.add_argument("--costs", action="store_true", help="of each type, on one core")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--trial", action="store_true", help="keep nothing under results/")
    args = parser.parse_args()
    # A lane computes an expert of a prompt alone.
    threads = 1 if args.rows or args.costs else args.threads
    torch.set_num_threads(threads)
    with torch.inference_mode():
        rows = costs() if args.costs else prompt_rows(threads) if args.rows else tokens(threads)
    name = "block-products" + ("-costs" if args.costs else "-rows" if args.rows else "")
    record(name, rounded({"memory_bytes_per_s": memory_rate(), "rows": rows}), keep=not args.trial)


if __name__ == "__main__":
    main()
