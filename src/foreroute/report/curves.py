"""Two plots: what memory gains under each eviction, and which experts each layer used, found and predicted."""

from pathlib import Path
from typing import Any

from foreroute.report.replay import Report
from foreroute.report.style import BLUE, GREY, INK, ORANGE, POLICIES, RED, new_figure, tidy
from foreroute.units import format_speed
from foreroute.whole_files import save_figure

# Up to this many layers, each row shows its layer's number.
_MOST_LABELS = 16


def draw_residency(report: Report, path: Path) -> None:
    """Plot from `report` to `path` MB and time per token over the share of resident experts, one line per policy."""
    figure = new_figure(11, 4.8)
    read, time = figure.subplots(1, 2)
    shares = [100 * budget.share for budget in report.budgets]
    for name, (colour, marker, label) in POLICIES.items():
        outcomes = [budget.outcomes[name] for budget in report.budgets]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}
        read.plot(shares, [outcome.bytes_per_token / 1e6 for outcome in outcomes], label=label, **style)
        spans = [report.timing.tpot_ms(outcome) for outcome in outcomes]
        if None not in spans:
            time.plot(shares, [span[1] for span in spans if span], **style)
            time.plot(shares, [span[0] for span in spans if span], color=colour, linewidth=1, linestyle=":")
    at = 100 * report.recorded_budget.share
    star = {"color": RED, "marker": "*", "markersize": 15, "linestyle": "none", "zorder": 5}
    read.plot([at], [report.recorded.bytes_per_token / 1e6], label="the recorded run, with its prefetches", **star)
    time.plot([at], [report.timing.step_ms], **star)
    read.set(title="What is read per token", xlabel="experts in memory (%)", ylabel="MB per token")
    time.set(title="What a token takes", xlabel="experts in memory (%)", ylabel="ms per token (TPOT)")
    for axes in (read, time):
        tidy(axes)
        axes.set_ylim(bottom=0)
        axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    _explain_time(time, report)
    figure.legend(*read.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def _explain_time(axes: Any, report: Report) -> None:
    if report.timing.bytes_per_s is None:
        axes.text(0.5, 0.5, "nothing was read in the recorded run:\ngive --bandwidth", ha="center", va="center",
                  transform=axes.transAxes, color=INK)  # fmt: skip
        return
    axes.axhline(report.timing.compute_ms, color=GREY, linewidth=1)
    axes.annotate("compute alone", (0.99, report.timing.compute_ms), xycoords=("axes fraction", "data"),
                  xytext=(0, -4), textcoords="offset points", ha="right", va="top", color=INK, fontsize=8)  # fmt: skip
    rate = format_speed(report.timing.bytes_per_s)
    note = f"at {rate}\nsolid: no read overlaps compute\ndotted: reads overlap compute fully"
    axes.text(0.99, 0.98, note, ha="right", va="top", transform=axes.transAxes, color=INK, fontsize=8)


def draw_layers(report: Report, path: Path) -> None:
    """Plot from `report` to `path` uses and hits of every expert, and the recall of the guesses, layer by layer."""
    import numpy as np

    layers = report.layers
    widest = max(len(layer.uses) for layer in layers)
    uses, hits = np.full((len(layers), widest), np.nan), np.full((len(layers), widest), np.nan)
    for layer in layers:
        # Most used first: the shape of a row means something, an expert's number does not.
        order = sorted(range(len(layer.uses)), key=lambda expert: -layer.uses[expert])
        for column, expert in enumerate(order):
            uses[layer.layer, column] = 100 * layer.uses[expert] / layer.steps
            if layer.uses[expert]:
                hits[layer.layer, column] = 100 * layer.hits[expert] / layer.uses[expert]
    figure = new_figure(12, min(max(2.6 + 0.24 * len(layers), 4.0), 12))
    demanded, found, guessed = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 0.62))
    for axes, values, title, label, top in (
        (demanded, uses, "How often each expert was demanded", "% of tokens", None),
        (found, hits, "How often it was in memory then", "% of its uses", 100),
    ):
        image = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0, vmax=top)
        axes.set_facecolor("white")
        axes.set(title=title, xlabel="experts of the layer, most demanded first")
        axes.set_xticks([])
        figure.colorbar(image, ax=axes, label=label, location="bottom", shrink=0.8, aspect=30, pad=0.03)
    demanded.set_ylabel("MoE layer")
    step = -(-len(layers) // _MOST_LABELS)
    demanded.set_yticks(range(0, len(layers), step))
    _draw_recall(guessed, report)
    figure.legend(*guessed.get_legend_handles_labels(), loc="lower right", frameon=False, fontsize=9)
    save_figure(figure, path)


def _draw_recall(axes: Any, report: Report) -> None:
    recalls = [(layer.layer, 100 * layer.recall, 100 * (layer.found or 0.0) * layer.recall)
               for layer in report.layers if layer.recall is not None]  # fmt: skip
    axes.set(title="How well it was guessed", xlabel="% of the demanded experts", xlim=(0, 100))
    tidy(axes)
    if not recalls:
        axes.text(50, (len(report.layers) - 1) / 2, "nothing was guessed", ha="center", va="center", color=INK)
        return
    at, named, found = zip(*recalls, strict=True)
    axes.barh(at, named, color=ORANGE, height=0.75, label="in the guess")
    axes.barh(at, found, color=BLUE, height=0.45, label="of them, resident when demanded")
