"""Draw the pictures of the docs: `python docs/pictures/draw.py`. On a light ground, for both schemes."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
GROUND, INK, FAINT = "#fbfaf7", "#22302f", "#5f6c6a"
READ, COMPUTE, GUESS, WAIT = "#e2703a", "#1f8a78", "#6a5acd", "#e9e5db"
WIDTH_INCHES, DPI = 9.0, 180


def canvas(height_inches: float, width: float, height: float) -> tuple[Any, Any]:
    """A figure whose axes have units of their own, with no frame."""
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, height_inches), facecolor=GROUND)
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01)
    return figure, axes


def box(axes: Any, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """A rounded rectangle from its lower left corner."""
    style = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.2, **style}
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", **style))


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str, **style: Any) -> None:
    """An arrow; dashed for what was guessed."""
    style = {"linewidth": 2.2, "mutation_scale": 16, "arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **style}
    axes.add_patch(FancyArrowPatch(start, end, color=color, **style))


def say(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text around a point."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, "fontsize": 11, **style})


def data_path() -> Any:
    """Disk -> slots -> compute, and the guess that goes back."""
    figure, axes = canvas(3.9, 18, 7.8)
    for x, width, title, note in (
        (0.3, 4.2, "disk", "every expert\nof every layer"),
        (6.6, 4.6, "memory: slots", "as many experts\nas your budget holds"),
        (13.3, 4.4, "compute", "the router decides"),
    ):
        box(axes, x, 1.3, width, 6.1)
        say(axes, x + width / 2, 6.95, title, fontsize=13, fontweight="bold")
        say(axes, x + width / 2, 1.87, note, color=FAINT, fontsize=10)
    for row in range(5):
        for column in range(7):
            box(axes, 0.75 + 0.49 * column, 2.75 + 0.72 * row, 0.38, 0.55, facecolor=WAIT, linewidth=0.6)
    colours = {(3, 0): COMPUTE, (3, 1): COMPUTE, (3, 3): COMPUTE, (1, 1): READ, (1, 2): READ}
    for row in range(4):
        for column in range(4):
            colour = colours.get((row, column), WAIT)
            box(axes, 7.1 + 0.92 * column, 2.7 + 0.92 * row, 0.75, 0.7, facecolor=colour, linewidth=0.6)
    box(axes, 13.7, 4.75, 3.6, 1.5, facecolor=COMPUTE, edgecolor=COMPUTE)
    say(axes, 15.5, 5.5, "layer l computes", color="white", fontsize=12, fontweight="bold")
    box(axes, 13.7, 2.6, 3.6, 1.5, facecolor="white", edgecolor=READ, linestyle="--")
    say(axes, 15.5, 3.35, "layer l+1\ncomes next", color=READ, fontsize=11)
    arrow(axes, (4.55, 5.75), (6.55, 5.75), INK)
    say(axes, 5.55, 6.5, "misses\nof layer l", fontsize=9.5)
    arrow(axes, (4.55, 3.95), (6.55, 3.95), READ, linestyle="--")
    say(axes, 5.55, 3.1, "prefetches\nfor layer l+1", color=READ, fontsize=9.5)
    arrow(axes, (11.25, 5.5), (13.65, 5.5), COMPUTE)
    say(axes, 12.42, 5.95, "hits first", color=COMPUTE, fontsize=9.5)
    axes.plot([15.5, 15.5, 5.55, 5.55], [1.25, 0.65, 0.65, 1.55], color=GUESS, linewidth=2, linestyle="--")
    arrow(axes, (5.55, 1.5), (5.55, 2.5), GUESS, linewidth=2)
    say(
        axes, 10.5, 0.28, "while layer l computes: a guess which experts layer l+1 will use", color=GUESS, fontsize=10.5
    )
    return figure


def lane(axes: Any, y: float, pieces: list[tuple[float, float, str, str]]) -> None:
    """One row of a timeline: pieces of (start, width, colour, text)."""
    for start, width, colour, text in pieces:
        edge = FAINT if colour == WAIT else colour
        box(axes, start, y, width - 0.06, 0.8, facecolor=colour, edgecolor=edge, linewidth=0.8)
        say(axes, start + width / 2, y + 0.4, text, fontsize=9, color=FAINT if colour == WAIT else "white")


def timeline() -> Any:
    """The same three layers, on demand and with prefetch."""
    figure, axes = canvas(3.5, 19, 7.4)
    say(axes, 0.2, 6.9, "on demand", ha="left", fontweight="bold", fontsize=12)
    say(axes, 0.2, 3.15, "with prefetch", ha="left", fontweight="bold", fontsize=12)
    compute, read = 2.2, 2.8
    at, on_compute, on_disk = 2.6, [], []
    for layer in range(3):
        on_disk.append((at, read, READ, f"read {layer}"))
        on_compute.append((at, read, WAIT, "waits"))
        at += read
        on_compute.append((at, compute, COMPUTE, f"layer {layer}"))
        at += compute
    rows = [("compute", 5.4, on_compute), ("disk", 4.4, on_disk)]
    start, end_on_demand = 2.6, at
    ahead = [
        (start, read, READ, "read 0"),
        (start + read, read, READ, "read 1"),
        (start + 2 * read, read, READ, "read 2"),
    ]
    computed, at = [(start, read, WAIT, "waits")], start + read
    for layer in range(3):
        computed.append((at, compute, COMPUTE, f"layer {layer}"))
        at += compute
        gap = start + (layer + 2) * read - at
        if layer < 2:
            computed.append((at, gap, WAIT, ""))
            at += gap
    rows += [("compute", 1.65, computed), ("disk", 0.65, ahead)]
    for name, y, pieces in rows:
        say(axes, 2.3, y + 0.4, name, ha="right", fontsize=10)
        lane(axes, y, pieces)
    for x, top in ((end_on_demand, 6.5), (at, 2.75)):
        axes.plot([x, x], [top - 2.3, top], color=INK, linewidth=1.2, linestyle=":")
    arrow(axes, (end_on_demand - 0.08, 2.05), (at + 0.08, 2.05), INK, linewidth=1.4)
    say(axes, (at + end_on_demand) / 2, 1.45, "gained", fontsize=10)
    return figure


def guess() -> Any:
    """The residual stream, what a layer adds to it, and the next router that is run early."""
    figure, axes = canvas(3.7, 18, 7.4)
    arrow(axes, (0.4, 2.3), (17.6, 2.3), INK, linewidth=5, mutation_scale=24)
    say(axes, 0.4, 1.65, "the residual stream", ha="left", fontsize=10.5)
    for x, name in ((1.6, "layer l"), (10.2, "layer l+1")):
        say(axes, x + 2.85, 6.95, name, fontweight="bold", fontsize=12)
        for left, label, colour in ((x, "attention", FAINT), (x + 3.2, "experts", COMPUTE)):
            box(axes, left, 4.5, 2.5, 1.5, facecolor=colour, edgecolor=colour)
            say(axes, left + 1.25, 5.25, label, color="white", fontsize=11)
            arrow(axes, (left + 0.4, 2.5), (left + 0.4, 4.45), colour, linewidth=1.6)
            arrow(axes, (left + 2.1, 4.45), (left + 2.1, 2.5), colour, linewidth=1.6)
            say(axes, left + 2.42, 3.4, "+", fontsize=15, color=colour)
    axes.plot([4.62], [2.3], marker="o", markersize=13, color=GUESS, zorder=5)
    axes.plot([13.22], [2.3], marker="o", markersize=13, color=INK, zorder=5)
    axes.plot([4.62, 4.62, 9.35], [2.1, 0.75, 0.75], color=GUESS, linewidth=2.2, linestyle="--")
    arrow(axes, (9.2, 0.75), (9.75, 0.75), GUESS)
    box(axes, 9.8, 0.2, 3.0, 1.1, facecolor=GUESS, edgecolor=GUESS)
    say(axes, 11.3, 0.75, "router of l+1", color="white", fontsize=10.5)
    say(axes, 7.0, 1.2, "early: nearly the same stream", color=GUESS, fontsize=10)
    arrow(axes, (12.85, 0.75), (14.0, 0.75), GUESS)
    say(axes, 14.15, 0.75, "a guess:\nread these now", ha="left", color=GUESS, fontsize=10)
    say(axes, 13.75, 1.75, "here it decides", ha="left", fontsize=10)
    return figure


PICTURES = {"data-path": data_path, "timeline": timeline, "guess": guess}


def main() -> None:
    """Write every picture beside this file."""
    plt.rcParams["font.family"] = "DejaVu Sans"
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(HERE / f"{name}.png", dpi=DPI, facecolor=GROUND, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
