"""A pool over a fake transfer, and an observer that notes what it is told."""

import itertools
from functools import partial
from typing import Any

import torch

from foreroute.engine.interfaces import StepInfo, StepObserver
from foreroute.engine.pool import ExpertPool
from foreroute.residency.eviction import Lru
from foreroute.residency.slots import Residency
from foreroute.types import ExpertKeys
from tests.support.fake_transfer import FakeTransfer

LAYERS, EXPERTS, NBYTES = 3, 8, 100
DECODE, PROMPT = StepInfo("decode", 1, 1), StepInfo("prefill", 1, 5)
WEIGHTS = torch.ones(1, 2)


class Notes(StepObserver):
    """What it was told, as (name, arguments)."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[Any, ...]]] = []
        for name in vars(StepObserver):
            if not name.startswith("_"):
                setattr(self, name, partial(self._note, name))

    def _note(self, name: str, *arguments: Any) -> None:
        self.told.append((name, arguments))

    def of(self, name: str) -> list[Any]:
        """The arguments of every call of this name."""
        return [arguments for told, arguments in self.told if told == name]


def made_pool(
    num_slots: int = 12, deferred_slots: int = 2, *, waits: bool = True, keeps: bool = True
) -> tuple[ExpertPool, Any, Notes]:
    """A pool in its first decode step, its transfer and an observer; `waits` lets the transfer finish what is asked."""
    residency = Residency(
        num_slots, LAYERS * EXPERTS, eviction=Lru(), staging_slots=4, deferred_slots=deferred_slots,
        keys_per_layer=EXPERTS,
    )  # fmt: skip
    transfer, notes, seconds = FakeTransfer(finish_on_wait=waits), Notes(), itertools.count()
    keys = ExpertKeys.of([EXPERTS] * LAYERS)
    pool = ExpertPool(
        keys,
        [NBYTES] * keys.num_keys,
        residency,
        transfer,
        keeps_across_tokens=keeps,
        clock=lambda: float(next(seconds)),
    )
    pool.add_observer(notes)
    pool.begin_step(DECODE)
    return pool, transfer, notes


def compute(pool: ExpertPool, layer: int, keys: list[int]) -> None:
    """A layer's experts, demanded, waited for and released."""
    ready, waiting = pool.demand(layer, keys)
    while waiting:
        ready += pool.wait(waiting)
    assert sorted(key for key, _ in ready) == keys
    pool.release(keys)


def counts(pool: ExpertPool, *names: str) -> tuple[int, ...]:
    """These counts of the phase that runs."""
    return tuple(getattr(pool.phase, name) for name in names)
