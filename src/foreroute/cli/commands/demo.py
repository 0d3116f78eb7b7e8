"""`foreroute demo`: the shipped model with a quarter of its experts in memory, compared with the resident model."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import foreroute
from foreroute import shipped
from foreroute.checkpoint.locate import locate
from foreroute.cli import figures, options
from foreroute.config import Plan
from foreroute.errors import CheckpointError
from foreroute.units import format_memory

if TYPE_CHECKING:
    import torch

    from foreroute.generation.generate import GenerationReport

MODEL_NAME = "foreroute-tiny"
_PROMPT = "Mon 3 Jul + 6 days"

_EPILOG = """\
examples:
  foreroute demo
  foreroute demo --memory 50% --eviction lru    another setting, the same tokens
  foreroute demo --model FOLDER --memory 8GiB   your model; it must fit the RAM

It generates with most experts on disk, then loads the same model with plain
transformers, every expert in memory (experts_implementation="eager"), generates
again and compares the tokens one by one. Greedy, the same dtype and threads.

the figures:
  evictions    experts that lost their place in memory to others: 0 means that
               the memory was not small
  prefetches   prefetched experts that were then demanded: 0 means that no
               prefetch was of use
  same tokens  the comparison; "no" names the first token that differs
Exit code 1 when tokens differ, or when nothing was evicted or prefetched though
memory and flags called for it: the comparison would then prove nothing."""


def add_parser(commands: Any) -> None:
    """Add `demo` to the commands."""
    parser = commands.add_parser(
        "demo",
        help="run the shipped model, and check that its tokens are the same",
        usage="foreroute demo [PROMPT] [flags]",
        description="Run the shipped model with a quarter of its experts in memory; check it.",
        epilog=_EPILOG,
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default=_PROMPT, help=f'default: "{_PROMPT}"')
    parser.add_argument("--model", metavar="FOLDER", help="another model in place of the one that ships")
    parser.add_argument(
        "--max-new-tokens", type=options.at_least(1), default=64, metavar="N", help="most tokens (default: 64)"
    )
    options.add_common_options(parser)
    # In float32, where bits are promised to be equal for every family.
    options.add_model_options(parser, dtype="float32")
    options.add_engine_options(parser, without=("draft", *options.GPU_FIELDS), memory="25%")


def find_model() -> Path:
    """Find the shipped model's folder: in the installed package, or in the repository beside it.

    Raises:
        CheckpointError: it is in neither.
    """
    found = shipped.shipped_models().get(MODEL_NAME)
    if found is not None:
        return found
    places = [place / MODEL_NAME for place in shipped.places()]
    raise CheckpointError(
        f"The demo's model is missing: neither {places[0]} nor {places[1]} holds it. "
        "Run the demo from the repository, or name a Mixture-of-Experts model with --model."
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    config, prompt = options.engine_config(args), options.argument_text(args.prompt, "The prompt")
    folder = find_model() if args.model is None else locate(options.alias_target(args, args.model))
    options.quiet_libraries(args)
    console = figures.stdout_console(is_quiet=args.json)
    with figures.busy("Loading the model", args.json):
        from foreroute.generation.generate import generate
        from foreroute.model.text import encode_prompt, load_tokenizer

        options.apply_threads(args)
        tokenizer = load_tokenizer(folder)
        # The shipped model answers questions; another one continues the text.
        is_chat = args.model is None
        prompt_ids = encode_prompt(tokenizer, prompt, chat=is_chat)
    with figures.loading(args.json) as progress:
        model = foreroute.load(folder, dtype=args.dtype, config=config, progress=progress)
    plan = model.foreroute.plan
    with closing(model.foreroute):
        console.print(_introduction(plan) + (" It is asked:\n" if is_chat else " It continues this text:\n"))
        write = figures.writer(sys.stdout, is_quiet=args.json)
        write(prompt + ("\n" if is_chat else ""))
        report = generate(
            model, tokenizer, prompt_ids, on_text=write, max_new_tokens=args.max_new_tokens, do_sample=False
        )
        write("\n")
    if report.finish_reason == "interrupted":
        return 130
    console.print()
    figures.print_rows(console, _account(report))
    console.print()
    with figures.busy("Now the same with every expert in memory, by plain transformers", args.json):
        expected = resident_tokens(plan, prompt_ids, args.max_new_tokens)
    verdict, stats = compare(report.token_ids, expected, tokenizer), report.stats
    inert = figures.inert_features(plan, stats.evictions, stats.decode.prefetch_used)
    console.print(f"same tokens as the resident model: {verdict}", style="bold", markup=False)
    for complaint in inert:
        console.print(complaint)
    is_same = report.token_ids == expected
    if args.json:
        figures.print_json(
            same_tokens=is_same,
            verdict=verdict,
            inert=inert,
            text=report.text,
            token_ids=report.token_ids,
            resident_token_ids=expected,
            figures=report.figures(),
            plan=plan,
        )
    return 0 if is_same and not inert else 1


def resident_tokens(plan: Plan, prompt_ids: "torch.Tensor", max_new_tokens: int) -> tuple[int, ...]:
    """Continue prompt_ids [1, tokens] by max_new_tokens, greedily, by transformers alone: eager, dtype as in `plan`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        plan.folder, dtype=getattr(torch, plan.compute_dtype), experts_implementation="eager"
    ).eval()
    out = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        disable_compile=True,
    )
    return tuple(out[0, prompt_ids.shape[1] :].tolist())


def compare(ours: Sequence[int], expected: Sequence[int], tokenizer: Any) -> str:
    """Compare tokens `ours` with `expected`: "yes (64 of 64)", or "no" with the first difference, by `tokenizer`."""
    if ours == expected:
        return f"yes ({len(ours)} of {len(expected)})"
    at = next((i for i, pair in enumerate(zip(ours, expected, strict=False)) if pair[0] != pair[1]), -1)
    if at < 0:
        return f"no: {len(ours)} tokens in place of {len(expected)}"
    ours_text, expected_text = (repr(tokenizer.decode([ids[at]])) for ids in (ours, expected))
    return (
        f"no: token {at + 1} of {len(expected)} is {ours_text} ({ours[at]}) "
        f"in place of {expected_text} ({expected[at]})"
    )


def _introduction(plan: Plan) -> str:
    top_k = "/".join(str(k) for k in sorted(set(plan.top_k)))
    return (
        f"{Path(plan.folder).name} has {plan.total_slots} experts in {plan.num_layers} layers; a token uses {top_k} in "
        f"each. They take {format_memory(plan.total_expert_bytes)} on disk. There is memory for "
        f"{plan.num_slots} of them, {format_memory(plan.memory_bytes)}."
    )


def _account(report: "GenerationReport") -> list[figures.Row]:
    decode = report.stats.decode
    demanded = decode.hits + decode.late_hits + decode.misses
    return [
        ("new tokens", f"{len(report.token_ids)}", figures.number(report.figures()["tokens_per_s"], "tokens/s")),
        ("experts demanded", f"{demanded:,}",
         f"{decode.hits:,} hits, {decode.late_hits:,} late hits, {decode.misses:,} misses"),
        ("evictions", f"{report.stats.evictions:,}", "experts that lost their place in memory"),
        ("prefetches used", f"{report.stats.decode.prefetch_used:,}",
         f"of {decode.prefetch_loads:,} experts prefetched"),
    ]  # fmt: skip
