"""Plot the accuracy lost under each policy against the bytes moved and the stalls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreroute.evals.policies import mean_accuracy
from foreroute.evals.pricing import pareto
from foreroute.prepare.plot import check
from foreroute.whole_files import save_figure

__all__ = ["check", "draw"]

_COSTS = (("bytes_per_token", 1e-6, "MB moved per token"), ("stalled_layers", 100.0, "MoE layers that waited (%)"))
_LINEAR_NATS = 0.002
_MARKERS = "os^Dv<>P"


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Plot `rows` to `path` (its suffix chooses the format) under `title`: one row of panels per kind of loss.

    Raises:
        ForerouteError: it cannot be written.
    """
    from matplotlib.figure import Figure

    losses = [loss for loss in (_nats(rows), _points(rows)) if loss is not None]
    figure = Figure(figsize=(11, 4.2 * len(losses)), layout="constrained")
    axes = figure.subplots(len(losses), len(_COSTS), squeeze=False)
    for line, (label, values) in zip(axes, losses, strict=True):
        for panel, (cost, scale, cost_label) in zip(line, _COSTS, strict=True):
            _panel(panel, rows, values, cost, scale)
            panel.set(xlabel=cost_label, ylabel=label)
            if "nats" in label:
                # A baseline may lose a hundred times what others lose.
                panel.set_yscale("symlog", linthresh=_LINEAR_NATS)
                panel.set_ylim(min(0.0, *values) - _LINEAR_NATS / 4, 2 * max(_LINEAR_NATS, *values))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def _nats(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]] | None:
    if not all("delta_nats" in row for row in rows):
        return None
    return "loss beside exact (nats per token)", [row["delta_nats"] for row in rows]


def _points(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]] | None:
    """Accuracy relative to exact decoding at the same memory, or at any."""
    exact = {row["memory"]: mean_accuracy(row) for row in rows if row["policy"] == "exact"}
    means = [mean_accuracy(row) for row in rows]
    if not exact or None in exact.values() or None in means:
        return None
    any_exact = next(iter(exact.values()))
    return "task accuracy lost (points)", [
        100 * ((exact.get(row["memory"], any_exact) or 0.0) - (mean or 0.0))
        for row, mean in zip(rows, means, strict=True)
    ]


def _panel(panel: Any, rows: Sequence[Mapping[str, Any]], losses: Sequence[float], cost: str, scale: float) -> None:
    memories = list(dict.fromkeys(row["memory"] for row in rows))
    of_row = [f"{row['policy']} {row['tau']:g}" if row["tau"] else row["policy"] for row in rows]
    names = list(dict.fromkeys(of_row))
    seen: set[str] = set()
    for row, name, loss in zip(rows, of_row, losses, strict=True):
        label = f"{name}, memory {row['memory']}"
        panel.scatter(
            row[cost] * scale, loss, s=55, color=f"C{names.index(name)}", zorder=3,
            marker=_MARKERS[memories.index(row["memory"]) % len(_MARKERS)], label=None if label in seen else label,
        )  # fmt: skip
        seen.add(label)
    front = pareto([(row[cost] * scale, loss) for row, loss in zip(rows, losses, strict=True)])
    panel.step(
        *zip(*front, strict=True),
        where="post", color="grey", linewidth=1, linestyle="--", label="nothing is better in both",
    )  # fmt: skip
    panel.grid(alpha=0.3)
    panel.axhline(0, color="black", linewidth=0.5)
