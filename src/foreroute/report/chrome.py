"""Convert a .jsonl trace to a Chrome trace, for https://ui.perfetto.dev."""

import json
from pathlib import Path

from foreroute.errors import TraceError
from foreroute.report.older import modernised
from foreroute.trace import open_trace


def write_chrome(source: Path, path: Path) -> None:
    """Convert `source`, which was read as a trace before; an incomplete last line is left out.

    Raises:
        TraceError: `path` exists and is not a trace, or cannot be written.
    """
    trace = open_trace(path)
    try:
        with source.open(encoding="utf-8") as lines:
            header = json.loads(next(lines))
            is_old = header["version"] == 1
            fields = modernised(header) if is_old else header
            fields.pop("event")
            trace.begin(**fields)
            for line in lines:
                if line.endswith("\n"):
                    event = modernised(json.loads(line)) if is_old else json.loads(line)
                    trace.emit(event.pop("event"), **event)
        trace.close()
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror}.") from error
