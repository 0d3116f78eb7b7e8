"""The GPU tier's ladder on one GPU, in ten minutes at most: one table, and raw figures under benchmarks/results/.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --trial          # a tiny shape, on whatever is there: does this program work?

Ceilings first: the link (copies of whole experts from pinned memory) and the GPU's memory. Then two shapes with random
weights made on the spot, under routes of a trained model and under random ones: on demand, the published engine's mode
(no cache, guesses computed in place of the choice, both buffers no larger than a layer needs), a cache of 12.5, 25 and
50 % without guesses, with a trained model's, and with perfect ones, and everything resident. Peers last. With routes
that are not the weights' own, all of it is mechanics: bytes and time.
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import foreroute  # noqa: F401  before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from benchmarks.gpu import peers, shapes
from benchmarks.gpu.routes import Routes, random_routes, trained_routes
from benchmarks.gpu.rungs import LADDER, Measured, run
from foreroute import EngineConfig
from foreroute.errors import DeviceError
from foreroute.loading.arguments import open_device

_STEPS, _WARM_STEPS = 32, 64
_LIMIT_S = 570.0
NO_CUDA = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run it all; 2 where there is no CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The GPU tier's ladder on one GPU.")
    parser.add_argument("--trial", action="store_true", help="a tiny shape on the CPU; nothing is kept")
    args = parser.parse_args(argv)
    if args.trial:
        device, link, memory = torch.device("cpu"), 1e9, 1e10
        asked = {"tiny": shapes.tiny}
    else:
        try:
            device = open_device(EngineConfig(device="cuda", control="device"))
        except DeviceError as error:
            print(f"no CUDA: nothing is measured. {error}", file=sys.stderr)
            return NO_CUDA
        asked = {"Qwen3-30B-A3B": shapes.qwen3_30b_a3b, "gpt-oss-20b": shapes.gpt_oss_20b}
        link, memory = ceilings()
    started_s = time.monotonic()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for name, config in asked.items():
        rows += measure(name, config(), dtype, device, link, skipped, started_s)
    if device.type == "cuda":
        for name, config in asked.items():
            rows += peers.measure(name, config(), dtype, skipped, lambda: time.monotonic() - started_s < _LIMIT_S)
    print_table(rows, link, memory, skipped)
    result = {
        "device": "CPU (trial)" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "link_gb_per_s": link / 1e9,
        "memory_gb_per_s": memory / 1e9,
        "what": "mechanics: random weights, injected routes",
        "skipped": skipped,
    }
    _harness.record("gpu", _harness.rounded(result), {"rows": rows}, keep=not args.trial)
    return 0


def ceilings() -> tuple[float, float]:
    """Bytes per second of the link and of the GPU's memory."""
    from foreroute.bench.link import measure_link, median_seconds

    source = torch.empty(2 * 2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # A copy within its memory reads and writes.
    own = 2 * source.numel() / median_seconds(lambda: target.copy_(source))
    # The length of one of Qwen3-30B-A3B's experts in bf16.
    return measure_link(3 * 2048 * 768 * 2).bytes_per_s, own


def measure(
    name: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    link: float,
    skipped: list[str],
    started_s: float,
) -> list[dict[str, Any]]:
    """All rungs of one shape; what does not fit, or comes too late, is named in `skipped`."""
    shape = shapes.make_shape(name, config, dtype, device)
    top_k, num_experts = shape.layers[0].top_k, shape.table.num_experts
    steps, warm = (4, 4) if device.type == "cpu" else (_STEPS, _WARM_STEPS)
    size = (steps + warm, len(shape.layers), num_experts, top_k)
    routings: list[Routes] = [trained_routes(*size), random_routes(*size)]
    found: list[Measured] = []
    for routes in routings:
        print(f"{name}, {routes.name} routes: a guess holds {routes.recall:.1%} of the choice", file=sys.stderr)
        for rung in LADDER:
            what = f"{name}, {routes.name}, {rung.name}"
            if time.monotonic() - started_s > _LIMIT_S:
                skipped.append(f"{what}: no time left")
                continue
            try:
                found.append(run(shape, rung, routes, device, link, steps))
                print(f"{what}: {found[-1].tpot_ms:.2f} ms", file=sys.stderr)
            except DeviceError as error:
                skipped.append(f"{what}: {error}")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    shape.arena.close()
    return [one.row() for one in found]


def print_table(rows: Sequence[dict[str, Any]], link: float, memory: float, skipped: Sequence[str]) -> None:
    """One table on standard output."""
    print(f"link {link / 1e9:.1f} GB/s, GPU memory {memory / 1e9:.0f} GB/s (mechanics: random weights, given routes)")
    print(
        f"{'shape':14} {'routes':16} {'rung':18} {'slots':>6} {'TPOT ms':>9} {'MB/token':>9} {'floor ms':>9} "
        f"{'hits':>6}"
    )
    for row in rows:
        print(
            f"{row['shape']:14} {row['routes']:16} {row['rung']:18} {row['num_slots']:6} {row['tpot_ms']:9.2f} "
            f"{row['moved_mb']:9.1f} {row['floor_ms']:9.2f} {row['hit_rate']:6.1%}"
        )
    for line in skipped:
        print(f"left out: {line}")


if __name__ == "__main__":
    sys.exit(main())
