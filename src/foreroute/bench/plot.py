"""Plot the ladder: tokens per second on each rung, and over the share of experts in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreroute.bench.results import PROMPT, TOKENS
from foreroute.bench.rungs import BELADY, LADDER, ORACLE, PREFETCH, RESIDENT
from foreroute.errors import ForerouteError
from foreroute.prepare.plot import check
from foreroute.units import format_speed
from foreroute.whole_files import save_figure

__all__ = ["check", "draw"]

# Rungs go from pale to dark; bounds, which are no way to run the model, have other hues.
_COLOURS = {
    "on-demand": "#c6dbef", "cache": "#85b4dc", "hits-first": "#4a8cc2", "prefetch": "#10488c",
    ORACLE: "#e6952a", BELADY: "#b03a2e", RESIDENT: "#4d9a52",
}  # fmt: skip
_LABELS = {rung.name: rung.label for rung in LADDER}
_CURVES = (("tokens_per_s", "tokens per second"), ("read_mb", "MB read per token"))
_DASHED = {ORACLE: "--", BELADY: ":"}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write the plot (the suffix of `path` chooses the format): a row of panels per batch.

    Args:
        found: as of `results.as_json`.
    Raises:
        ForerouteError: it cannot be written, or nothing was measured.
    """
    from matplotlib.figure import Figure

    budgets = found["budgets"]
    batches = list(dict.fromkeys(budget["batch"] for budget in budgets))
    if not batches:
        raise ForerouteError("Nothing was measured, so there is nothing to draw.")
    kinds = {test["kind"] for budget in budgets for test in budget["tests"]}
    kind = TOKENS if TOKENS in kinds else PROMPT
    # A single budget gives no curve.
    num_curves = 0 if len({budget["resident_share"] for budget in budgets}) == 1 else 2 if kind == TOKENS else 1
    widths = [1.25, *[1.0] * num_curves]
    num_bars = max(len(_points([budget for budget in budgets if budget["batch"] == one], kind)) for one in batches)
    height = max(3.6, 0.24 * num_bars) + 0.5
    figure = Figure(figsize=(5.2 * sum(widths), height * len(batches) + 0.5), layout="constrained")
    axes = figure.subplots(len(batches), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for line, batch in zip(axes, batches, strict=True):
        points = _points([budget for budget in budgets if budget["batch"] == batch], kind)
        _bars(line[0], points)
        line[0].set_title(f"{points[0]['test']}, batch {batch}", loc="left", fontsize=11)
        for panel, (value, label) in zip(line[1:], _CURVES, strict=False):
            _curves(panel, points, value, label)
    disk = found["ceilings"]["disk_bytes_per_s"]
    about = f"{found['model']}: {found['experts']['stored_dtype']} experts"
    figure.suptitle(about + (f", disk {format_speed(disk['median'])}" if disk else ""), fontsize=13)
    save_figure(figure, path)


def _points(budgets: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Collect one entry per budget and rung, of the first test of that kind."""
    points = []
    for budget in budgets:
        test = next((test for test in budget["tests"] if test["kind"] == kind), None)
        for name, figures in test["rungs"].items() if test else ():
            speed = figures["tokens_per_s"]
            read_mb = figures.get("demand_mb_per_token", 0.0) + figures.get("prefetch_mb_per_token", 0.0)
            points.append(
                {
                    "memory": budget["memory"], "share": 100 * budget["resident_share"], "rung": name,
                    "test": test["test"] if test else "", "tokens_per_s": speed["median"],
                    "low": speed["p25"], "high": speed["p75"], "read_mb": read_mb,
                }
            )  # fmt: skip
    return points


def _bars(panel: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw a block of bars per budget; the lowest rung is at the top."""
    place, ticks = 0.0, []
    longest = max(point["high"] for point in points)
    for memory in dict.fromkeys(point["memory"] for point in points):
        panel.text(0.004 * longest, place, f"{memory} in memory" if "%" in memory else memory, va="center", fontsize=9,
                   fontweight="bold")  # fmt: skip
        place += 0.95
        for point in [point for point in points if point["memory"] == memory]:
            speed, rung = point["tokens_per_s"], point["rung"]
            panel.barh(
                place, speed, height=0.84, color=_COLOURS[rung], hatch="///" if rung == BELADY else None,
                edgecolor="white", xerr=[[speed - point["low"]], [point["high"] - speed]], ecolor="#333333", capsize=2,
            )  # fmt: skip
            panel.text(point["high"] + 0.015 * longest, place, f"{speed:.3g}", va="center", fontsize=8)
            ticks.append((place, _LABELS[point["rung"]]))
            place += 1
        place += 0.3
    panel.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    panel.set_ylim(place - 0.6, -0.7)
    panel.set_xlim(0, 1.12 * longest)
    panel.set_xlabel("tokens per second (median, quartiles)")
    panel.spines[["top", "right"]].set_visible(False)


def _curves(panel: Any, points: Sequence[Mapping[str, Any]], figure: str, label: str) -> None:
    """Draw one line per rung over the share of experts in memory; all of them end at fully resident."""
    shares = sorted({point["share"] for point in points})
    resident = [point for point in points if point["rung"] == RESIDENT]
    for name in _COLOURS:
        line = sorted((point["share"], point[figure]) for point in points if point["rung"] == name)
        if name == RESIDENT or not line:
            continue
        if resident and figure == "tokens_per_s" and name in (PREFETCH, ORACLE, BELADY):
            line = [(share, value) for share, value in line if share < 100]
        panel.plot(
            *zip(*line, strict=True), marker="o", markersize=5, color=_COLOURS[name], label=_LABELS[name],
            linestyle=_DASHED.get(name, "-"), linewidth=2.5 if name == PREFETCH else 1.6,
        )  # fmt: skip
    if resident and figure == "tokens_per_s":
        level = sorted(point[figure] for point in resident)[len(resident) // 2]
        panel.axhline(level, color=_COLOURS[RESIDENT], linewidth=1.4, label=_LABELS[RESIDENT])
    panel.set(xlabel="experts in memory (%)", ylabel=label, ylim=(0, None), xlim=(0, max(shares) * 1.06))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
