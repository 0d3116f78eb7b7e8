"""A finding of `foreroute doctor`: how one thing on this machine is, and what to do about it."""

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """How one thing is. status: OK, WARNING or PROBLEM; found: what it is; advice: what to do, "" where nothing is."""

    name: str
    status: str
    found: str
    advice: str = ""
