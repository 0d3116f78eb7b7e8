"""Run the measurement: load the rungs, run them in turn, compare their tokens, and record the results."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch

from foreroute.bench.asked import Settled
from foreroute.bench.bandwidth import Bandwidth, measure_bandwidth
from foreroute.bench.oracle import Oracle, RouteRecorder, Routes
from foreroute.bench.process import PeakRss, give_back_freed_memory, memory_bytes_per_s, rss_bytes
from foreroute.bench.repeats import turns
from foreroute.bench.run import Case, Timed, fill_pool, run_once
from foreroute.bench.rungs import BELADY, ORACLE, RESIDENT, Rung, config_of, plain_config
from foreroute.bench.windows import Windows
from foreroute.config import Plan
from foreroute.loading.load import load
from foreroute.memory.host import available_ram
from foreroute.types import NamedProgress

# Share of the free RAM that all rungs together may take; above it they are measured one after another.
_RAM_SHARE = 0.8
# Besides a rung's slots and dense weights: activations, the KV cache.
_BESIDE_BYTES = 512 * 2**20
_DISK_SECONDS = 0.7
# Tokens of text that show the input of each layer's experts, before all experts are loaded.
_FILLING_TOKENS = 8


@dataclass(frozen=True)
class Run:
    """One run of a rung. Repeat 0 is the warm-up: right after loading for the first case, when the pool is empty."""

    memory: str
    rung: str
    case: Case
    repeat: int
    timed: Timed


@dataclass(frozen=True)
class TokenMismatch:
    """Where the choices of `one` first differ from those of `other`; times are then meaningless.

    one, other: "rung at memory". row, new_token: counted from 1; the first new token is the prompt's.
    """

    one: str
    other: str
    case: Case
    repeat: int
    row: int
    new_token: int


@dataclass
class Measurements:
    """The measurements so far.

    plans, peak_rss_bytes: by (memory, rung). routes: by (case, repeat). disk: in the order measured.
    interleaved: all rungs of a budget took turns. is_interrupted: by Ctrl-C.
    """

    runs: list[Run] = field(default_factory=list)
    plans: dict[tuple[str, str], Plan] = field(default_factory=dict)
    peak_rss_bytes: dict[tuple[str, str], int | None] = field(default_factory=dict)
    routes: dict[tuple[Case, int], Routes] = field(default_factory=dict)
    disk: list[Bandwidth] = field(default_factory=list)
    memory_bytes_per_s: float | None = None
    interleaved: bool = True
    is_interrupted: bool = False
    difference: TokenMismatch | None = None


class _Differs(Exception):
    """Raised when a rung's tokens differ from those of the others."""


class _Loaded:
    """A rung's model, and its oracle, if it uses one."""

    def __init__(self, settled: Settled, rung: Rung, memory: str, peak: PeakRss, text: torch.Tensor) -> None:
        self.rung = rung
        self.peak = peak
        self.oracle = Oracle() if rung.name == ORACLE else None
        asked = settled.asked
        budget = "100%" if rung.name == RESIDENT else memory
        with peak:
            self.model = load(settled.folder, budget, asked.dtype, config=config_of(rung, asked.config))
            if rung.name == RESIDENT:
                fill_pool(self.model, text)
        if self.oracle is not None:
            # Replaces the lookahead, which the configuration has asked for.
            self.model.foreroute.host_engine.prefetcher.predictor = self.oracle


class Session:
    """Measures what was settled; `seen` holds the results so far, also after an interrupt.

    Args:
        windows: where the token ids come from.

    Attributes:
        progress: called before every run.
    """

    def __init__(
        self, settled: Settled, windows: Windows, progress: NamedProgress = lambda what, done, total: None
    ) -> None:
        self.seen = Measurements()
        self._settled = settled
        self._asked = settled.asked
        self.progress = progress
        self._ids = {case: windows.of(case, self._asked.repeats + 1) for case in settled.cases}
        self._choices: dict[tuple[Case, int], tuple[str, list[list[int]]]] = {}
        self._done = 0
        self._base_bytes: int | None = None

    def run(self) -> Measurements:
        """Measure everything; stop early at Ctrl-C, and at once where tokens differ.

        Raises:
            ReadError, ChecksumError: an expert could not be read.
        """
        give_back_freed_memory()
        self._base_bytes = rss_bytes()
        try:
            self.seen.memory_bytes_per_s = memory_bytes_per_s()
            self._measure_disk()
            if self._looks:
                self._record_routes()
            for memory in self._asked.memories:
                for rungs in self._sittings(memory):
                    give_back_freed_memory()
                    self._sit(memory, rungs)
                self._measure_disk()
        except KeyboardInterrupt:
            self.seen.is_interrupted = True
        except _Differs:
            assert self.seen.difference is not None, "it is noted before"
        return self.seen

    @property
    def num_runs(self) -> int:
        """Number of runs in all, including warm-ups and those that only record routes."""
        rungs = sum(len(self._settled.measured_rungs(memory)) for memory in self._asked.memories) + self._looks
        return rungs * len(self._settled.cases) * (self._asked.repeats + 1)

    @property
    def _looks(self) -> bool:
        """Whether routes are recorded before anything is timed."""
        return any(rung.name in (ORACLE, BELADY) for rung in self._asked.rungs)

    def _measure_disk(self) -> None:
        settled, config = self._settled, self._asked.config
        self.seen.disk.append(
            measure_bandwidth(
                settled.reads_of,
                settled.keys(),
                settled.plan.slot_bytes,
                seconds=_DISK_SECONDS,
                num_threads=config.readers(settled.plan.slot_bytes),
                direct=config.direct_io,
                label=settled.label,
                seed=len(self.seen.disk),
            )
        )

    def _record_routes(self) -> None:
        """Record the routes of every run. Untimed, on a separate model: recording costs time and warms a pool."""
        budgets = self._settled.budgets
        memory = "100%" if self._settled.can_be_resident else max(budgets, key=lambda name: budgets[name])
        model = load(self._settled.folder, memory, self._asked.dtype, config=plain_config(self._asked.config))
        with closing(model.foreroute):
            for case in self._settled.cases:
                for repeat, window in enumerate(self._ids[case]):
                    self._tell("looking at the routes")
                    recorder = RouteRecorder(self._settled.num_experts)
                    model.foreroute.host_engine.routing_listener = recorder
                    timed = run_once(model, window, case)
                    self.seen.routes[case, repeat] = recorder.routes
                    self._compare(f"the first look at {memory}", case, repeat, timed.choices)

    def _sittings(self, memory: str) -> list[Sequence[Rung]]:
        """Group a budget's rungs: all at once where they fit the free RAM, so that they take turns; else one by one."""
        rungs, settled = self._settled.measured_rungs(memory), self._settled
        pools = [settled.whole_bytes if rung.name == RESIDENT else settled.budgets[memory] for rung in rungs]
        needed = sum(pools) + len(rungs) * (settled.plan.dense_bytes + _BESIDE_BYTES)
        if needed <= _RAM_SHARE * available_ram():
            return [rungs]
        self.seen.interleaved &= len(rungs) == 1
        return [[rung] for rung in rungs]

    def _sit(self, memory: str, rungs: Sequence[Rung]) -> None:
        first = self._settled.cases[0]
        loaded: list[_Loaded] = []
        try:
            for rung in rungs:
                text = self._ids[first][0, :1, :_FILLING_TOKENS]
                loaded.append(_Loaded(self._settled, rung, memory, PeakRss(self._base_bytes), text))
                self.seen.plans[memory, rung.name] = loaded[-1].model.foreroute.plan
            for case in self._settled.cases:
                for one in loaded:
                    with one.peak:
                        self._run(one, memory, case, 0)
                    self.seen.peak_rss_bytes[memory, one.rung.name] = one.peak.peak_bytes
                for repeat, one in turns(loaded, self._asked.repeats):
                    self._run(one, memory, case, repeat + 1)
        finally:
            for one in loaded:
                one.model.foreroute.close()

    def _run(self, one: _Loaded, memory: str, case: Case, repeat: int) -> None:
        self._tell(f"{memory}, {one.rung.label}, {' + '.join(case.tests)}")
        if one.oracle is not None:
            one.oracle.follow(self.seen.routes[case, repeat])
        timed = run_once(one.model, self._ids[case][repeat], case)
        self._compare(f"{one.rung.label} at {memory}", case, repeat, timed.choices)
        self.seen.runs.append(Run(memory, one.rung.name, case, repeat, timed))

    def _compare(self, who: str, case: Case, repeat: int, choices: list[list[int]]) -> None:
        """Stop unless every rung chooses the same tokens: else no time is worth anything."""
        other, expected = self._choices.setdefault((case, repeat), (who, choices))
        for step, (mine, theirs) in enumerate(zip(choices, expected, strict=True)):
            for row, (token, wanted) in enumerate(zip(mine, theirs, strict=True)):
                if token != wanted:
                    self.seen.difference = TokenMismatch(who, other, case, repeat, row + 1, step + 1)
                    raise _Differs

    def _tell(self, what: str) -> None:
        self.progress(what, self._done, self.num_runs)
        self._done += 1
