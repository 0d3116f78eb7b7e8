"""How fast experts come from the disk into their slots, against a bare loop of the same reads.

    python -m benchmarks.disk [--folder DIR] [--quick]

A file of 4.2 GB holds 448 experts of 9.4 MB (bf16, 30B-A3B's shape), taken once as packed (aligned records with
checksums), once as plain safetensors lie (three unaligned parts in a row). Both are read in random order by O_DIRECT;
the bare loop is one `preadv` per expert into the same kind of memory, with as many threads; once more on small pages
it shows what huge pages are worth. All contenders take turns within one run. Wanted, by the median of the ratios within
a round: packed 0.9 of the bare loop, unpacked 0.8.
"""

import argparse
import mmap
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import xxhash

from benchmarks._harness import interleave, record, rounded, summary
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from foreroute.types import Copy, ExpertReads, Read

PART_BYTES = 768 * 2048 * 2
EXPERT_BYTES = 3 * PART_BYTES
NUM_EXPERTS = 448
UNALIGNED_BY = 2968  # where a safetensors header may end
AT_ONCE = 8  # requests in flight, a layer's misses
WANTED = {"packed": 0.9, "unpacked": 0.8}


@contextmanager
def expert_file(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """A file of experts that compress badly, gone afterwards: its path, and a checksum per expert."""
    noise = np.random.default_rng(0).integers(0, 256, EXPERT_BYTES, dtype=np.uint8)
    checksums = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix="foreroute-disk-") as file:
        for expert in range(NUM_EXPERTS):
            content = (noise + np.uint8(expert % 256)).tobytes()
            checksums.append(xxhash.xxh3_64_intdigest(content))
            file.write(content)
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
        yield file.name, checksums


def flat(src_offset: int, dst_offset: int, nbytes: int) -> Copy:
    """A plain copy of bytes."""
    return Copy(src_offset, dst_offset, 1, nbytes, 1, nbytes, 1)


def packed_reads(path: str, checksums: list[int] | None) -> Callable[[int], ExpertReads]:
    """One aligned record per expert."""
    copies = (flat(0, 0, EXPERT_BYTES),)
    return lambda key: (Read(path, key * EXPERT_BYTES, EXPERT_BYTES, copies, checksums[key] if checksums else None),)


def unpacked_reads(path: str) -> Callable[[int], ExpertReads]:
    """Down, gate and up in a row, as safetensors sort them; gate and up come first in the slot."""
    copies = (
        flat(0, 2 * PART_BYTES, PART_BYTES),
        flat(PART_BYTES, 0, PART_BYTES),
        flat(2 * PART_BYTES, PART_BYTES, PART_BYTES),
    )
    return lambda key: (Read(path, UNALIGNED_BY + key * EXPERT_BYTES, EXPERT_BYTES, copies),)


class Disk:
    """The contenders; each run reads `reads_per_run` experts in a new random order and returns GB/s."""

    def __init__(self, path: str, reads_per_run: int) -> None:
        self.path = path
        self.reads_per_run = reads_per_run
        self.cpu_ms: dict[str, list[float]] = {}
        self._rng = random.Random(1)
        self._slots = allocate_slots(AT_ONCE, EXPERT_BYTES)[1]
        small = mmap.mmap(-1, AT_ONCE * EXPERT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        small.madvise(mmap.MADV_NOHUGEPAGE)
        whole = memoryview(small)
        self._slots_of_small_pages = [whole[slot * EXPERT_BYTES :][:EXPERT_BYTES] for slot in range(AT_ONCE)]
        for slot in self._slots + self._slots_of_small_pages:
            slot[:] = bytes(EXPERT_BYTES)

    @contextmanager
    def bare(self, name: str, num_threads: int, *, small_pages: bool = False) -> Iterator[Callable[[], float]]:
        """One preadv per expert, nothing else; each thread its share."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        slots = self._slots_of_small_pages if small_pages else self._slots

        def read(order: list[int], first: int) -> None:
            for turn in range(first, len(order), num_threads):
                got = os.preadv(fd, [slots[turn % AT_ONCE]], order[turn] * EXPERT_BYTES)
                assert got == EXPERT_BYTES

        def run() -> float:
            order = self._order()
            threads = [threading.Thread(target=read, args=(order, first)) for first in range(num_threads)]
            with self._timed(name) as rate:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            return rate[0]

        yield run
        os.close(fd)

    @contextmanager
    def ours(
        self, name: str, num_threads: int, reads_of: Callable[[int], ExpertReads]
    ) -> Iterator[Callable[[], float]]:
        """Demands through a DiskTransfer that stays open, at most AT_ONCE in flight."""
        with closing(DiskTransfer(reads_of, self._slots.__getitem__, num_threads=num_threads)) as transfer:

            def run() -> float:
                order = self._order()
                with self._timed(name) as rate:
                    self._demand_all(transfer, order, list(range(AT_ONCE)))
                return rate[0]

            yield run
            assert not transfer.buffered_paths, "this file system refuses O_DIRECT: nothing was measured"

    def _demand_all(self, transfer: DiskTransfer, order: list[int], free: list[int]) -> None:
        waiting = list(order)
        while waiting or transfer.num_in_flight:
            while waiting and free:
                transfer.demand(waiting.pop(), free.pop())
            for completion in transfer.wait():
                if completion.error is not None:
                    raise completion.error
                free.append(completion.slot)

    def _order(self) -> list[int]:
        return self._rng.sample(range(NUM_EXPERTS - 1), self.reads_per_run)

    @contextmanager
    def _timed(self, name: str) -> Iterator[list[float]]:
        rate: list[float] = []
        began_s, began_cpu_s = perf_counter(), process_time()
        yield rate
        rate.append(self.reads_per_run * EXPERT_BYTES / (perf_counter() - began_s) / 1e9)
        self.cpu_ms.setdefault(name, []).append((process_time() - began_cpu_s) / self.reads_per_run * 1e3)


def compare(disk: Disk, num_threads: int, checksums: list[int], repeats: int) -> dict[str, list[float]]:
    """GB/s of the bare loop and ours with `num_threads` reads at once, in turns."""
    ours = {
        "packed": packed_reads(disk.path, checksums),
        "packed_unchecked": packed_reads(disk.path, None),
        "unpacked": unpacked_reads(disk.path),
    }
    with ExitStack() as stack:
        bare = f"bare_{num_threads}"
        small_pages = f"bare_on_small_pages_{num_threads}"
        contenders = {
            bare: stack.enter_context(disk.bare(bare, num_threads)),
            small_pages: stack.enter_context(disk.bare(small_pages, num_threads, small_pages=True)),
        }
        for kind, reads_of in ours.items():
            name = f"{kind}_{num_threads}"
            contenders[name] = stack.enter_context(disk.ours(name, num_threads, reads_of))
        return interleave(contenders, repeats)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the file is written")
    parser.add_argument("--quick", action="store_true", help="fewer repeats; for trying out, not for the record")
    asked = parser.parse_args()
    with expert_file(asked.folder) as (path, checksums):
        disk = Disk(path, reads_per_run=40)
        by_threads = {threads: compare(disk, threads, checksums, 6 if asked.quick else 30) for threads in (1, 2)}
    result: dict[str, dict[str, object]] = {}
    for threads, gb_per_s in by_threads.items():
        for name, rates in gb_per_s.items():
            of_bare = [rate / bare for rate, bare in zip(rates, gb_per_s[f"bare_{threads}"], strict=True)]
            result[name] = {
                "gb_per_s": summary(rates),
                "of_bare": summary(of_bare),
                "cpu_ms_per_expert": summary(disk.cpu_ms[name])["median"],
            }
            if (kind := name.rsplit("_", 1)[0]) in WANTED:
                result[name]["wanted_of_bare"] = WANTED[kind]
            print(name, rounded(result[name]), flush=True)
    shape = {"expert_bytes": EXPERT_BYTES, "num_experts": NUM_EXPERTS, "at_once": AT_ONCE}
    raw = {"gb_per_s": {name: rates for gb_per_s in by_threads.values() for name, rates in gb_per_s.items()}}
    record("disk", rounded({"shape": shape, "cases": result}), rounded(raw), keep=not asked.quick)


if __name__ == "__main__":
    main()
