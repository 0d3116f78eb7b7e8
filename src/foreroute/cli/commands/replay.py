"""`foreroute replay`: analyse a recorded run, and replay it under other evictions and budgets."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures, options
from foreroute.errors import BudgetError, TraceError
from foreroute.units import format_memory, format_speed, megabytes, parse_memory

if TYPE_CHECKING:
    from rich.console import Console

    from foreroute.report.events import Recording
    from foreroute.report.replay import Budget, Report
    from foreroute.report.tier.forecast import TierForecast
    from foreroute.report.tier.simulation import Tier

_EPILOG = """\
examples:
  foreroute generate MODEL "Once upon a time" --memory 25% --trace run.jsonl
  foreroute replay run.jsonl
  foreroute replay run.jsonl --memory 25% 50% --bandwidth 3.5GB/s
  foreroute replay run.jsonl --tier 25.7,768       forecast: a GPU behind PCIe 4
  foreroute replay run.jsonl --out report          plots, and report/index.html

what is replayed:
  the experts that decoding demanded, by demand loads alone: nothing is
  prefetched, each miss is read while the token waits. Prefill is left out, as
  its experts only pass through the pool. The pool starts empty; the warm-up's
  tokens fill it and are not counted.

the eviction policies:
  lru, lfu     the engine's own code, as --eviction chooses it
  random       evicts any expert, without any memory of their use
  static       the most used experts stay, chosen with hindsight: the best fixed
               choice
  belady       evicts the expert that is needed again last: it knows the future,
               and no eviction reads less
  recorded     what the engine did in the recorded run, with its prefetches

the figures:
  hits         share of demanded experts that were in memory
  misses       experts read per token because they were absent; in the recorded
               run, late hits are not among them
  MB/token     read per token; x belady: as a multiple of the bound
  TPOT         ms per token, from compute as recorded (step less stall) and
               reads at the bandwidth: from reads that overlap compute fully to
               reads that do not overlap it. For the recorded run: measured"""


def add_parser(commands: Any) -> None:
    """Add `replay` to the commands."""
    parser = commands.add_parser(
        "replay",
        help="simulate a recorded run with other evictions and budgets",
        usage="foreroute replay TRACE [flags]",
        description="Replay a trace without its model: tables, plots and a page.",
        epilog=_EPILOG,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a .jsonl file that --trace wrote")
    parser.add_argument(
        "--memory",
        nargs="+",
        default=(),
        metavar="M",
        help='budgets: bytes, "8GiB", or shares of the experts (default: a curve from 12.5%% to 100%%)',
    )
    parser.add_argument(
        "--warm-up",
        type=options.at_least(0),
        metavar="N",
        help="decode steps that fill the pool and are not counted (default: a fifth)",
    )
    parser.add_argument(
        "--bandwidth", metavar="RATE", help='reading speed, "1.5GB/s" (default: that of the recorded run)'
    )
    parser.add_argument(
        "--tier",
        metavar="LINK,HBM",
        help="forecast decoding on another machine: GB/s of the link that copies experts, GB/s of the memory that "
        "computes, then, if wanted, GB of dense weights and keys and values per token, and microseconds per layer "
        "beside bytes. LINK alone: compute as recorded",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random eviction (default: 0)")
    parser.add_argument("--partial", action="store_true", help="use a trace that was cut off, as far as it goes")
    parser.add_argument("--model", metavar="MODEL", help="check that the trace is of this model")
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="write plots (PNG) and a page, index.html, there (needs matplotlib)"
    )
    group.add_argument(
        "--token",
        type=options.at_least(0),
        metavar="N",
        help="the decode step whose timeline is drawn, from 0 (default: one of median duration in the second half)",
    )
    group.add_argument("--chrome", type=Path, metavar="FILE", help="also write the trace for Perfetto: a .json file")
    options.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from foreroute.report.replay import make_report
    from foreroute.report.tier.forecast import as_dicts, parse_tier
    from foreroute.report.trace_file import read_recording

    bytes_per_s = None if args.bandwidth is None else _rate(args.bandwidth)
    if args.out is not None:
        from foreroute.report import page

        page.check(args.out)
    if args.chrome is not None and (args.chrome.suffix != ".json" or args.chrome.absolute() == args.trace.absolute()):
        raise TraceError(f"--chrome {args.chrome}: choose another name, one that ends in .json.")
    with figures.counting_bar("reading", 1, "bytes", args.json) as show:
        recording = read_recording(args.trace, is_partial=args.partial, progress=show)
    if args.model is not None:
        _check_model(recording, options.alias_target(args, args.model))
    if args.token is not None and args.token >= len(recording.decode_steps):
        raise TraceError(
            f"--token {args.token}: the trace has {len(recording.decode_steps)} decode steps, counted from 0."
        )
    tier = None if args.tier is None else parse_tier(args.tier, recording)
    with figures.counting_bar("replaying", 1, "replays", args.json) as show:
        report = make_report(
            recording,
            memories=args.memory,
            warm_up=args.warm_up,
            bytes_per_s=bytes_per_s,
            seed=args.seed,
            progress=show,
        )
    forecast = [] if tier is None else _forecast(args, recording, report, tier)
    written: list[Path] = []
    if args.out is not None:
        with figures.busy("Drawing", args.json):
            written += page.write(report, args.out, args.token)
    if args.chrome is not None:
        from foreroute.report.chrome import write_chrome

        write_chrome(args.trace, args.chrome)
        written.append(args.chrome)
    if args.json:
        figures.print_json(**report.as_dict(), tier=as_dicts(forecast), written=[str(path) for path in written])
    else:
        _print(report, forecast, written)
    return 0


def _forecast(args: argparse.Namespace, recording: "Recording", report: "Report", tier: "Tier") -> "list[TierForecast]":
    from foreroute.report.tier.forecast import forecasts

    memories = args.memory or [f"{100 * budget.share:.4g}%" for budget in report.budgets]
    with figures.busy("Simulating", args.json):
        return forecasts(recording, report.route, tier, memories)


def _rate(text: str) -> float:
    """Parse bytes per second from "1.5GB/s"; the "/s" is optional."""
    try:
        if "%" in text:
            raise BudgetError(text)
        return float(parse_memory(text.strip().removesuffix("/s"), 1))
    except BudgetError:
        how = 'Write "1.5GB/s", "800MB/s" or bytes per second.'
        raise TraceError(f"--bandwidth {text!r} is not a speed. {how}") from None


def _check_model(recording: "Recording", model: str) -> None:
    from foreroute.checkpoint.locate import locate, read_index

    folder = locate(model)
    fingerprint = read_index(folder).fingerprint()
    if fingerprint != recording.header.fingerprint:
        raise TraceError(
            f"{recording.path} is a trace of another model: it says {recording.header.model} "
            f"({recording.header.fingerprint[:8]}), {folder} is {fingerprint[:8]}. Record one with this model, or "
            "leave --model out."
        )


def _print(report: "Report", forecast: "list[TierForecast]", written: list[Path]) -> None:
    console = figures.stdout_console()
    _print_run(console, report)
    for budget in report.budgets:
        console.print()
        mark = ", as recorded" if budget.is_recorded else ""
        console.print(
            f"[bold]{figures.percent(budget.share)} of the experts[/bold]: {budget.num_slots} of "
            f"{report.route.num_experts}, {format_memory(budget.pool_bytes)}{mark}"
        )
        figures.print_grid(console, ("", "hits", "misses", "MB/token", "x belady", "TPOT (ms)"), _rows(report, budget))
    if forecast:
        _print_forecast(console, forecast)
    console.print()
    figures.print_list(console, _remarks(report), style="dim")
    for path in written:
        console.print(f"Wrote {path}", soft_wrap=True)


def _print_run(console: "Console", report: "Report") -> None:
    header, timing, fates = report.recording.header, report.timing, report.fates
    read = "not known" if timing.bytes_per_s is None else format_speed(timing.bytes_per_s)
    rows: list[figures.Row] = [
        ("model", header.model, f"{header.num_layers} MoE layers, {header.num_experts} experts of "
         f"{format_memory(max(header.expert_bytes))} ({header.codec})"),
        ("recorded with", f"{header.num_slots} slots", f"eviction {header.eviction}, prefetch {header.prefetch}, "
         f"policy {header.policy}"),
        ("decode steps", f"{len(report.route.steps):,}", f"the first {report.route.warm_up:,} fill the pool and are "
         "not counted"),
        ("TPOT", figures.number(timing.step_ms, "ms"), f"compute {figures.number(timing.compute_ms)}, waiting for "
         f"bytes {figures.number(timing.stall_ms)}"),
        ("bandwidth", read, "as given" if timing.is_bandwidth_given else "of the recorded run's reads"),
        ("recall", figures.percent(report.recall), "of the demanded experts were guessed, mean over guessed layers"),
        ("prefetches", f"{fates.loads:,}", f"{fates.in_time:,} in time, {fates.late_hits:,} late hits, {fates.later:,} "
         f"for a later token, {fates.wasted:,} wasted, {fates.open:,} undecided; {fates.cancelled:,} more cancelled "
         "in the queue"),
    ]  # fmt: skip
    figures.print_rows(console, rows)


def _print_forecast(console: "Console", forecast: "list[TierForecast]") -> None:
    """The simulation of --tier: ms per step."""
    console.print()
    console.print("[bold]Forecast[/bold] on the tier of --tier: simulated, not measured (ms per step)")
    rows = []
    for one in forecast:
        cells = [one.memory, str(one.num_slots), figures.number(1e3 * one.on_demand.step_s)]
        for run in (one.prefetched,):
            cells += (
                ["-", "-"] if run is None else [figures.number(1e3 * run.step_s), figures.number(1e3 * run.stall_s)]
            )
        rows.append([*cells, figures.number(1e3 * one.resident_s)])
    figures.print_grid(console, ("memory", "slots", "on demand", "prefetched", "of it waiting", "all resident"), rows)


def _rows(report: "Report", budget: "Budget") -> list[list[str]]:
    rows = [[name, *row.cells] for name, row in report.policies(budget).items()]
    return [*rows, ["recorded", *report.recorded_row.cells]] if budget.is_recorded else rows


def _remarks(report: "Report") -> list[str]:
    did, remarks = report.recorded, []
    mb = [megabytes(nbytes) for nbytes in (did.demand_bytes, did.prefetch_bytes, did.deferred_bytes)]
    share = figures.percent(did.late_hits / max(did.demanded, 1))
    remarks.append(
        f"The recorded run read {mb[0]} MB/token on demand, {mb[1]} prefetched and {mb[2]} deferred; {share} of its "
        "demanded experts were late hits."
    )
    if did.substituted:
        remarks.append(f"It substituted {did.substituted / did.tokens:.2f} experts per token; replays load these too.")
    if report.left_out:
        remarks.append(f"{', '.join(report.left_out)} left out: less than one token's demand.")
    if report.recording.num_broken:
        remarks.append(f"{report.recording.num_broken} steps were interrupted and are not counted.")
    if not report.recording.is_whole:
        remarks.append(f"The trace was cut off: its {len(report.recording.steps)} whole steps are used.")
    return remarks
