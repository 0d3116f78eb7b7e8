"""The feed of the live page: a few snapshots of the engine a second, as server-sent events, while anyone watches.

Contents of the events: `LiveFeed.hello` and `LiveFeed.snapshot`. The engine records (recorder.py) while there are
viewers; a snapshot is made in the server's thread, once for all of them.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from foreroute.config import Plan
from foreroute.engine.interfaces import PhaseStats
from foreroute.engine.moe_step import MoeStep
from foreroute.residency.slots import FREE, LOADING, PINNED, READY
from foreroute.server.watching.recorder import Recorder, StepRecord, digest

INTERVAL_S = 0.125
MOST_VIEWERS = 16
# When nothing happens, a line is sent this often, so that a closed connection is noticed and proxies keep it open.
_KEEP_ALIVE_S = 10.0
# A step that takes longer is shown before it ends.
_LONG_STEP_S = 0.15
# Suggested prompts for a model with little knowledge.
_EXAMPLES = {"foreroute-tiny": ("4735 + 281", "Sort: 31 12 87 45 60", "def read_lines(path):")}
_as_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_COUNTS = tuple(field.name for field in fields(PhaseStats))
# Two bits per expert.
_ABSENT, _LOADING, _RESIDENT, _PREFETCHED = range(4)
_CODE_OF = {FREE: _ABSENT, LOADING: _LOADING, READY: _RESIDENT, PINNED: _RESIDENT}


class LiveFeed:
    """Snapshots of one model's engine.

    Args:
        engine, plan: of the loaded model.
        model: its name for people.
        policy: called each time; how decoding treats misses.
        has_chat: the model has a chat template.
        is_over: whether the server stops, which ends every viewer's stream.
        is_running: called each time; whether requests are being computed. A step alone does not tell, as one that was
            interrupted never ends.
        clock: the engine's.
    """

    def __init__(
        self,
        engine: MoeStep,
        plan: Plan,
        model: str,
        policy: Callable[[], str] = lambda: "exact",
        has_chat: bool = True,
        is_over: Callable[[], bool] = lambda: False,
        is_running: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pool, self._prefetcher = engine.pool, engine.prefetcher
        self._plan = plan
        self._model = model
        self._policy = policy
        self._has_chat = has_chat
        self._clock = clock
        self._new_recorder = partial(Recorder, self._pool, clock)
        self._recorder = self._new_recorder()
        self.num_viewers = 0
        self._made: tuple[tuple[int, bool, int, float], bytes] | None = None
        self._is_over = is_over
        self._is_running = is_running

    def enter(self) -> bool:
        """Add a viewer and start recording; False when there are too many. `leave` removes the viewer."""
        if self.num_viewers >= MOST_VIEWERS:
            return False
        self.num_viewers += 1
        if self.num_viewers == 1:
            self._recorder, self._made = self._new_recorder(), None
            self._pool.add_observer(self._recorder)
        return True

    def leave(self) -> None:
        """Remove a viewer."""
        self.num_viewers -= 1
        if not self.num_viewers:
            self._pool.remove_observer(self._recorder)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the server-sent events for a viewer who has entered, until the server stops."""
        yield _event("hello", self.hello())
        sent, sent_at = b"", self._clock()
        while not self._is_over():
            picture = self._picture()
            if picture != sent:
                sent, sent_at = picture, self._clock()
                yield picture
            elif self._clock() - sent_at > _KEEP_ALIVE_S:
                sent_at = self._clock()
                yield b": keep-alive\n\n"
            await asyncio.sleep(INTERVAL_S)

    def hello(self) -> dict[str, Any]:
        """The model and its pool, which do not change."""
        plan, keys = self._plan, self._pool.keys
        return {
            "model": self._model,
            "experts_per_layer": list(keys.widths),
            "keys_per_layer": keys.per_layer,
            "top_k": list(plan.top_k),
            "expert_bytes": plan.expert_bytes,
            "num_slots": plan.num_slots,
            "total_slots": plan.total_slots,
            "memory_bytes": plan.memory_bytes,
            "predictor": plan.predictor if plan.staging_slots else "none",
            "policy": self._policy(),
            "has_chat": self._has_chat,
            "examples": list(_EXAMPLES.get(self._model.rstrip("/").rsplit("/", 1)[-1], ())),
        }

    def _picture(self) -> bytes:
        """Format the current event: the same bytes while nothing happens."""
        recorder, now = self._recorder, self._clock()
        step, current = recorder.last, recorder.current
        if current is not None and current is not step and now - current.began_s > _LONG_STEP_S:
            step = current
        newest = current or step
        is_busy = self._is_running() or (
            newest is not None and now - max(newest.began_s, newest.ended_s) < max(1.0, _length_s(newest) * 3)
        )
        # Layers are counted as they begin; the last one's end is the step's.
        state = (-1, is_busy, -1, 0.0) if step is None else (step.number, is_busy, len(step.layers), step.ended_s)
        if self._made is None or self._made[0] != state:
            self._made = state, _event("step", self.snapshot(step, is_busy=is_busy))
        return self._made[1]

    def snapshot(self, step: StepRecord | None, *, is_busy: bool) -> dict[str, Any]:
        """Build one snapshot: pool, the step's layers, guesses and reads, all counts so far, and whether it is_busy.

        Times are milliseconds from the step's begin.
        """
        pool, recorder, prefetcher = self._pool, self._recorder, self._prefetcher
        stats, answers = pool.stats, pool.stats.answers
        picture: dict[str, Any] = {
            "is_busy": is_busy,
            "pool": self._pool_codes(),
            "counts": {
                # Of all tokens of answers: those of verify steps too.
                "decode": {name: getattr(answers, name) for name in _COUNTS},
                "prefill_tokens": stats.prefill.tokens,
                "timed_steps": recorder.timed_steps,
                "timed_s": round(recorder.timed_s, 6),
            },
            "prefetch_share": prefetcher.share if prefetcher.predictor is not None else 0.0,
            "policy": self._policy(),
        }
        if step is not None:
            picture["step"] = _step(step, pool.keys.per_layer, pool.residency.state)
        return picture

    def _pool_codes(self) -> str:
        """Two bits per key, four keys a byte, the first one lowest; base64."""
        residency = self._pool.residency
        codes = bytearray(map(_CODE_OF.__getitem__, map(residency.state, range(residency.num_keys))))
        # `list` copies a dict's keys atomically: the engine's thread cannot interrupt it.
        for key in list(residency.prefetched_ready):
            if codes[key] == _RESIDENT:
                codes[key] = _PREFETCHED
        codes += bytes(-len(codes) % 4)
        # Shifted codes stay within their bytes, so all bytes are shifted at once.
        packed = sum(int.from_bytes(codes[place::4], "little") << 2 * place for place in range(4))
        return base64.b64encode(packed.to_bytes(len(codes) // 4, "little")).decode()


def _length_s(step: StepRecord) -> float:
    return max(step.ended_s - step.began_s, 0.0)


def _step(step: StepRecord, keys_per_layer: int, state: Callable[[int], int]) -> dict[str, Any]:
    def ms(clock_s: float) -> float:
        return round((clock_s - step.began_s) * 1e3, 3)

    def experts(keys: Iterable[int], but: Collection[int] = ()) -> list[int]:
        return [key % keys_per_layer for key in keys if key not in but]

    def spans(times: Sequence[tuple[float, float]]) -> list[list[float]]:
        return [[ms(began), ms(ended)] for began, ended in times]

    digested = digest(step, state)
    layers = [
        {
            "layer": one.layer, "t": ms(one.began_s), "end": ms(one.ended_s), "waits": spans(one.waits),
            # "hits" without those that a prefetch brought in time.
            "hits": experts(one.hits, but=in_time), "in_time": experts(in_time), "late_hits": experts(one.late_hits),
            "misses": experts(one.misses), "substituted": experts(one.substituted),
        }
        for one, in_time in zip(digested.layers, digested.in_time, strict=True)
    ]  # fmt: skip
    return {
        "number": step.number,
        "phase": step.phase,
        "rows": step.rows,
        "positions": step.positions,
        "end": ms(step.ended_s) if step.ended_s else None,
        "layers": layers,
        "guesses": {str(layer): list(guessed) for layer, guessed in list(step.guesses)},
        "reads": [
            [*divmod(key, keys_per_layer), why, ms(began), ms(ended)] for key, why, began, ended in digested.reads
        ],
        "wasted": [list(divmod(key, keys_per_layer)) for key in digested.wasted],
    }


def _event(kind: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {_as_json(data)}\n\n".encode()
