"""Modules of Python that not every system has."""

import importlib
from typing import Any


def optional(name: str) -> Any:
    """The module `name`; None where this system has none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
