"""`foreroute eval`: what a model's output is worth, by tasks with one right answer and by held-out text."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.locate import locate
from foreroute.cli import figures, options
from foreroute.cli.fit import context_of
from foreroute.errors import EvaluationError

if TYPE_CHECKING:
    from foreroute.evals.builtin import Progress

_EPILOG = """\
examples:
  foreroute eval MODEL --suite builtin             tasks and held-out text
  foreroute eval MODEL --suite builtin --kinds add sort --windows 0
  foreroute eval MODEL --text book.txt             bits per character alone

the figures:
  right       greedy answers that are right to the last token, steps included;
              the range is the 95 % interval of the share
  bits/char   nats of the text's tokens / ln 2 / characters; windows without
              context before them; "all" weighs sources as training did

The builtin suite is what the models that ship are trained for: another model
reads its tasks without having seen their form. Its text is made by
`make held-out` in a checkout. The same model, flags and --threads give the same
figures."""


def add_parser(commands: Any) -> None:
    """Add `eval` to the commands."""
    parser = commands.add_parser(
        "eval",
        help="how good the output is: tasks and held-out text",
        usage="foreroute eval MODEL (--suite builtin | --text FILE...) [flags]",
        description="Measure a model's answers and its grasp of text, experts offloaded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=("builtin",), help="tasks with one right answer, and held-out text")
    what.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text to read instead")
    parser.add_argument(
        "--kinds", nargs="+", default=(), metavar="KIND", help="ask these kinds of tasks only (default: all)"
    )
    parser.add_argument(
        "--per-kind", type=options.at_least(0), metavar="N", help="items per kind (default: 100; 0: none)"
    )
    parser.add_argument(
        "--windows", type=options.at_least(0), default=28, metavar="N",
        help="at most so many windows of each source or file (default: 28; 0: no text)",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=options.at_least(2), metavar="N", help="tokens per window (default: 512, or the model's)"
    )
    parser.add_argument(
        "--batch", type=options.at_least(1), default=50, metavar="N", help="items answered together (default: 50)"
    )
    parser.add_argument("--seed", type=options.at_least(0), default=0, metavar="N", help="of the items (default: 0)")
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="the suite's text (default: where `make held-out` writes it)"
    )
    options.add_common_options(parser)
    options.add_model_options(parser)
    options.add_engine_options(parser)


def default_held_out() -> Path:
    """Where the suite's text lies: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "foreroute" / "held-out.json"


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    if args.text and (args.kinds or args.held_out or args.per_kind is not None):
        raise EvaluationError("--kinds, --per-kind and --held-out belong to --suite; there is --text here.")
    if args.text and not args.windows:
        raise EvaluationError("--windows 0 leaves nothing to read of --text. Give at least 1.")
    config = options.engine_config(args)
    folder = locate(args.model)
    options.quiet_libraries(args)
    with figures.busy("Loading the model", args.json):
        import foreroute
        from foreroute.engine.text import load_tokenizer, read_text
        from foreroute.evals.builtin import SuiteSettings, check_kinds, run_suite, run_text
        from foreroute.evals.text import read_held_out

        options.apply_threads(args)
        held_out = None if args.text else read_held_out(args.held_out or default_held_out())
        if held_out is not None:
            check_kinds(held_out, args.kinds)
        texts = [(_name(path), read_text(path, EvaluationError)) for path in args.text or ()]
        tokenizer = load_tokenizer(folder)
        model = foreroute.load(folder, dtype=args.dtype, config=config)
    settings = SuiteSettings(
        100 if args.per_kind is None else args.per_kind,
        tuple(args.kinds),
        args.windows,
        context_of(model, args.context),
        args.batch,
        args.seed,
    )
    try:
        with _bars(args.json) as show:
            if held_out is None:
                found = run_text(model, tokenizer, texts, settings, show)
            else:
                found = run_suite(model, tokenizer, held_out, settings, show)
        memory = model.foreroute.plan.memory_bytes
    finally:
        model.foreroute.close()
    if args.json:
        figures.print_json(model=args.model, suite=args.suite, memory_bytes=memory, seed=args.seed, **found)
    else:
        _print(found)
    return 0


def _name(path: Path) -> str:
    """What the figures call a file: its path, which two files of one name do not share; "all" is the mean."""
    return "./all" if str(path) == "all" else str(path)


@contextlib.contextmanager
def _bars(is_quiet: bool) -> Iterator["Progress"]:
    """One progress bar per thing that is being done, on standard error."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    tasks: dict[str, progress.TaskID] = {}
    with progress.Progress(*columns, console=figures.stderr_console(), disable=is_quiet) as bar:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield show


def _print(found: dict[str, Any]) -> None:
    console = figures.stdout_console()
    if found["accuracy"]:
        grid = [
            [kind, "yes" if one["multi_step"] else "", f"{one['right']} of {one['asked']}",
             figures.percent(one["share"]), f"{100 * one['low']:.0f} to {100 * one['high']:.0f} %"]
            for kind, one in found["accuracy"].items()
        ]  # fmt: skip
        figures.print_grid(console, ("task", "steps", "right", "share", "95 % interval"), grid)
    if found["bits_per_char"]:
        if found["accuracy"]:
            console.print()
        grid = [[source, f"{bits:.3f}"] for source, bits in found["bits_per_char"].items()]
        figures.print_grid(console, ("held-out text", "bits/char"), grid)
        console.print(f"{found['scored_tokens']:,} tokens scored.", style="dim")
