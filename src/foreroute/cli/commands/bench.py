"""`foreroute bench`: how fast the model is here, what each part of the engine gains, and how far the bound is."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import bench_tables, figures, options
from foreroute.errors import ForerouteError

if TYPE_CHECKING:
    from foreroute.bench.asked import Asked
    from foreroute.types import NamedProgress

EXIT_DIFFERENT, EXIT_INTERRUPTED = 1, 130
# Copy of LADDER in bench/rungs.py, which imports too much for --help; a test holds them equal.
RUNGS = ("on-demand", "cache", "hits-first", "prefetch", "oracle", "belady", "resident")

# Defaults of flags: (normally, with --quick).
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "memory": (["12.5%", "25%", "50%", "100%"], ["25%"]),
    "prompt": ([32, 512, 4096], [32]),
    "new_tokens": (128, 24),
    "batch": ([1, 4], [1]),
    "repeats": (5, 2),
}

_EPILOG = """\
examples:
  foreroute bench MODEL --quick                 first: under a minute on a small
                                                model
  foreroute bench MODEL --png ladder.png        everything; minutes to hours
  foreroute bench MODEL --memory 8GiB -p 512 -b 1 --rungs prefetch resident
                                                one budget, as it will be used
  foreroute bench MODEL --packed q4_k --quick   quantised experts (see pack)
  foreroute bench MODEL --json > runs.json      every figure and every raw run

the ladder, each rung with one thing more than the one below:
  on-demand        every expert is read when a token needs it, and not kept
  + cache          experts stay in memory until they are evicted
  + hits first     resident experts are computed while others are read
  + prefetch       the next layer's experts are guessed and prefetched, where
                   that gains time (--governor): foreroute as it is
  oracle prefetch  the next layer's experts are known and prefetched, always
  Belady bound     arithmetic, not a run: the fewest bytes that any cache could
                   have read, at the disk's best speed, or the time of compute
                   alone where that is longer
  fully resident   every expert in memory from the start

the tests are named as llama-bench names them:
  pp512        a prompt of 512 tokens: tokens/s until the first new token (TTFT)
  tg128        128 tokens after the first -p: tokens/s after the first one. They
               are the text's own next tokens, so that all rungs do the same and
               the routes are those of text, not of a loop
the columns:
  t/s, ±       tokens per second of all rows together: median, and half of the
               range between the quartiles
  x            how many times as fast as the rung above it in the table (the
               lower rung), by the repeats of one round
  TPOT, TTFT   ms per step of new tokens, ms until the first one
  hit, late    hits and late hits, in %: experts that were resident, or whose
               prefetch was in flight, when demanded; the others are misses
  MB           read on demand; prefetch: prefetched; waste: of those, evicted
               before any use. Per token, for prompts per prompt
  stall        ms in which nothing was computed, per step or prompt
  RSS          peak memory in GiB, as if this rung ran alone
Rungs take turns (A-B-B-A), each with a separate model. One run warms up: it
is the cold one, with an empty pool, in --json. Experts are read past the page
cache (O_DIRECT). The disk's speed is measured on this model's own experts, in
between. Random weights show mechanics only: their routes are not a model's.

Exit code 0: done. 1: the rungs' tokens differ, no time is shown. 130: Ctrl-C;
what was measured is shown."""


def add_parser(commands: Any) -> None:
    """Add `bench` to the commands."""
    parser = commands.add_parser(
        "bench",
        help="measure the speed here, and what each part gains",
        usage="foreroute bench MODEL [flags]",
        description="Measure a model here, from on-demand loading to all experts in memory.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    count = options.at_least(1)
    parser.add_argument("--memory", nargs="+", metavar="M", help=_help("budgets for experts, as in generate", "memory"))
    parser.add_argument(
        "-p", "--prompt", type=count, nargs="+", metavar="N",
        help=_help("tokens of the prompts; those beyond the model's context are left out", "prompt"),
    )  # fmt: skip
    parser.add_argument(
        "-n", "--new-tokens", type=_new_tokens, metavar="N",
        help=_help("tokens after the first prompt; 0 for prompts alone", "new_tokens"),
    )  # fmt: skip
    parser.add_argument("-b", "--batch", type=count, nargs="+", metavar="N", help=_help("rows at once", "batch"))
    parser.add_argument(
        "-r", "--repeats", type=count, metavar="N", help=_help("runs of each case, after one that warms up", "repeats")
    )
    parser.add_argument(
        "--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), metavar="RUNG",
        help=f"only these of {', '.join(RUNGS)}",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: a passage that is built in)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short run: fewer cases and repeats; other flags still hold"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the ladder, and speed over memory")
    options.add_common_options(parser)
    options.add_model_options(parser)
    options.add_engine_options(
        parser,
        without=(
            "memory",
            "cache",
            "hits_first",
            "prefetch",
            "policy",
            "deterministic",
            "trace",
            "draft",
            *options.GPU_FIELDS,
        ),
    )


def _help(text: str, name: str) -> str:
    always, quick = (" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in _DEFAULTS[name])
    return f"{text} (default: {always}; --quick: {quick})".replace("%", "%%")


def _new_tokens(text: str) -> int:
    value = int(text)
    if value < 0 or value == 1:
        raise argparse.ArgumentTypeError(f"{value} must be 0, or at least 2: the time between tokens is measured")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    folder = options.find_model(args)
    options.quiet_libraries(args)
    with figures.busy("Looking at the model", args.json):
        from foreroute.bench import plot
        from foreroute.bench.asked import settle
        from foreroute.bench.results import as_json
        from foreroute.bench.session import Session
        from foreroute.bench.windows import read_windows

        options.apply_threads(args)
        if args.png is not None:
            plot.check(args.png)
        settled = settle(folder, asked_by(args))
        windows = read_windows(folder, args.text, settled.vocab_size)
    session = Session(settled, windows)
    with run_bar(session.num_runs, args.json) as session.progress:
        seen = session.run()
    found = as_json(settled, seen, windows.source)
    if args.json:
        figures.print_json(**found)
    else:
        bench_tables.show(found)
    if args.png is not None and found["budgets"]:
        plot.draw(found, args.png)
    if seen.difference is not None:
        return EXIT_DIFFERENT
    return EXIT_INTERRUPTED if seen.is_interrupted else 0


def asked_by(args: argparse.Namespace) -> "Asked":
    """Build `Asked` from the flags; missing ones get their defaults, shorter ones with --quick.

    Raises:
        ForerouteError: nothing is left to measure, or the engine refuses a flag.
    """
    from foreroute.bench.asked import Asked
    from foreroute.bench.rungs import rungs_named

    def given(name: str) -> Any:
        value = getattr(args, name)
        return _DEFAULTS[name][args.quick] if value is None else value

    rungs = rungs_named(args.rungs)
    if not any(rung.is_measured for rung in rungs):
        raise ForerouteError("The Belady bound is arithmetic on what others measure. Add a rung, such as prefetch.")
    return Asked(
        memories=tuple(dict.fromkeys(given("memory"))),
        may_drop=args.memory is None,
        prompts=tuple(dict.fromkeys(given("prompt"))),
        new_tokens=given("new_tokens"),
        batches=tuple(dict.fromkeys(given("batch"))),
        repeats=given("repeats"),
        rungs=rungs,
        dtype=args.dtype,
        config=options.engine_config(args, without=("memory",)),
    )


@contextmanager
def run_bar(total: int, is_quiet: bool) -> Iterator["NamedProgress"]:
    """Show a bar of `total` runs on standard error unless `is_quiet`; call the result with (what runs, done, total)."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:<44}"),
        progress.BarColumn(bar_width=16),
        progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=figures.stderr_console(), disable=is_quiet, transient=True) as bar:
        task = bar.add_task("Measuring disk and memory", total=total)

        def show(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        yield show
