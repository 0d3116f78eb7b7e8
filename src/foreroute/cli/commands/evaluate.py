"""`foreroute eval`: how good a model's output is, by tasks with one right answer and by held-out text."""

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import evaluate_policies, figures, options
from foreroute.cli.commands.fit import context_of
from foreroute.config import EngineConfig
from foreroute.errors import EvaluationError
from foreroute.policy import Policy

if TYPE_CHECKING:
    from foreroute.evals.builtin import SuiteSettings
    from foreroute.evals.text import HeldOut
    from foreroute.loading.offloaded_model import OffloadedModel
    from foreroute.types import NamedProgress

    # (model, tokenizer, progress) -> accuracy by task.
    OtherTasks = Callable[[Any, OffloadedModel], dict[str, float]]

# Flags that need another flag; then their defaults where not None.
_BELONGS_TO = {
    "kinds": "suite", "per_kind": "suite", "held_out": "suite", "png": "policies",
    "include_path": "lm_eval", "limit": "lm_eval", "confirm_run_unsafe_code": "lm_eval",
}  # fmt: skip
_LEFT_OUT = {"kinds": (), "confirm_run_unsafe_code": False}

_EPILOG = """\
examples:
  foreroute eval MODEL --suite builtin             tasks and held-out text
  foreroute eval MODEL --suite builtin --kinds add sort --windows 0
  foreroute eval MODEL --text book.txt             bits per character alone
  foreroute eval MODEL --lm-eval arc_easy --limit 50
  foreroute eval MODEL --lm-eval humaneval --confirm-run-unsafe-code
  foreroute eval MODEL --suite builtin --memory none 25% --png prices.png
        --policies exact tolerance:0.1 speculative what each policy costs

the figures:
  right       greedy answers that are right to the last token, steps included;
              the range is the 95 % interval of the share
  bits/char   nats of the text's tokens / ln 2 / characters; windows without
              context before them; "all" weighs sources as training did

with --policies, one row for each policy and memory:
  memory none has no cache: at each layer, only the experts guessed for it are
  resident. Other memories decode token by token with a pool of that size.
  Every row is compared with exact decoding of the same tokens. --deterministic
  uses logical time (prefetches always arrive in time), so that two runs are
  equal; without it the disk's speed decides, and TPOT is measured. See
  docs/policies.md. A run that was stopped continues with the missing rows.

The shipped models are trained for the builtin suite; other models meet the form
of its tasks for the first time. Its text is made by
`make held-out` in a checkout. The same model, flags and --threads give the same
figures. --lm-eval needs: pip install 'foreroute[eval]'. Its tasks that run what
the model writes (humaneval, mbpp) do so on this machine, as this user, with no
sandbox, and only with --confirm-run-unsafe-code and HF_ALLOW_CODE_EVAL=1."""


class _NoSandbox(argparse.Action):
    """An old flag that allowed code in a sandbox, which is gone: an alias would allow more than was asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(
            "--allow-code-execution allowed code in a sandbox, which foreroute has no longer. lm-eval runs it without "
            "one: --confirm-run-unsafe-code allows that."
        )


def add_parser(commands: Any) -> None:
    """Add `eval` to the commands."""
    parser = commands.add_parser(
        "eval",
        help="measure the output's quality, and what policies cost",
        usage="foreroute eval MODEL (--suite builtin | --text FILE... | ...) [flags]",
        description="Measure a model's answers and its perplexity on text, and what policies cost.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=("builtin",), help="tasks with one right answer, and held-out text")
    what.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text to read instead")
    what.add_argument("--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-eval instead")
    what.add_argument(
        "--human-eval", dest="lm_eval", action="store_const", const=["humaneval"], help="as --lm-eval humaneval"
    )
    _add_policy_options(parser)
    _add_suite_options(parser)
    harness = parser.add_argument_group("lm-eval")
    harness.add_argument("--include-path", type=Path, metavar="FOLDER", help="more lm-eval tasks (YAML)")
    harness.add_argument("--limit", type=options.at_least(1), metavar="N", help="most items of each task")
    harness.add_argument(
        "--confirm-run-unsafe-code", action="store_true",
        help="run what the model writes, on this machine and without a sandbox, where a task asks for it",
    )  # fmt: skip
    harness.add_argument("--allow-code-execution", action=_NoSandbox, nargs=0, help=argparse.SUPPRESS)
    options.add_common_options(parser)
    options.add_model_options(parser)
    options.add_engine_options(parser, without=("memory", "trace", "draft", *options.GPU_FIELDS))


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", nargs="+", metavar="MEMORY",
        help='for experts: "8GiB", bytes, or "25%%"; several, and "none" (no cache), with --policies',
    )  # fmt: skip
    parser.add_argument(
        "--policies", nargs="+", metavar="POLICY", help="a row for each: exact, tolerance:TAU, speculative, paper"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --policies: plot loss against bytes and stalls")


def _add_suite_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kinds", nargs="+", default=(), metavar="KIND", help="ask these kinds of tasks only (default: all)"
    )
    parser.add_argument(
        "--per-kind", type=options.at_least(0), metavar="N", help="items per kind (default: 100; 0: none)"
    )
    parser.add_argument(
        "--windows", type=options.at_least(0), default=28, metavar="N",
        help="most windows of each source or file (default: 28; 0: no text)",
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


def cache_folder() -> Path:
    """The user's cache folder, for files that can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "foreroute"


def default_held_out() -> Path:
    """Path of the suite's held-out text."""
    return cache_folder() / "held-out.json"


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    _refuse_misfits(args)
    memory = args.memory[0] if args.memory and not args.policies else None
    config = dataclasses.replace(options.engine_config(args, without=("memory",)), memory=memory)
    folder = options.find_model(args)
    options.quiet_libraries(args)
    with figures.busy("Loading", args.json):
        from foreroute.evals.builtin import SuiteSettings, check_kinds
        from foreroute.evals.text import read_held_out
        from foreroute.model.config_file import read_config, refuse_encoder_decoder
        from foreroute.model.text import load_tokenizer
        from foreroute.whole_files import read_text

        options.apply_threads(args)
        held_out = read_held_out(args.held_out or default_held_out()) if args.suite else None
        if held_out is not None:
            check_kinds(held_out, args.kinds)
        texts = {_name(path): read_text(path, EvaluationError) for path in args.text or ()}
        others = _other_tasks(args)
        told = read_config(folder)
        refuse_encoder_decoder(told, folder, "eval scores texts that a model continues; `foreroute score` works on it.")
        tokenizer = load_tokenizer(folder)
    settings = SuiteSettings(
        100 if args.per_kind is None else args.per_kind, tuple(args.kinds), args.windows,
        context_of(told, args.context), args.batch, args.seed,
    )  # fmt: skip
    with _bars(args.json) as show:
        if args.policies:
            shares = dict.fromkeys(texts, 1.0)
            if held_out is not None:
                texts, shares = dict(held_out.texts), dict(held_out.shares)
            of_model = None if others is None else partial(others, tokenizer)
            material = evaluate_policies.material_of(
                tokenizer, texts, shares, held_out, settings, of_model, others_in_prompts=bool(args.lm_eval)
            )
            about = {"settings": dataclasses.asdict(settings), "others": _harness_of(args)}
            args.cache = cache_folder()
            return evaluate_policies.run(args, folder, config, tokenizer, material, about, show)
        found = _plain(args, folder, config, tokenizer, held_out, texts, settings, others, show)
    if args.json:
        figures.print_json(model=args.model, suite=args.suite, seed=args.seed, **found)
    else:
        _print(found)
    return 0


def _refuse_misfits(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before anything is loaded."""
    for name, needed in _BELONGS_TO.items():
        if getattr(args, name) != _LEFT_OUT.get(name) and not getattr(args, needed):
            flag, of = (f"--{one.replace('_', '-')}" for one in (name, needed))
            raise EvaluationError(f"{flag} belongs to {of}, which is not given.")
    memory = args.memory or []
    if args.text and not args.windows:
        raise EvaluationError("--windows 0 leaves nothing to read of --text. Give at least 1.")
    if not args.policies and (len(memory) > 1 or "none" in memory):
        raise EvaluationError('Several values of --memory, and "none", belong to --policies, which is not given.')
    if args.policy != "exact":
        raise EvaluationError(
            "Texts and likelihoods are prompts, which are exact under every --policy. Ask for "
            f"--policies {args.policy}, which decodes token by token."
        )
    for policy in args.policies or ():
        Policy.parse(policy)
    if args.lm_eval and args.policies and set(memory) - {"none"}:
        raise EvaluationError(
            "lm-eval's likelihoods are prompts, which are exact with any cache. Give --memory none: there every "
            "position is under the policy."
        )


def _harness_of(args: argparse.Namespace) -> dict[str, Any]:
    """What identifies another harness's figures: its task names, and the content of the user's own task files."""
    found: dict[str, Any] = {name: str(getattr(args, name)) for name in ("lm_eval", "limit")}
    files = sorted(args.include_path.rglob("*")) if args.include_path is not None else []
    found["files"] = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    return found


def _other_tasks(args: argparse.Namespace) -> "OtherTasks | None":
    """Build the function that --lm-eval asks for: from a model to accuracy by task."""
    if not args.lm_eval:
        return None
    from foreroute.evals.lm_eval_model import check_tasks, run_lm_eval

    allow_code = args.confirm_run_unsafe_code
    manager = check_tasks(args.lm_eval, args.include_path, allow_code=allow_code)
    return lambda tokenizer, model: (
        run_lm_eval(model, tokenizer, args.lm_eval, manager, args.limit, allow_code=allow_code).primary
    )


def _plain(
    args: argparse.Namespace,
    folder: Path,
    config: EngineConfig,
    tokenizer: Any,
    held_out: "HeldOut | None",
    texts: dict[str, str],
    settings: "SuiteSettings",
    others: "OtherTasks | None",
    show: "NamedProgress",
) -> dict[str, Any]:
    """Compute the figures of one model under one policy."""
    import foreroute
    from foreroute.evals.builtin import run_suite, run_text

    model = foreroute.load(folder, dtype=args.dtype, config=config)
    with closing(model.foreroute):
        if others is not None:
            found: dict[str, Any] = {"tasks": others(tokenizer, model)}
        elif held_out is None:
            found = run_text(model, tokenizer, list(texts.items()), settings, show)
        else:
            found = run_suite(model, tokenizer, held_out, settings, show)
        return {"memory_bytes": model.foreroute.plan.memory_bytes, **found}


def _name(path: Path) -> str:
    """Name a file in the figures by its path, which is unique; "all" is the mean."""
    return "./all" if str(path) == "all" else str(path)


@contextmanager
def _bars(is_quiet: bool) -> Iterator["NamedProgress"]:
    """Show one progress bar per activity on standard error."""
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
    if "tasks" in found:
        figures.print_grid(
            console, ("task", "score"), [[task, f"{value:.4f}"] for task, value in found["tasks"].items()]
        )
        return
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
