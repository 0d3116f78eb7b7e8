"""Write a run's events to a file: `--trace FILE`. The events and their fields: docs/trace.md.

Costs nothing without `--trace`. FILE.jsonl has one event a line, for `foreroute replay`; FILE.json is a Chrome trace,
for Perfetto.
"""

import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from foreroute.errors import TraceError
from foreroute.system.limits import after_fork
from foreroute.system.locks import hold

# 2: `late_hits`, `substituted` and loads that are "deferred" were `late`, `stood_in` and "fill" before.
VERSION = 2
_JSON_LINES, _CHROME = ".jsonl", ".json"
# The first bytes of a file of either kind: only such a file may be overwritten.
_FIRST_BYTES = (b'{"event":"header"', b'[{"name":"foreroute"')


class Trace:
    """Writes the events of one loaded model to `sink`, timed by the engine's clock in seconds since the trace began."""

    def __init__(self, sink: "JsonLines") -> None:
        self._sink = sink
        self._began_s = time.perf_counter()
        self._failure: OSError | None = None

    def now(self) -> float:
        """Seconds since the trace began."""
        return self.at(time.perf_counter())

    def at(self, clock_s: float) -> float:
        """Convert a reading of the clock to seconds since the trace began."""
        return round(clock_s - self._began_s, 6)

    def begin(self, **fields: Any) -> None:
        """Write the header, truncating the file only now."""
        self._sink.begin()
        self._began_s = time.perf_counter()
        self.emit("header", **fields)

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; after a failed write do nothing, and `close` raises."""
        if self._failure is None:
            try:
                self._sink.write({"event": event, **fields})
            except OSError as error:
                self._failure = error

    def close(self) -> None:
        """Finish the trace.

        Raises:
            TraceError: not all events could be written; the file is truncated.
        """
        try:
            self._sink.close()
        except OSError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            why = os.strerror(self._failure.errno or 0)
            raise TraceError(f"The trace is cut off: {why}. The run itself is not touched by it.") from self._failure


def open_trace(path: str | Path) -> Trace:
    """Open a trace at `path`: .jsonl for `foreroute replay`, .json for Perfetto. Replaces an older trace.

    Raises:
        TraceError: another suffix, an existing file that is not a trace, or one that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (_JSON_LINES, _CHROME):
        raise TraceError(f"--trace {path}: end the name in .jsonl (for foreroute replay) or in .json (for Perfetto).")
    try:
        if path.exists() and path.stat().st_size:
            with path.open("rb") as older:
                if not older.read(64).startswith(_FIRST_BYTES):
                    raise TraceError(f"--trace {path}: that file exists and is not a trace. Choose another name.")
        # A path may hold bytes that are no text: written as an escape, which JSON has too.
        file = path.open("a", encoding="utf-8", errors="backslashreplace")
        release = hold(file.fileno(), path)
    except BlockingIOError:
        raise TraceError(f"--trace {path}: another model is writing it. Choose another name.") from None
    except OSError as error:
        raise TraceError(f"--trace {path} cannot be written: {os.strerror(error.errno or 0)}.") from error
    _OPENED.add(file)
    return Trace(JsonLines(file, release) if path.suffix == _JSON_LINES else ChromeTrace(file, release))


# A forked process has the file too, the lock on it, and a copy of what is not written yet: all that goes nowhere.
_OPENED: "weakref.WeakSet[TextIO]" = weakref.WeakSet()


def _after_fork() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in list(_OPENED):
        if not file.closed:
            os.dup2(nowhere, file.fileno())
    os.close(nowhere)


after_fork(_after_fork)


def as_line(event: dict[str, Any]) -> str:
    """Format an event as JSON without spaces."""
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False)


class JsonLines:
    """Writes the events of docs/trace.md to `file`, one a line. release: called after the file is closed."""

    def __init__(self, file: TextIO, release: Callable[[], None] = lambda: None) -> None:
        self._file = file
        self._release = release

    def begin(self) -> None:
        """Prepare for the first event."""
        self._file.truncate(0)

    def write(self, event: dict[str, Any]) -> None:
        """Write one event."""
        self._file.write(as_line(event) + "\n")

    def close(self) -> None:
        """Finish the file."""
        try:
            self._file.close()
        finally:
            self._release()


class ChromeTrace(JsonLines):
    """Writes them as one JSON array of Chrome's trace events."""

    _separator = "["

    def write(self, event: dict[str, Any]) -> None:
        """Write one event."""
        for converted in chrome_events(event):
            self._file.write(self._separator + as_line(converted))
            self._separator = ",\n"

    def close(self) -> None:
        """Finish the array, and the file."""
        if not self._file.closed:
            self._file.write("]\n")
            super().close()


# Rows of the timeline, from the top.
_STEPS, _LAYERS, _STALLS, _READS, _POOL = range(1, 6)
_ROWS = {
    _STEPS: "steps", _LAYERS: "experts' layers", _STALLS: "stalls: compute waits", _READS: "reads", _POOL: "pool",
}  # fmt: skip


def chrome_events(event: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Convert one event of docs/trace.md to Chrome's: spans for layers, stalls and reads, marks for the rest."""
    kind = event["event"]
    if kind == "header":
        yield {"name": "foreroute", "ph": "i", "s": "g", "ts": 0, "pid": 1, "tid": _STEPS, "args": event}
        yield {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": f"foreroute: {event.get('model', '')}"}}
        for row, name in _ROWS.items():
            yield {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}}
            yield {"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": row, "args": {"sort_index": row}}
    elif kind == "step":
        yield _mark(event, f"{event['phase']} {event['positions']}", _STEPS)
    elif kind == "layer":
        yield _span(event, f"layer {event['layer']}", _LAYERS, event["t"], event["end"])
    elif kind == "stall":
        yield _span(event, f"wait in layer {event['layer']}", _STALLS, event["t"], event["end"])
    elif kind == "load":
        name = f"{event['why']}: layer {event['layer']} expert {event['expert']}"
        yield _span(event, name, _READS, event["begun"], event["t"])
    elif kind in ("guess", "cancel", "evict"):
        yield _mark(event, f"{kind} layer {event['layer']} {event.get('expert', '')}".rstrip(), _POOL)
    elif kind == "governor":
        yield {"name": "prefetch share", "ph": "C", "ts": _us(event["t"]), "pid": 1, "args": {"share": event["share"]}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _span(event: dict[str, Any], name: str, row: int, begun: float, ended: float) -> dict[str, Any]:
    duration = _us(max(ended - begun, 0.0))
    return {"name": name, "ph": "X", "ts": _us(begun), "dur": duration, "pid": 1, "tid": row, "args": event}


def _mark(event: dict[str, Any], name: str, row: int) -> dict[str, Any]:
    return {"name": name, "ph": "i", "s": "t", "ts": _us(event["t"]), "pid": 1, "tid": row, "args": event}
