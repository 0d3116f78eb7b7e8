"""Measure how fast this disk delivers the model's experts: random experts, read as the engine reads them."""

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foreroute.transfer.disk import own_reader
from foreroute.types import ExpertReads

# Requests kept in flight per reader, so that none is idle: as in a layer with several misses.
_QUEUED_PER_READER = 2


@dataclass(frozen=True)
class Bandwidth:
    """Measured read speed of experts.

    bytes_per_s: stored bytes of experts per second, all readers together.
    expert_ms: median time between two arrivals. num_reads: contiguous ranges read.
    num_experts: experts read, without repeats until each was read once.
    is_direct: whether O_DIRECT was possible. Else the figure is (in part) the page cache's, not the disk's.
    """

    bytes_per_s: float
    expert_ms: float
    num_experts: int
    num_reads: int
    elapsed_s: float
    is_direct: bool


def measure_bandwidth(
    reads_of: Callable[[int], ExpertReads],
    keys: Sequence[int],
    slot_bytes: int,
    *,
    seconds: float = 1.0,
    num_threads: int = 1,
    direct: bool = True,
    label: Callable[[int], str] = "expert key {}".format,
    seed: int = 0,
) -> Bandwidth:
    """Read experts in random order for about `seconds`.

    Args:
        reads_of, slot_bytes, num_threads, direct, label: as the engine has them.
        keys: the experts to choose from, in an order that `seed` decides.
    Raises:
        ReadError, ChecksumError: an expert could not be read.
    """
    assert seconds > 0, "a measurement takes time"
    # Read a key again only after all others: it is in flight once at a time, and caches in the disk help little.
    waiting = deque(random.Random(seed).sample(list(keys), len(keys)))
    num_queued = min(_QUEUED_PER_READER * num_threads, len(waiting))
    arrivals_s: list[float] = []
    nbytes = 0
    free = list(range(num_queued))
    options = {"num_threads": num_threads, "direct": direct, "label": label}
    with own_reader(reads_of, num_queued, slot_bytes, **options) as (transfer, _):
        started_s = now_s = time.perf_counter()
        while now_s - started_s < seconds or transfer.num_in_flight:
            while free and now_s - started_s < seconds:
                transfer.demand(waiting.popleft(), free.pop())
            for completion in transfer.wait():
                if completion.error is not None:
                    raise completion.error
                free.append(completion.slot)
                waiting.append(completion.key)
                nbytes += completion.nbytes
                arrivals_s.append(time.perf_counter())
            now_s = time.perf_counter()
        is_direct = not transfer.buffered_paths
    elapsed_s = arrivals_s[-1] - started_s
    gaps_s = [later - earlier for earlier, later in zip([started_s, *arrivals_s], arrivals_s, strict=False)]
    return Bandwidth(
        bytes_per_s=nbytes / elapsed_s,
        expert_ms=statistics.median(gaps_s) * 1e3,
        num_experts=len(arrivals_s),
        num_reads=transfer.reads,
        elapsed_s=elapsed_s,
        is_direct=is_direct,
    )
