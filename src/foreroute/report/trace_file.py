"""Read a trace file and refuse anything else: each error names the line and says what to do."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from foreroute.errors import TraceError
from foreroute.report.events import (
    Cancelled,
    Evicted,
    Governed,
    GuessMade,
    Header,
    LayerDone,
    LoadDone,
    RecordedStep,
    Recording,
    Stall,
    TraceEvent,
)
from foreroute.report.older import READ_VERSIONS, modernised
from foreroute.whole_files import check_no_pointer

_PHASES = ("prefill", "decode", "verify")
_HOW = "`foreroute generate MODEL --trace FILE.jsonl` makes one."


def read_recording(
    path: Path, *, is_partial: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Recording:
    """Read a .jsonl trace from `path`.

    Args:
        is_partial: accept a file that was cut off, up to there.
        progress: called with (bytes read, all bytes).
    Raises:
        TraceError: not a trace, of an unknown version, damaged, or cut off.
    """
    reader = _Reader(path)
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            done = 0
            for number, line in enumerate(file, 1):
                reader.take(number, line)
                done += len(line)
                if number % 1000 == 0:
                    progress(done, total)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}.") from error
    progress(total, total)
    return reader.finish(is_partial)


class _Reader:
    """Takes the lines of one file in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header: Header | None = None
        self._version = 0
        self._steps: list[RecordedStep] = []
        self._events: list[TraceEvent] = []
        self._stats: dict[str, Any] | None = None
        self._number = 0
        self._half: int | None = None  # a line that is not JSON: allowed only as the last one of a partial file

    def take(self, number: int, line: bytes) -> None:
        """Take one line; its number counts from 1."""
        self._number = number
        if self._half is not None:
            raise self._error(self._half, "is damaged: it is not a JSON object, and others follow it")
        if self._stats is not None:
            raise self._error(number, "comes after the trace's end: this file is more than one trace")
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if self._header is None:
            self._header = self._read_header(fields, line)
        elif not isinstance(fields, dict) or not line.endswith(b"\n"):
            self._half = number
        else:
            self._read_event(modernised(fields) if self._version == 1 else fields)

    def finish(self, is_partial: bool) -> Recording:
        """Check that the trace is complete, and return it."""
        if self._header is None:
            raise TraceError(f"{self._path} is empty: no trace. {_HOW}")
        num_layers = self._header.num_layers
        whole = [step for step in self._steps if len(step.layers) == num_layers]
        if self._stats is None and not is_partial:
            where = f"line {self._half} is half" if self._half else f"there is no end after line {self._number}"
            raise TraceError(
                f"{self._path} was cut off: {where}. Record it again, or add --partial to use its {len(whole)} whole "
                "steps."
            )
        return Recording(
            str(self._path),
            self._header,
            tuple(whole),
            len(self._steps) - len(whole),
            tuple(self._events),
            self._stats or {},
            self._stats is not None,
        )

    def _read_header(self, fields: Any, line: bytes) -> Header:
        if not isinstance(fields, dict) or fields.get("event") != "header":
            check_no_pointer(self._path, TraceError)
            is_chrome = line.lstrip()[:1] == b"[" or b"traceEvents" in line
            hint = "It looks like a Chrome trace: record FILE.jsonl for replay." if is_chrome else _HOW
            raise TraceError(f"{self._path} is not a trace: its first line is not a header. {hint}")
        self._version = version = self._get(fields, "version", int)
        if version not in READ_VERSIONS:
            known = " and ".join(map(str, READ_VERSIONS))
            raise self._error(1, f"says version {version}; this foreroute reads versions {known}. Record it again")
        # Traces from before slots had several lengths.
        num_layers = len(fields["expert_bytes"]) if isinstance(fields.get("expert_bytes"), list) else 0
        fields = {
            "layer_slot_bytes": [fields.get("slot_bytes")] * num_layers,
            "class_slots": [fields.get("num_slots")],
            **fields,
        }
        asked: dict[str, Any] = {}
        for name, kind in get_type_hints(Header).items():
            asked[name] = self._get(fields, name, kind) if kind in (str, int) else self._ints(fields, name)
        header = Header(**asked)
        lists = (header.experts_per_layer, header.top_k, header.expert_bytes, header.layer_slot_bytes)
        if {len(one) for one in lists} != {header.num_layers} or not header.num_layers:
            raise self._error(
                1, "has lists of different lengths: experts_per_layer, top_k, expert_bytes and layer_slot_bytes"
            )
        if min(header.top_k + header.expert_bytes) < 1 or any(
            k > experts for k, experts in zip(header.top_k, header.experts_per_layer, strict=True)
        ):
            raise self._error(1, "describes no model: a layer routes to no expert, or to more than it has")
        if not header.describes_a_pool:
            raise self._error(1, "describes no pool: it has no slot, or an expert does not fit one")
        return header

    def _read_event(self, fields: dict[str, Any]) -> None:
        kind = fields.get("event")
        if kind == "header":
            raise self._error(self._number, "is a second header: this file is more than one trace")
        if kind == "end":
            self._stats = self._get(fields, "stats", dict)
            return
        read = self._READERS.get(kind) if isinstance(kind, str) else None
        if read is not None:
            self._events.append(read(self, fields))

    def _step(self, fields: dict[str, Any]) -> RecordedStep:
        phase = self._get(fields, "phase", str)
        if phase not in _PHASES:
            raise self._error(self._number, f"is a step of phase {phase!r}, which is not known")
        step = RecordedStep(
            self._time(fields, "t"),
            phase,
            self._get(fields, "rows", int),
            self._get(fields, "positions", int),
            self._get(fields, "is_start", bool),
        )
        self._steps.append(step)
        return step

    def _layer_done(self, fields: dict[str, Any]) -> LayerDone:
        layer = self._layer(fields)
        lists = [self._experts(fields, name, layer) for name in ("hits", "late_hits", "misses", "substituted")]
        done = LayerDone(self._time(fields, "t"), self._time(fields, "end"), layer, *lists)
        if len(set(done.demanded)) != len(done.demanded):
            raise self._error(self._number, "demands an expert twice")
        step = self._current()
        if layer != len(step.layers):
            raise self._error(self._number, f"is of layer {layer} where layer {len(step.layers)} was due")
        step.layers.append(done)
        return done

    def _stall(self, fields: dict[str, Any]) -> Stall:
        stall = Stall(self._time(fields, "t"), self._time(fields, "end"), self._layer(fields))
        if self._steps:
            self._steps[-1].stalls.append(stall)
        return stall

    def _guess(self, fields: dict[str, Any]) -> GuessMade:
        layer = self._layer(fields)
        guess = GuessMade(self._time(fields, "t"), layer, self._experts(fields, "experts", layer))
        self._current().guesses.append(guess)
        return guess

    def _load(self, fields: dict[str, Any]) -> LoadDone:
        error = fields.get("error")
        times = [self._time(fields, name) for name in ("asked", "begun", "t")]
        why = self._get(fields, "why", str)
        nbytes = self._get(fields, "bytes", int)
        layer, expert = self._expert(fields)
        asked, begun, ended = times
        return LoadDone(layer, expert, why, asked, begun, ended, nbytes, None if error is None else str(error))

    def _cancelled(self, fields: dict[str, Any]) -> Cancelled:
        return Cancelled(self._time(fields, "t"), *self._expert(fields))

    def _evicted(self, fields: dict[str, Any]) -> Evicted:
        return Evicted(self._time(fields, "t"), *self._expert(fields))

    def _governed(self, fields: dict[str, Any]) -> Governed:
        return Governed(self._time(fields, "t"), self._get(fields, "share", float), self._get(fields, "why", str))

    _READERS: ClassVar[dict[str, Callable[["_Reader", dict[str, Any]], TraceEvent]]] = {
        "step": _step,
        "layer": _layer_done,
        "stall": _stall,
        "guess": _guess,
        "load": _load,
        "cancel": _cancelled,
        "evict": _evicted,
        "governor": _governed,
    }

    def _current(self) -> RecordedStep:
        if not self._steps:
            raise self._error(self._number, "comes before the first step")
        return self._steps[-1]

    # Fields.

    def _get(self, fields: dict[str, Any], name: str, kind: type) -> Any:
        value = fields.get(name)
        # In Python, JSON's true is an int.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._error(self._number, f"lacks {name!r}, or has something else there ({value!r})")
        return value

    def _time(self, fields: dict[str, Any], name: str) -> float:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(self._number, f"lacks the time {name!r}, or has something else there ({value!r})")
        return float(value)

    def _ints(self, fields: dict[str, Any], name: str) -> tuple[int, ...]:
        values = self._get(fields, name, list)
        if not all(type(value) is int for value in values):
            raise self._error(self._number, f"has something else than whole numbers in {name!r}")
        return tuple(values)

    def _layer(self, fields: dict[str, Any]) -> int:
        assert self._header is not None, "the header is the first line"
        layer: int = self._get(fields, "layer", int)
        if not 0 <= layer < self._header.num_layers:
            raise self._error(self._number, f"names layer {layer}; there are {self._header.num_layers}")
        return layer

    def _expert(self, fields: dict[str, Any]) -> tuple[int, int]:
        layer = self._layer(fields)
        expert = self._get(fields, "expert", int)
        self._check_experts((expert,), layer)
        return layer, expert

    def _experts(self, fields: dict[str, Any], name: str, layer: int) -> tuple[int, ...]:
        experts = self._ints(fields, name)
        self._check_experts(experts, layer)
        return experts

    def _check_experts(self, experts: Iterable[int], layer: int) -> None:
        assert self._header is not None, "the header is the first line"
        width = self._header.experts_per_layer[layer]
        for expert in experts:
            if not 0 <= expert < width:
                raise self._error(self._number, f"names expert {expert} of layer {layer}, which has {width}")

    def _error(self, number: int, what: str) -> TraceError:
        return TraceError(f"{self._path}: line {number} {what}.")
