"""Does loading depend on the experts? Time and peak memory of `load`, for N experts and for ten times as many.

    python -m benchmarks.loading [--experts 16] [--repeats 3]

Two sparse Qwen3-MoE checkpoints (experts that are holes in the file) with the same dense weights, but for the routers',
and the same budget in bytes; each load in a process of its own, in turns. Figures: seconds in `load` and the process's
peak resident memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import _harness
from tests.support.checkpoints import save_hollow
from tests.support.families import FAMILIES

_MEASURE = """
import json, resource, sys, time
import foreroute
import transformers.models.auto.modeling_auto, transformers.models.qwen3_moe.modeling_qwen3_moe
begun = time.perf_counter()
model = foreroute.load(sys.argv[1], "64MiB")
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([seconds, peak, model.foreroute.plan.total_expert_bytes]))
"""


def main() -> None:
    """Measure both checkpoints in turns, and record the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = (args.experts, 10 * args.experts)
        paths = {experts: _checkpoint(experts, Path(folder)) for experts in sizes}
        runs: dict[int, list[list[float]]] = {experts: [] for experts in sizes}
        for _ in range(args.repeats):
            for experts in sizes:
                runs[experts].append(_measured(paths[experts]))
    few, many = ([statistics.median(column) for column in zip(*runs[experts], strict=True)] for experts in sizes)
    result = {
        "expert_bytes": [few[2], many[2]],
        "load_s": [few[0], many[0]],
        "peak_bytes": [few[1], many[1]],
        "time_ratio": many[0] / few[0],
        "memory_ratio": many[1] / few[1],
    }
    _harness.record("loading", _harness.rounded(result), {"runs": {str(n): runs[n] for n in sizes}})


def _checkpoint(experts: int, folder: Path) -> Path:
    config = FAMILIES["qwen3_moe"]()
    config.hidden_size = config.moe_intermediate_size = 1024
    config.num_experts = experts
    return save_hollow(config, folder / str(experts))


def _measured(path: Path) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    measured: list[float] = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
