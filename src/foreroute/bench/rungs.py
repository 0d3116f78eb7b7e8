"""The rungs of the ladder: each adds one feature to the one below it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foreroute.config import EngineConfig

ON_DEMAND, CACHE, HITS_FIRST, PREFETCH = "on-demand", "cache", "hits-first", "prefetch"
ORACLE, BELADY, RESIDENT = "oracle", "belady", "resident"


@dataclass(frozen=True)
class Rung:
    """name: as in flags and --json. label: as in tables. is_measured: else computed."""

    name: str
    label: str
    is_measured: bool = True


LADDER = (
    Rung(ON_DEMAND, "on-demand"),
    Rung(CACHE, "+ cache"),
    Rung(HITS_FIRST, "+ hits first"),
    Rung(PREFETCH, "+ prefetch"),
    Rung(ORACLE, "oracle prefetch"),
    Rung(BELADY, "Belady bound", is_measured=False),
    Rung(RESIDENT, "fully resident"),
)
RUNG_NAMES = tuple(rung.name for rung in LADDER)


def rungs_named(names: Sequence[str]) -> tuple[Rung, ...]:
    """Look up the rungs of these names, lowest first."""
    return tuple(rung for rung in LADDER if rung.name in names)


def plain_config(asked: EngineConfig) -> EngineConfig:
    """The same engine without prefetch."""
    return replace(asked, prefetch="none", predictor="no")


def config_of(rung: Rung, asked: EngineConfig) -> EngineConfig:
    """The engine's switches on a rung; those that the rung does not set stay as in `asked`."""
    if rung.name == PREFETCH:
        return asked
    if rung.name == ORACLE:
        # The oracle predicts instead: nothing is fitted, and no prediction is left out.
        return replace(asked, predictor="no", governor=False)
    without = plain_config(asked)
    if rung.name in (HITS_FIRST, RESIDENT):
        return without
    without = replace(without, hits_first=False)
    return replace(without, cache=False) if rung.name == ON_DEMAND else without
