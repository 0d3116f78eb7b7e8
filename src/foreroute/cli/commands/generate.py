"""`foreroute generate`: continue a prompt, print text as it is generated, and show the run's figures."""

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures, options
from foreroute.errors import GrammarError, PromptError
from foreroute.whole_files import read_text

if TYPE_CHECKING:
    from foreroute.loading.offloaded_model import OffloadedModel
    from foreroute.structured.grammar import Grammar

_EPILOG = """\
examples:
  foreroute generate MODEL "The capital of France is" --memory 8GiB
  foreroute generate MODEL --file question.txt --memory 25% --max-new-tokens 400
  git diff | foreroute generate MODEL - --system "Review this change." --json

the figures (on standard error, after the text):
  TTFT         time to first token, from the start of the prompt's prefill
  TPOT         time per output token after that: (last - first) / (n - 1)
  hits         experts that were in memory when a token (after the first)
               needed them
  late hits    experts whose prefetch was in flight; the token waited for the
               rest of the read
  misses       experts that were read while the token waited
  read         MB per token: demand loads, and prefetches. A prefetch is used
               when its expert is demanded, wasted when it is evicted before
  from         where experts are read, if a packed store is used
  stall        ms per token in which nothing was computed, waiting for the disk
  evictions    experts that lost their place in memory to others
  prefetching  how much is prefetched now: the governor tries full width, half
               and none, and keeps the fastest (--no-governor: full always)
  drafted      with --draft: tokens that the model would have chosen itself, of
               those drafted; several steps' worth are verified in one
  peak RSS     the most memory this process had, loading included
Only the text goes to standard output. Ctrl-C ends the answer, and shows the
figures too."""


def add_parser(commands: Any) -> None:
    """Add `generate` to the commands."""
    parser = commands.add_parser(
        "generate",
        help="generate text from a prompt",
        usage="foreroute generate MODEL [PROMPT] [flags]",
        description="Continue or answer a prompt: print the text as it comes, then figures.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help='the prompt; "-" reads it from standard input')
    parser.add_argument("--file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the model's chat template (default: when the model has one)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")
    parser.add_argument("--quiet", action="store_true", help="print the text alone, without figures")
    options.add_common_options(parser)
    add_sampling(parser)
    _add_structure(parser)
    options.add_model_options(parser)
    options.add_engine_options(parser)
    options.shorten_help(parser)


def _add_structure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("structured output")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON that is valid by this JSON schema")
    one.add_argument("--regex", metavar="PATTERN", help="text that matches all of this (Rust's syntax)")
    one.add_argument("--grammar", type=Path, metavar="FILE", help="text of this grammar (Lark or GBNF)")


def _grammar(args: argparse.Namespace) -> "Grammar | None":
    """The grammar of the answer, not compiled yet.

    Raises:
        GrammarError: it cannot be one; its flag or file is named.
    """
    if args.json_schema is None and args.regex is None and args.grammar is None:
        return None
    from foreroute.structured.grammar import Grammar

    try:
        if args.json_schema is not None:
            return Grammar.json_schema(read_text(args.json_schema))
        return Grammar.regex(args.regex) if args.regex is not None else Grammar.grammar(read_text(args.grammar))
    except GrammarError as error:
        raise GrammarError(f"{_named(args)}: {error}") from error


def _named(args: argparse.Namespace) -> str:
    return str(args.json_schema or args.grammar or "--regex")


def _processors(
    args: argparse.Namespace, grammar: "Grammar | None", model: "OffloadedModel", tokenizer: Any, chat: str | None
) -> dict[str, Any]:
    """What holds the answer to its grammar. chat: the prompt, where it came through the chat template."""
    if grammar is None:
        return {}
    from foreroute.structured.compiler import GrammarCompiler
    from foreroute.structured.reasoning import behind_reasoning

    try:
        grammar = grammar if chat is None else behind_reasoning(grammar, tokenizer, chat)
        return {"logits_processor": [GrammarCompiler.of(model, tokenizer).compile(grammar).processor()]}
    except GrammarError as error:
        raise GrammarError(f"{_named(args)}: {error}") from error


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int = 128) -> None:
    """Add the sampling flags to `parser`; `max_new_tokens` is the default length limit of an answer."""
    group = parser.add_argument_group(
        "sampling", "named as in transformers; without them, the model's own settings hold"
    )
    group.add_argument(
        "--max-new-tokens",
        type=options.at_least(1),
        default=max_new_tokens,
        metavar="N",
        help=f"most tokens of an answer (default: {max_new_tokens})",
    )
    group.add_argument(
        "--do-sample", action=argparse.BooleanOptionalAction, help="sample tokens; --no-do-sample takes the likeliest"
    )
    group.add_argument(
        "--temperature", type=options.between(0), metavar="X", help="higher is more random; 0 does not sample"
    )
    group.add_argument("--top-k", type=options.at_least(1), metavar="N", help="sample from the N likeliest tokens")
    share = options.between(0, 1, open_below=True)
    group.add_argument(
        "--top-p", type=share, metavar="X", help="sample from the likeliest tokens that have this probability together"
    )
    group.add_argument(
        "--min-p",
        type=options.between(0, 1),
        metavar="X",
        help="drop tokens below X times the likeliest's probability",
    )
    group.add_argument(
        "--repetition-penalty",
        type=options.between(0, open_below=True),
        metavar="X",
        help="above 1: tokens seen before become less likely",
    )
    group.add_argument("--seed", type=options.at_least(0), metavar="N", help="the same seed samples the same tokens")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for transformers' generate: only those that were given, so that the model's own settings hold.

    A temperature, top-k, top-p or min-p turns sampling on.

    Raises:
        PromptError: one of them is given together with --no-do-sample.
    """
    drawing = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    asked = {name: value for name, value in drawing.items() if value is not None}
    do_sample = args.do_sample
    if asked.get("temperature") == 0:
        if do_sample:
            raise PromptError("--temperature 0 takes the likeliest token: leave out --do-sample.")
        asked, do_sample = {}, False
    elif asked and do_sample is False:
        raise PromptError(f"--{next(iter(asked)).replace('_', '-')} needs sampling: leave out --no-do-sample.")
    elif asked:
        do_sample = True
    asked.update(do_sample=do_sample, repetition_penalty=args.repetition_penalty)
    return {name: value for name, value in asked.items() if value is not None}


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    # Wrong flags or paths are reported before seconds of imports.
    prompt, config, sampled = options.read_prompt(args.prompt, args.file), options.engine_config(args), sampling(args)
    grammar = _grammar(args)
    system = None if args.system is None else options.argument_text(args.system, "--system")
    folder = options.find_model(args)
    options.quiet_libraries(args)
    is_quiet = args.quiet or args.json
    with figures.busy("Loading the model", is_quiet):
        import torch

        import foreroute
        from foreroute.generation.generate import generate
        from foreroute.model.config_file import read_config, refuse_encoder_decoder
        from foreroute.model.text import encode_prompt, load_tokenizer
        from foreroute.model.tokenizer_files import default_template

        options.apply_threads(args)
        told, chat = read_config(folder), args.chat
        if chat or system is not None:
            refuse_encoder_decoder(told, folder, "It answers one text, and no chat: leave --chat and --system out.")
        tokenizer = load_tokenizer(folder)
        # An encoder-decoder may have the template of the tokenizer that it shares with a chat model.
        chat = False if told.is_encoder_decoder else chat
        prompt_ids = encode_prompt(tokenizer, prompt, chat=chat, system=system)
        is_chat = grammar is not None and chat is not False and default_template(tokenizer) is not None
        as_chat = tokenizer.decode(prompt_ids[0], skip_special_tokens=False) if is_chat else None
    with figures.loading(is_quiet) as progress:
        model = foreroute.load(folder, dtype=args.dtype, config=config, progress=progress)
    with closing(model.foreroute):
        if args.seed is not None:
            torch.manual_seed(args.seed)
        report = generate(
            model,
            tokenizer,
            prompt_ids,
            on_text=figures.writer(sys.stdout, is_quiet=args.json),
            max_new_tokens=args.max_new_tokens,
            **_processors(args, grammar, model, tokenizer, as_chat),
            **sampled,
        )
    if args.json:
        figures.print_json(
            model=args.model,
            text=report.text,
            finish_reason=report.finish_reason,
            loop=report.loop,
            prefetch_why=report.prefetch_why,
            token_ids=report.token_ids,
            figures=report.figures(),
            plan=model.foreroute.plan,
        )
    else:
        print(flush=True)
        if not args.quiet:
            figures.print_report(report, model.foreroute.plan)
    return 130 if report.finish_reason == "interrupted" else 0
