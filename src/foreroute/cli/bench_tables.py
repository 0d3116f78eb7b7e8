"""Print the figures of `foreroute bench` in a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures
from foreroute.units import NO_VALUE, format_memory, format_speed, percent

if TYPE_CHECKING:
    from rich.console import Console

# 80 columns in all.
_TOKEN_HEAD = ("", "t/s", "±", "x", "TPOT", "hit", "late", "MB", "prefetch", "waste", "stall", "RSS")
_PROMPT_HEAD = ("", "t/s", "±", "x", "TTFT", "MB", "prefetch", "stall", "RSS")


def show(found: Mapping[str, Any]) -> None:
    """Print the results on standard output; where tokens differ, that alone.

    Args:
        found: from `bench.results.as_json`.
    """
    from foreroute.bench.results import PROMPT, TOKENS

    console = figures.stdout_console()
    difference = found["difference"]
    if difference is not None:
        console.print("The rungs do not choose the same tokens, so their times cannot be compared.", style="bold red")
        console.print(_where(difference), markup=False)
        return
    _print_head(console, found)
    for kind, head, row in ((TOKENS, _TOKEN_HEAD, _token_row), (PROMPT, _PROMPT_HEAD, _prompt_row)):
        rows = _rows(found["budgets"], kind, row, len(head))
        if rows:
            console.print()
            _print_grid(console, head, rows)
    console.print()
    _print_ceilings(console, found)
    remarks = list(found["remarks"])
    if not found["budgets"]:
        remarks.append("Stopped by Ctrl-C before a rung had been measured.")
    elif found["interrupted"]:
        remarks.append("Stopped by Ctrl-C: this is what had been measured.")
    if found["budgets"] and not found["interleaved"]:
        remarks.append(
            "The rungs do not fit the free RAM together: they ran one after another, not in turn. Compare with care."
        )
    if found["text"] == "random ids":
        remarks.append("The model has no tokenizer: it read random tokens, which are not routed as text is.")
    if remarks:
        console.print()
        figures.print_list(console, remarks)


def _print_head(console: "Console", found: Mapping[str, Any]) -> None:
    experts = found["experts"]
    stored = {"safetensors": "in the checkpoint", "gguf": "in a GGUF file", "packed": "in a packed store"}[
        experts["source"]
    ]
    figures.print_rows(
        console,
        [
            ("model", f"{found['model']} ({found['model_type']})", f"computed in {found['compute_dtype']}"),
            ("experts", f"{experts['layers']} x {experts['per_layer']}, top-{experts['top_k']}",
             f"{format_memory(experts['all_bytes'])} as {figures.dtype_name(experts['stored_dtype'])} {stored}; "
             f"{format_memory(experts['token_demand_bytes'])} of them per token"),
        ],
    )  # fmt: skip
    if found["budgets"]:
        repeats = found["repeats"]
        turns = f"median of {repeats}" + (" in turn" if found["interleaved"] else "")
        console.print(f"{turns}; all rungs chose the same tokens; text: {found['text']}", style="dim", markup=False)


def _rows(budgets: Sequence[Mapping[str, Any]], kind: str, row: Any, width: int) -> list[list[str]]:
    """List one line per budget, batch and test, each followed by one per rung."""
    rows: list[list[str]] = []
    for budget in budgets:
        for test in budget["tests"]:
            if test["kind"] != kind:
                continue
            where = f"{test['test']}  {budget['memory']}" + (
                f"  batch {budget['batch']}" if budget["batch"] > 1 else ""
            )
            rows.append([where, *[""] * (width - 1)])
            peaks = budget["peak_rss_bytes"]
            rows += [row(name, entry, peaks.get(name)) for name, entry in test["rungs"].items()]
    return rows


def _token_row(name: str, entry: Mapping[str, Any], peak_bytes: int | None) -> list[str]:
    return [
        _label(name), *_speed(entry), figures.number(entry["tpot_ms"]["median"]),
        percent(entry.get("hit_rate"), 0, ""), percent(entry.get("late_hit_rate"), 0, ""),
        _megabytes(entry.get("demand_mb_per_token")), _megabytes(entry.get("prefetch_mb_per_token")),
        _megabytes(entry.get("prefetch_wasted_mb_per_token")), figures.number(entry.get("stall_ms_per_step")),
        _peak(peak_bytes),
    ]  # fmt: skip


def _prompt_row(name: str, entry: Mapping[str, Any], peak_bytes: int | None) -> list[str]:
    return [
        _label(name), *_speed(entry), figures.number(entry["ttft_ms"]["median"]), _megabytes(entry.get("read_mb")),
        _megabytes(entry.get("prefetch_mb")), figures.number(entry.get("stall_ms")), _peak(peak_bytes),
    ]  # fmt: skip


def _label(name: str) -> str:
    from foreroute.bench.rungs import LADDER

    return "  " + next(rung.label for rung in LADDER if rung.name == name)


def _speed(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    rate = entry["tokens_per_s"]
    spread = figures.number((rate["p75"] - rate["p25"]) / 2) if rate["repeats"] > 1 else NO_VALUE
    worth = entry["times_below"]
    return figures.number(rate["median"]), spread, figures.number(worth, decimals=2)


def _megabytes(value: float | None) -> str:
    return "0" if value == 0 else figures.number(value)


def _peak(num_bytes: int | None) -> str:
    return NO_VALUE if num_bytes is None else f"{figures.number(num_bytes / 2**30)}G"


def _print_grid(console: "Console", head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Like figures.print_grid, but closer, with block titles in bold and without columns that hold only dashes."""
    from rich.table import Table

    kept = [at for at in range(len(head)) if at == 0 or any(row[at] not in ("", NO_VALUE, "0") for row in rows)]
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for at in kept:
        table.add_column(head[at], no_wrap=True, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*(row[at] for at in kept), style=None if row[0].startswith(" ") else "bold")
    console.print(table)


def _print_ceilings(console: "Console", found: Mapping[str, Any]) -> None:
    measured = found["ceilings"]
    rows: list[figures.Row] = []
    disk = measured["disk_bytes_per_s"]
    if disk is not None:
        how = "O_DIRECT" if measured["disk_is_direct"] else "through the page cache: perhaps RAM's speed, not a disk's"
        span = figures.span(disk["min"] / 1e9, disk["max"] / 1e9, "GB/s")
        rows.append(("disk", format_speed(disk["median"]),
                     f"{span} while this ran, {how}; one token's experts take "
                     f"{figures.number(measured['token_from_disk_ms'])} ms"))  # fmt: skip
    if measured["memory_bytes_per_s"] is not None:
        rows.append(("memory", format_speed(measured["memory_bytes_per_s"]),
                     f"read and written in a copy; one token's experts take "
                     f"{figures.number(measured['token_from_memory_ms'])} ms"))  # fmt: skip
    figures.print_rows(console, rows)


def _where(difference: Mapping[str, Any]) -> str:
    case = difference["case"]
    run = "the run that warms up" if difference["repeat"] == 0 else f"repeat {difference['repeat']}"
    return (
        f"First difference: {difference['one']} against {difference['other']}, prompt of {case['prompt_tokens']} "
        f"tokens, batch {case['batch']}, {run}: row {difference['row']}, new token {difference['new_token']}. "
        "`foreroute verify MODEL` says where it begins."
    )
