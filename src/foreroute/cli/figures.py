"""Format figures for the terminal and as JSON. All that is not the answer goes to standard error."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from foreroute.config import Plan
from foreroute.units import format_memory
from foreroute.units import number as number  # also as figures.number, beside the other formatting
from foreroute.units import percent as percent
from foreroute.units import span as span

if TYPE_CHECKING:
    from rich.console import Console

    from foreroute.generation.generate import GenerationReport

# (name, value, remark); a row of None is a gap.
Row = tuple[str, str, str] | None

# A load that ends before has no bar.
_BAR_AFTER_S = 2.0

# Control characters, except newline and tab: what a model writes must not steer the terminal.
_UNPRINTABLE = {code: "\ufffd" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


def stderr_console() -> "Console":
    """The console for figures, progress and advice."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout_console(*, is_quiet: bool = False) -> "Console":
    """The console for an answer that is not JSON."""
    from rich.console import Console

    return Console(highlight=False, quiet=is_quiet)


@contextlib.contextmanager
def busy(what: str, is_quiet: bool) -> Iterator[None]:
    """Show `what` and a spinner on a terminal while inside; show nothing elsewhere, or when `is_quiet`."""
    if is_quiet or not sys.stderr.isatty():
        yield
        return
    with stderr_console().status(f"{what} ..."):
        yield


@contextlib.contextmanager
def loading(is_quiet: bool, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int, int], None]]:
    """While a model is loaded: `busy`, and a bar of its bytes once that takes long; on a terminal alone, as `busy` is.

    Args:
        clock: seconds.
    """
    if is_quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TimeRemainingColumn(),
    )
    began_s = clock()
    bar = progress.Progress(*columns, console=stderr_console(), transient=True)
    task = bar.add_task("Loading the model", total=None)
    with contextlib.ExitStack() as drawn:
        drawn.enter_context(busy("Loading the model", is_quiet))

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not bar.live.is_started and clock() - began_s >= _BAR_AFTER_S:
                drawn.close()
                drawn.enter_context(bar)

        yield show


@contextlib.contextmanager
def counting_bar(what: str, total: int, unit: str, is_quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of `what` in `unit` on standard error unless `is_quiet`; call the result with (done, total)."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=stderr_console(), disable=is_quiet) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def printable(text: str) -> str:
    """Replace characters that could control the terminal."""
    return text.translate(_UNPRINTABLE)


def writer(out: TextIO, *, is_quiet: bool = False) -> Callable[[str], None]:
    """Make a function that writes text to `out` at once, a terminal without control characters; no-op if is_quiet."""
    is_terminal = out.isatty()

    def write(piece: str) -> None:
        if is_quiet:
            return
        out.write(printable(piece) if is_terminal else piece)
        out.flush()

    return write


def print_json(**entries: Any) -> None:
    """Print one JSON object on standard output; dataclasses become objects."""
    print(json.dumps(entries, ensure_ascii=False, default=dataclasses.asdict), flush=True)


def print_rows(console: "Console", rows: Sequence[Row]) -> None:
    """Print `rows` on `console` as a table of three columns without a frame: name, value, remark."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*(row or ("",)))
    console.print(table)


def print_grid(console: "Console", head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` under `head` on `console`, without a frame; numbers are right-aligned."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for position, title in enumerate(head):
        table.add_column(title, no_wrap=True, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_list(console: "Console", items: Sequence[str], style: str = "") -> None:
    """Print `items` on `console` as a bullet list in this style, wrapped with a hanging indent."""
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for item in items:
        table.add_row(" -", item, style=style)
    console.print(table, markup=False)


def print_report(report: "GenerationReport", plan: Plan) -> None:
    """Print one answer's figures from `report` and `plan` on standard error."""
    console = stderr_console()
    console.print()
    print_rows(console, report_rows(report, plan))


def report_rows(report: "GenerationReport", plan: Plan) -> list[Row]:
    """Rows of one answer's figures from `report` and `plan`; a dash for what too few tokens left unmeasured."""
    f = report.figures()
    policy: list[Row] = []
    if f["substituted"]:
        deferred = number(f["deferred_mb_per_token"], "MB/token")
        count = _count(f["substituted"], f["substituted_rate"])
        policy = [("substituted", count, f"not waited for; deferred loads {deferred}")]
    ends = {"stop": "the model ended", "length": "the limit was reached", "interrupted": "stopped by Ctrl-C"}
    return [
        ("tokens", f"{f['prompt_tokens']} + {f['new_tokens']}",
         f"prompt + new; {ends.get(report.finish_reason, 'stopped')}"),
        ("TTFT", number(f["ttft_s"], "s"), f"prefill {number(f['prefill_tokens_per_s'], 'tokens/s')}"),
        ("TPOT", number(f["tpot_ms"], "ms"), number(f["tokens_per_s"], "tokens/s")),
        ("hits", _count(f["hits"], f["hit_rate"]), f"late hits {_count(f['late_hits'], f['late_hit_rate'])}, "
         f"misses {_count(f['misses'], f['miss_rate'])}"),
        *policy,
        ("read", number(f["demand_mb_per_token"], "MB/token"), f"on demand, + {number(f['prefetch_mb_per_token'])} "
         f"prefetched ({number(f['prefetch_used_mb_per_token'])} used, "
         f"{number(f['prefetch_wasted_mb_per_token'])} wasted)"),
        ("stall", number(f["stall_ms_per_token"], "ms/token"),
         f"waiting for the disk, in {percent(f['stalled_layer_rate'])} of the MoE layers"),
        *_source_rows(plan),
        ("evictions", f"{f['evictions']:,}",
         f"{plan.num_slots} of {plan.total_slots} experts fit {format_memory(plan.memory_bytes)}"),
        ("prefetches", f"{f['prefetch_used']:,} used", f"of {f['prefetch_loads']:,} experts prefetched"),
        *_governor_rows(report),
        *_draft_rows(report),
        ("peak RSS", format_memory(report.peak_rss_bytes), ""),
    ]  # fmt: skip


def _source_rows(plan: Plan) -> list[Row]:
    """A row on the packed store, where experts are read from one."""
    if plan.source != "packed":
        return []
    return [("from", "packed store", f"beside the model or as asked, {plan.stored_dtype}")]


def _governor_rows(report: "GenerationReport") -> list[Row]:
    """Rows on the current prefetch width, where the governor sets it."""
    if report.prefetch_share is None:
        return []
    now = {0.0: "off", 1.0: "full"}.get(report.prefetch_share, f"{report.prefetch_share:.0%}")
    off, steps = report.stats.decode.steps_without_prefetch, report.stats.decode.steps
    return [("prefetching", "trying" if report.prefetch_why == "trying" else now, f"off in {off} of {steps} steps")]


def _draft_rows(report: "GenerationReport") -> list[Row]:
    """Rows on drafted tokens, where some could be."""
    if report.draft_length is None:
        return []
    f = report.figures()
    now = f"{report.draft_length} at a time now" if report.draft_length else "off now: without is faster"
    return [
        ("drafted", f"{_count(report.accepted, f['acceptance_rate'])}", f"accepted of {report.drafted:,}; {now}"),
        ("tokens a step", number(f["tokens_per_step"], ""), f"{report.verify_steps:,} steps verified a draft"),
    ]


def inert_features(plan: Plan, evictions: int, prefetch_used: int) -> list[str]:
    """List what should have happened in a run under `plan` and did not: without it a comparison proves little."""
    complaints = []
    if plan.num_slots < plan.total_slots and not evictions:
        complaints.append("But no expert was evicted: this run proves little. Take less --memory or more tokens.")
    if plan.staging_slots and not prefetch_used:
        remedy = "Take more tokens." if plan.math != "family" else "Take --dtype float32."
        complaints.append(f"But no prefetch was used: this run proves little. {remedy}")
    return complaints


def dtype_name(stored: str) -> str:
    """Translate a safetensors dtype to torch's name."""
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(stored, stored)


def _count(count: float | int | None, share: float | int | None) -> str:
    return f"{count:,}" + ("" if share is None else f" ({percent(share)})")
