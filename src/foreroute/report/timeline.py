"""Plot the timeline of one token: compute, the reads meanwhile, and the stalls."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from foreroute.report.events import LayerDone, LoadDone, RecordedStep, Recording
from foreroute.report.guesses import IN_TIME, LATE_HIT, LATER, OPEN, WASTED, fate_of_loads
from foreroute.report.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, RED, SKY, new_figure
from foreroute.report.timing import durations
from foreroute.whole_files import save_figure

# Reason of a read -> colour, hatch, and description.
READS = {
    "demand": (RED, "", "demand load: the token waits"),
    LATE_HIT: (ORANGE, "", "prefetch, late hit: the token waits for the rest"),
    IN_TIME: (GREEN, "", "prefetch, in time: no wait"),
    LATER: (SKY, "", "prefetch, used by a later token"),
    WASTED: (GREY, "////", "prefetch, evicted unused"),
    OPEN: (GREY, "....", "prefetch, not used until the end"),
    "deferred": (PURPLE, "", "deferred load, for later tokens"),
}
_STALL = RED
_LAYER_Y, _TOP, _BOTTOM = 0.0, -1.55, 1.0
_LANE = 0.62
_MOST_LANES = 6


@dataclass(frozen=True)
class TokenPicture:
    """A decode step; times are in ms since it began.

    number: among the decode steps. reads: (begin, end, lane, kind, load), kind a key of READS. layers: as recorded.
    """

    number: int
    duration_ms: float
    layers: tuple[tuple[float, float, LayerDone], ...]
    stalls: tuple[tuple[float, float, int], ...]
    reads: tuple[tuple[float, float, int, str, LoadDone], ...]

    @property
    def stall_ms(self) -> float:
        """Stalled milliseconds."""
        return sum(end - begun for begun, end, _ in self.stalls)


def typical_token(recording: Recording) -> int:
    """Choose a decode step of median duration from the second half, where the pool is warm."""
    seconds = durations(recording)
    half = len(seconds) // 2
    return half + seconds[half:].index(median_low(seconds[half:]))


def token_picture(recording: Recording, number: int) -> TokenPicture:
    """Collect from `recording` what happened during decode step `number`, and the reads that overlapped it."""
    step: RecordedStep = recording.decode_steps[number]
    seconds = durations(recording)[number]
    fates = fate_of_loads(recording)

    def ms(at_s: float) -> float:
        return 1e3 * (at_s - step.begun_s)

    loads = sorted(
        (
            event
            for event in recording.events
            if isinstance(event, LoadDone) and event.end_s > step.begun_s and event.begun_s < step.begun_s + seconds
        ),
        key=lambda load: load.begun_s,
    )
    lanes: list[float] = []
    reads = []
    for load in loads:
        lane = next((lane for lane, free_from in enumerate(lanes) if free_from <= load.begun_s), len(lanes))
        lanes[lane : lane + 1] = [load.end_s]
        kind = fates.get(id(load), OPEN) if load.why == "prefetch" else load.why
        reads.append((ms(load.begun_s), ms(load.end_s), lane, kind if kind in READS else "demand", load))
    return TokenPicture(
        number,
        1e3 * seconds,
        tuple((ms(done.begun_s), ms(done.end_s), done) for done in step.layers),
        tuple((ms(stall.begun_s), ms(stall.end_s), stall.layer) for stall in step.stalls),
        tuple(reads),
    )


def draw_timeline(recording: Recording, picture: TokenPicture, path: Path) -> None:
    """Plot `picture`, of a step in `recording`, to `path`: compute above, reads below, and two events explained."""
    from matplotlib.patches import Patch

    num_lanes = min(1 + max((read[2] for read in picture.reads), default=0), _MOST_LANES)
    figure = new_figure(12, 4.6 + 0.35 * num_lanes)
    axes = figure.add_subplot()
    axes.set_xlim(-0.01 * picture.duration_ms, 1.01 * picture.duration_ms)
    lowest = _BOTTOM + _LANE * num_lanes
    axes.set_ylim(lowest + 1.1, _TOP)
    axes.axvspan(0, picture.duration_ms, ymin=0, ymax=1, color="#FAFAFA", zorder=0)
    _draw_compute(axes, picture)
    for begun, end, lane, kind, load in picture.reads:
        if lane < num_lanes:
            _draw_read(axes, picture, begun, end, _BOTTOM + _LANE * lane, kind, f"L{load.layer}")
    _annotate(axes, picture, lowest)
    axes.set_yticks([_LAYER_Y, _BOTTOM + _LANE * (num_lanes - 1) / 2], ["compute", "reads from\nthe disk"])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("milliseconds since the token began")
    axes.set_title(
        f"One token of {recording.header.model} (decode step {picture.number}): {picture.duration_ms:.2f} ms, of which "
        f"{picture.stall_ms:.2f} ms waiting for the disk",
        loc="left",
    )
    shown = {read[3] for read in picture.reads}
    handles = [
        Patch(facecolor=BLUE, label="experts of MoE layer L0, L1, ..."),
        Patch(facecolor=PALE, label="attention, routers, predictors, everything else"),
        Patch(facecolor="white", edgecolor=_STALL, hatch="xxxx", label="waiting for the disk"),
        *(Patch(facecolor=colour, hatch=hatch, edgecolor="white" if hatch else colour, label=label)
          for kind, (colour, hatch, label) in READS.items() if kind in shown),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def _draw_compute(axes: Any, picture: TokenPicture) -> None:
    axes.barh(_LAYER_Y, picture.duration_ms, left=0, height=0.7, color=PALE)
    for begun, end, done in picture.layers:
        axes.barh(_LAYER_Y, end - begun, left=begun, height=0.7, color=BLUE)
        if end - begun > 0.016 * picture.duration_ms:
            axes.text((begun + end) / 2, _LAYER_Y + 0.5, f"L{done.layer}", ha="center", va="center", fontsize=8,
                      color=INK)  # fmt: skip
    for begun, end, _ in picture.stalls:
        axes.barh(_LAYER_Y, end - begun, left=begun, height=0.7, facecolor="white", edgecolor=_STALL, hatch="xxxx",
                  linewidth=0.8)  # fmt: skip


def _draw_read(axes: Any, picture: TokenPicture, begun: float, end: float, y: float, kind: str, label: str) -> None:
    colour, hatch, _ = READS[kind]
    axes.barh(y, end - begun, left=begun, height=0.8 * _LANE, facecolor=colour, hatch=hatch, edgecolor="white",
              linewidth=0.6)  # fmt: skip
    middle = (max(begun, 0) + min(end, picture.duration_ms)) / 2
    if min(end, picture.duration_ms) - max(begun, 0) > 0.013 * picture.duration_ms:
        axes.text(middle, y, label, ha="center", va="center", fontsize=7.5, zorder=4,
                  color=INK if kind in (LATE_HIT, LATER) or hatch else "white",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8} if hatch else None)  # fmt: skip


def _annotate(axes: Any, picture: TokenPicture, lowest: float) -> None:
    """Explain one prefetch that came in time, below, and the longest stall, above."""
    style = {"fontsize": 9, "color": INK, "arrowprops": {"arrowstyle": "->", "color": INK, "linewidth": 1}}
    timely = [read for read in picture.reads if read[3] == IN_TIME and read[2] < _MOST_LANES and read[0] >= 0]
    if timely:
        begun, end, lane, _, load = max(timely, key=lambda read: min(read[1], picture.duration_ms) - read[0])
        asking = next((at for at, _, done in picture.layers if done.layer == load.layer and at >= end), None)
        when = "" if asking is None else f", {asking - end:.2f} ms before its layer asks"
        axes.annotate(
            f"expert {load.expert} of layer L{load.layer} was prefetched\nwhile other layers computed: "
            f"it is resident{when}",
            ((begun + end) / 2, _BOTTOM + _LANE * lane + 0.3), xytext=_beside(begun, picture, lowest + 0.6), **style,
        )  # fmt: skip
    if picture.stalls:
        waits = [(sum(end - begun for begun, end, of in picture.stalls if of == layer), layer)
                 for layer in {stall[2] for stall in picture.stalls}]  # fmt: skip
        waited, layer = max(waits)
        begun, end, _ = max((stall for stall in picture.stalls if stall[2] == layer), key=lambda it: it[1] - it[0])
        kinds = [read[3] for read in picture.reads if read[4].layer == layer and read[1] >= begun - 1e-6]
        causes = ((kinds.count("demand"), "not prefetched"), (kinds.count(LATE_HIT), "prefetched too late"))
        why = [f"{count} {text}" for count, text in causes if count]
        axes.annotate(
            f"the longest stall: layer L{layer} waits for {waited:.2f} ms"
            + (f"\nuntil its experts are read: {', '.join(why)}" if why else ""),
            ((begun + end) / 2, _LAYER_Y - 0.37), xytext=_beside(begun, picture, _TOP + 0.35), **style,
        )  # fmt: skip


def _beside(at: float, picture: TokenPicture, y: float) -> tuple[float, float]:
    """Position of a text about a third of the plot wide, so that it stays inside."""
    return (min(max(at - 0.02 * picture.duration_ms, 0.0), 0.62 * picture.duration_ms), y)
