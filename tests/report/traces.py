"""Traces made by hand: an event per line, as docs/trace.md has them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]
NUM_LAYERS, NUM_EXPERTS, TOP_K, EXPERT_BYTES = 2, 4, 2, 1000


def header(**changes: Any) -> Event:
    return {
        "event": "header", "version": 2, "model": "made-up", "model_type": "none", "fingerprint": "0" * 32,
        "experts_per_layer": [NUM_EXPERTS] * NUM_LAYERS, "top_k": [TOP_K] * NUM_LAYERS,
        "expert_bytes": [EXPERT_BYTES] * NUM_LAYERS, "num_slots": 5, "slot_bytes": 1024, "staging_slots": 1,
        "codec": "BF16", "eviction": "lru", "prefetch": "lookahead", "policy": "exact",
    } | changes  # fmt: skip


def step(t: float, phase: str = "decode", rows: int = 1, positions: int = 1, is_start: bool = False) -> Event:
    return {"event": "step", "t": t, "phase": phase, "rows": rows, "positions": positions, "is_start": is_start}


def layer(t: float, end: float, at: int, **lists: Sequence[int]) -> Event:
    """lists: hits, late_hits, misses, substituted; those left out are empty."""
    found = {name: list(lists.get(name, ())) for name in ("hits", "late_hits", "misses", "substituted")}
    return {"event": "layer", "t": t, "end": end, "layer": at, **found}


def stall(t: float, end: float, at: int) -> Event:
    return {"event": "stall", "t": t, "end": end, "layer": at}


def guess(t: float, at: int, experts: Sequence[int]) -> Event:
    return {"event": "guess", "t": t, "layer": at, "experts": list(experts)}


def load(at: int, expert: int, begun: float, t: float, why: str = "demand", **more: Any) -> Event:
    times = {"asked": begun, "begun": begun, "t": t}
    return {"event": "load", "layer": at, "expert": expert, "slot": 0, "why": why, "bytes": EXPERT_BYTES} | times | more


def gone(kind: str, t: float, at: int, expert: int) -> Event:
    """kind: "cancel" or "evict"."""
    return {"event": kind, "t": t, "layer": at, "expert": expert}


def end(t: float = 99.0) -> Event:
    return {"event": "end", "t": t, "stats": {}}


def write(path: Path, *events: Event) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def routed(path: Path, route: Sequence[Sequence[Sequence[int]]], **changes: Any) -> Path:
    """A whole trace of decode steps, [step][layer] -> experts, 10 ms each; every demand was a miss of 1 ms."""
    events = [header(**changes)]
    for number, experts_of in enumerate(route):
        events.append(step(number / 100))
        for at, experts in enumerate(experts_of):
            begun = number / 100 + at / 1000
            events += [load(at, expert, begun, begun + 1e-3) for expert in experts]
            events += [stall(begun, begun + 1e-3, at), layer(begun, begun + 1e-3, at, misses=experts)]
    return write(path, *events, end())
