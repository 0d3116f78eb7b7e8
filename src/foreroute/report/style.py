"""Colours, names and files of the plots: readable with any colour vision, dark on light."""

import importlib.util
from typing import Any

from foreroute.errors import ForerouteError

# Okabe and Ito's palette, for all kinds of colour vision.
BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
INK, GREY, PALE = "#222222", "#8A8A8A", "#E4E4E4"

# policy -> colour, marker, description in plain words
POLICIES = {
    "lru": (SKY, "o", "LRU: the longest unused goes"),
    "lfu": (BLUE, "s", "LFU: the least used goes, older uses count less"),
    "random": (GREY, "x", "random: evicts any expert"),
    "static": (ORANGE, "^", "static: the most used stay, chosen with hindsight"),
    "belady": (GREEN, "D", "Belady: knows the future, nothing reads less"),
}


def check_matplotlib() -> None:
    """Raise ForerouteError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ForerouteError("Plots need matplotlib: pip install matplotlib, or leave --out out.")


def new_figure(width: float, height: float) -> Any:
    """Make a figure of width x height inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def tidy(axes: Any) -> None:
    """Remove the frame except for the two axes, and add a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
