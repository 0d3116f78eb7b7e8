"""`foreroute score`: measure how many of the next experts are predicted, beside controls."""

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures, options
from foreroute.cli.commands.fit import add_memory_options, add_text_options, context_of
from foreroute.config import EngineConfig

if TYPE_CHECKING:
    import torch

    from foreroute.loading.offloaded_model import OffloadedModel
    from foreroute.prepare.score import Scores
    from foreroute.prepare.timeliness import Timeliness

# Tokens that one prompt is continued by.
_DECODE_TOKENS = 64

_EPILOG = """\
examples:
  foreroute score MODEL --text held-out.txt --png recall.png
  foreroute score MODEL --text held-out.txt --memory 25% --decode 256

the figures:
  @k, @k+2, @2k  share of the routed experts that are in a guess of that width
  set            share of tokens all of whose experts are among the k guessed
  missed         share of the gate weight that was not among the k guessed
  layer 0        @k of the first MoE layer, guessed from token and context
  us/token       time that one token's guesses take over all layers
All are means over the MoE layers after the first. The oracle is the router on
its own input and must read 100 %; random reads k / experts; shuffled is the
best predictor's guess given to another token.

Use text that nothing was fitted to."""


def add_parser(commands: Any) -> None:
    """Add `score` to the commands."""
    parser = commands.add_parser(
        "score",
        help="measure how good the guesses are, on your text",
        usage="foreroute score MODEL --text FILE... [flags]",
        description="Score a model's predictors, and controls, on text.",
        epilog=_EPILOG,
    )
    add_text_options(parser, tokens=16384)
    parser.add_argument("--predictor", default="auto", metavar="PATH", help='fitted predictors: "auto", "no" or a path')
    parser.add_argument(
        "--decode",
        type=options.at_least(0),
        default=0,
        metavar="N",
        help="also continue the text by N tokens, at --memory and with all guesses prefetched, and count those that "
        "came in time (default: 0)",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot recall per layer (needs matplotlib)")
    options.add_common_options(parser)
    options.add_model_options(parser)
    add_memory_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    folder = options.find_model(args)
    # What is scored is the predictor: the governor would leave out its guesses where they do not save time here.
    config = EngineConfig(
        memory=args.memory, packed=args.packed, predictor=args.predictor, prefetch_prefill="off", governor=False
    )
    options.quiet_libraries(args)
    with figures.busy("Loading the model", args.json):
        import foreroute
        from foreroute.checkpoint.locate import read_index
        from foreroute.model.generation_settings import decoder_start
        from foreroute.model.text import load_tokenizer
        from foreroute.predict.build import open_sidecar
        from foreroute.prepare import plot
        from foreroute.prepare.corpus import read_corpus
        from foreroute.prepare.score import score

        if args.png is not None:
            plot.check(args.png)
        options.apply_threads(args)
        tokenizer = load_tokenizer(folder)
        sidecar = open_sidecar(folder, read_index(folder), config)
    with figures.loading(args.json) as progress:
        model = foreroute.load(folder, dtype=args.dtype, config=config, progress=progress)
    with closing(model.foreroute):
        context = context_of(model.config, args.context)
        corpus = read_corpus(tokenizer, args.text, args.tokens, context, decoder_start(model))
        with figures.counting_bar("scoring", corpus.num_tokens, "tokens", args.json) as show:
            scores = score(model, corpus.windows, sidecar, rows=args.rows, progress=show)
        timely = _decode(model, corpus.windows, args.decode, args.json) if args.decode else None
    if args.png is not None:
        plot.draw(scores, args.png, title=folder.name)
    if args.json:
        figures.print_json(model=args.model, corpus=corpus.digest, timeliness=timely, **scores.as_dict())
    else:
        _print(scores, is_fitted=sidecar is not None)
        if timely is not None:
            _print_timeliness(timely)
    return 0


def _decode(model: "OffloadedModel", windows: "torch.Tensor", num_tokens: int, is_quiet: bool) -> "Timeliness":
    """Continue the beginnings of some windows, by `num_tokens` in all."""
    from foreroute.prepare.corpus import calls_of
    from foreroute.prepare.timeliness import timeliness

    read, _ = calls_of(model, windows[: max(1, num_tokens // _DECODE_TOKENS)])
    prompts = read["input_ids"]
    if not model.config.is_encoder_decoder:
        prompts = prompts[:, : windows.shape[1] // 2]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or windows.shape[1]
    # At least two: the first token is prefill's. Never past the model's context; the decoded count is shown.
    each = max(2, min(num_tokens // len(prompts), context - prompts.shape[1]))
    with figures.counting_bar("decoding", each * len(prompts), "tokens", is_quiet) as show:
        return timeliness(model, prompts, each, show)


def _print_timeliness(timely: "Timeliness") -> None:
    demanded = timely.resident + timely.in_time + timely.late_hits + timely.misses
    rows: list[figures.Row] = [
        ("decoded", f"{timely.tokens:,}", f"tokens; {demanded:,} experts demanded, {timely.resident:,} still resident"),
        ("in time", f"{timely.in_time:,}", f"of {timely.prefetched:,} experts prefetched"),
        ("late hits", f"{timely.late_hits:,}", "prefetched, and still in flight when they were demanded"),
        ("wasted", f"{timely.wasted:,}", "prefetched, and evicted before any demand"),
        ("misses", f"{timely.misses:,}", "demanded, with no read in flight"),
    ]
    console = figures.stdout_console()
    console.print()
    figures.print_rows(console, rows)


def _print(scores: "Scores", *, is_fitted: bool) -> None:
    head = (f"k = {scores.top_k}", "@k", "@k+2", "@2k", "set", "missed", "layer 0", "us/token")
    grid = []
    for name, entry in scores.as_dict()["predictors"].items():
        mean = entry["mean"]
        shares = [mean[figure] for figure in ("recall_k", "recall_k2", "recall_2k", "exact_set_k", "missed_mass")]
        shares.append(entry["recall_k"][0])
        grid.append([name, *(figures.percent(share, 1, "") for share in shares), figures.number(entry["cost_us"])])
    console = figures.stdout_console()
    figures.print_grid(console, head, grid)
    console.print(f"In %, {scores.num_tokens:,} tokens, means over the MoE layers after the first.", style="dim")
    if not is_fitted:
        console.print("Nothing is fitted to this model yet: `foreroute fit` makes better guesses.", style="dim")
