"""Write one self-contained page about a recorded run and its replays."""

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from foreroute.errors import ForerouteError
from foreroute.report.curves import draw_layers, draw_residency
from foreroute.report.replay import Budget, Report
from foreroute.report.style import POLICIES, check_matplotlib
from foreroute.report.timeline import TokenPicture, draw_timeline, token_picture, typical_token
from foreroute.units import format_speed, megabytes, percent
from foreroute.whole_files import atomic_write

_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #222; font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1.4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p, li { max-width: 46rem; }
.quiet { color: #595959; font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.card { background: #f4f6f8; border-radius: 6px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; }
.card span { color: #4a4a4a; font-size: .86rem; display: block; line-height: 1.35; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.wide img { width: 100%; min-width: 780px; height: auto; display: block; }
table { border-collapse: collapse; font-size: .92rem; margin: .3rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { font-weight: 600; border-bottom: 2px solid #bbb; }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
tr.did td { background: #fdf1e9; } tr.bound td { background: #eaf6f1; }
"""


def check(folder: Path) -> None:
    """Report missing requirements before minutes are spent on a replay.

    Raises:
        ForerouteError: matplotlib is not installed, or `folder` cannot be written to.
    """
    check_matplotlib()
    if folder.exists() and not folder.is_dir():
        raise ForerouteError(f"--out {folder} is a file. Choose a folder.")
    parent = folder if folder.exists() else folder.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ForerouteError(f"--out {folder}: {parent} is not a writable folder. Choose another.")


def write(report: Report, folder: Path, token: int | None = None) -> list[Path]:
    """Plot `report` and write it to `folder`: three PNG, and index.html, which embeds them; return their paths.

    Args:
        token: the decode step of the timeline; a typical one when left out.
    Raises:
        ForerouteError: a file cannot be written.
    """
    recording = report.recording
    picture = token_picture(recording, typical_token(recording) if token is None else token)
    paths = {name: folder / f"{name}.png" for name in ("timeline", "residency", "layers")}
    try:
        folder.mkdir(exist_ok=True)
        draw_timeline(recording, picture, paths["timeline"])
        draw_residency(report, paths["residency"])
        draw_layers(report, paths["layers"])
        page = folder / "index.html"
        with atomic_write(page) as beside:
            beside.write_text(_page(report, picture, paths), encoding="utf-8")
    except OSError as error:
        raise ForerouteError(f"{folder} cannot be written: {error.strerror}.") from error
    return [page, *paths.values()]


def _page(report: Report, picture: TokenPicture, paths: dict[str, Path]) -> str:
    header = report.recording.header
    title = f"{escape(header.model)}: a recorded run, replayed"
    sections = (_summary(report), _token(picture, paths["timeline"]), _memory(report, paths["residency"]),
                _layers(report, paths["layers"]), _small_print(report))  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head>\n<body><main><h1>{title}</h1>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _summary(report: Report) -> str:
    header, did, timing = report.recording.header, report.recorded, report.timing
    share = 100 * header.num_slots / header.num_experts
    over = report.recorded_budget.over_belady(did.bytes_per_token)
    cards = [
        (f"{timing.step_ms:.1f} ms", f"per token, {timing.stall_ms:.1f} ms of it waiting for the disk"),
        (f"{share:.0f} %", f"of the experts fit into memory: {header.num_slots} of {header.num_experts}"),
        (f"{100 * did.hits / max(did.demanded, 1):.0f} %", "of the demanded experts were in memory (hits)"),
        (f"{megabytes(did.bytes_per_token)} MB", "read per token"
         + ("" if over is None else f", {over:.2f} times the least possible on demand")),
    ]  # fmt: skip
    if report.recall is not None:
        cards.append((f"{100 * report.recall:.0f} %", "of the demanded experts had been guessed"))
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{text}</span></div>' for value, text in cards)
    return (
        "<p>This model is a <em>mixture of experts</em>: each of its "
        f"{header.num_layers} MoE layers has up to {max(header.experts_per_layer)} experts (blocks of weights of "
        f"{megabytes(max(header.expert_bytes))} MB), and each token uses {max(header.top_k)} of them per layer. Not "
        "all experts fit into memory. The others are read from the disk when a token needs them, and the token waits, "
        "unless they were guessed and prefetched.</p>"
        f'<div class="cards">{boxes}</div>'
        f'<p class="quiet">Recorded with eviction {escape(header.eviction)}, prefetch {escape(header.prefetch)}, '
        f"policy {escape(header.policy)}, experts stored as {escape(header.codec)}. "
        f"{len(report.route.steps):,} tokens were decoded; the first {report.route.warm_up:,} fill the memory and are "
        "not counted above.</p>"
    )


def _token(picture: TokenPicture, path: Path) -> str:
    return (
        "<h2>One token, millisecond by millisecond</h2>"
        "<p>Time runs to the right. The upper row is the processor: blue where it computes experts, grey where it does "
        "everything else, hatched where it waits for an expert to be read. Below, each box is "
        "one read of an expert from the disk (L3 is one of layer 3), in the colour of its purpose. A good run "
        "has green boxes under blue and grey, and nothing hatched. Boxes lie in two rows where one read begins while "
        "the one before it is still being finished.</p>"
        + _image(path, f"Timeline of decode step {picture.number}: computing above, reads below")
        + f'<p class="quiet">Decode step {picture.number}, {picture.duration_ms:.2f} ms: {picture.stall_ms:.2f} ms of '
        f"waiting, {len(picture.reads)} reads. <code>--token N</code> shows another.</p>"
    )


def _memory(report: Report, path: Path) -> str:
    tables = "".join(
        f"<h3>{100 * budget.share:.3g} % of the experts in memory{', as recorded' if budget.is_recorded else ''}</h3>"
        + _budget_table(report, budget)
        for budget in report.budgets
    )
    return (
        "<h2>What more memory would buy</h2>"
        "<p>The trace says which experts the tokens demanded, so any other memory size and eviction policy can be "
        "simulated. The green line is Belady's bound, an eviction that knows the future: no policy reads less. The "
        "star is what the engine did"
        + (
            ": its prefetches read some experts in vain, but mostly during compute, so that it reads more and waits "
            "less.</p>"
            if report.fates.loads
            else ", on demand alone.</p>"
        )
        + _image(path, "MB read per token and ms per token over the share of experts in memory, one line per policy")
        + tables
        + '<p class="quiet">Misses are experts read per token because they were absent; in the recorded run, those '
        "that had not been prefetched. The time per token ranges from reads that overlap compute fully to reads that "
        "do not overlap it.</p>"
    )


def _budget_table(report: Report, budget: Budget) -> str:
    rows = [
        ("bound" if name == "belady" else "", [POLICIES[name][2].split(":")[0], *row.cells])
        for name, row in report.policies(budget).items()
    ]
    if budget.is_recorded:
        rows.append(("did", ["the recorded run", *report.recorded_row.cells]))
    return _table(("policy", "hits", "misses", "MB per token", "x bound", "ms per token"), rows)


def _layers(report: Report, path: Path) -> str:
    fates = report.fates
    rows = [("", [f"layer {layer.layer}", percent(layer.recall), percent(layer.found),
                  "–" if layer.width is None else f"{layer.width:.1f}",
                  percent(sum(layer.hits) / max(sum(layer.uses), 1))]) for layer in report.layers]  # fmt: skip
    outcomes = (
        f"<p>Of {fates.loads:,} experts prefetched in decoding, {fates.in_time:,} came in time, {fates.late_hits:,} "
        f"were late hits, {fates.later:,} were used by a later token, {fates.wasted:,} were evicted unused and "
        f"{fates.open:,} were not used until the end. {fates.cancelled:,} more were cancelled before they were read."
        "</p>"
        if fates.loads
        else "<p>Nothing was prefetched.</p>"
    )
    return (
        "<h2>Layer by layer: what was demanded, what was guessed</h2>"
        "<p>Each row is a layer, each cell an expert. On the left, bright experts are demanded often; a layer with a "
        "few bright ones is easy to serve from memory, an even one is hard. In the middle, dark experts were misses "
        "most of the times they were demanded. On the right, the share of the demanded experts that was guessed.</p>"
        + _image(path, "Heat maps of uses and hits per layer and expert, and the recall of guesses per layer")
        + outcomes
        + _table(("", "guessed", "of them in time", "experts per guess", "hits"), rows)
    )


def _small_print(report: Report) -> str:
    timing = report.timing
    read = "not known, as nothing was read" if timing.bytes_per_s is None else format_speed(timing.bytes_per_s)
    source = "as given" if timing.is_bandwidth_given else "bytes over time of the recorded run's own reads"
    items = [
        "Only decoding is replayed: a prompt's experts pass through the pool, whatever the policy.",
        f"The first {report.route.warm_up:,} decode steps fill the memory and are not counted. The bound then begins "
        "with the experts that serve it best.",
        "Replays have demand loads alone. Prefetches read more, and overlap compute.",
        f"Reading speed: {read} ({source}). Compute: {timing.compute_ms:.2f} ms per token, the recorded time without "
        "its waiting.",
    ]
    if report.left_out:
        items.append(f"Not shown: {', '.join(report.left_out)} of the experts, which is less than one token needs.")
    if not report.recording.is_whole:
        items.append("The trace was cut off: what it has is used.")
    if report.recorded.substituted:
        items.append("Experts that were substituted by default vectors are loaded in replays.")
    return "<h2>How this was made</h2><ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="wide"><img alt="{escape(text)}" src="data:image/png;base64,{data}"></div>'


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for kind, cells in rows
    )
    return f'<div class="wide"><table><tr>{titles}</tr>{lines}</table></div>'
