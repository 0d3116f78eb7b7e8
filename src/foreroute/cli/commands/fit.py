"""`foreroute fit`: learn from text which experts come next, and write the predictors beside the checkpoint."""

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures, options
from foreroute.config import EngineConfig
from foreroute.errors import PredictorError
from foreroute.units import format_memory
from foreroute.whole_files import beside, check_writable

if TYPE_CHECKING:
    from foreroute.loading.offloaded_model import OffloadedModel
    from foreroute.predict.sidecar import Sidecar

_EPILOG = """\
examples:
  foreroute fit MODEL --text notes/*.txt   beside MODEL: used automatically
  foreroute fit MODEL --text book.txt --out p.safetensors
  foreroute generate MODEL ... --predictor p.safetensors

One pass over the text, with the experts offloaded as usual. An eighth of the
text is held out, to choose each layer's best predictor. Some ten thousand
tokens of the kind that the model will read are enough. The fit needs memory
beside the experts: 2.2 GB for Qwen3-30B-A3B. The same command continues a fit
that was stopped. The output stays the same to the bit: guesses only decide what
is prefetched."""


def add_parser(commands: Any) -> None:
    """Add `fit` to the commands."""
    parser = commands.add_parser(
        "fit",
        help="fit predictors to text, for better guesses",
        usage="foreroute fit MODEL --text FILE... [flags]",
        description="Fit predictors of the next layer's experts to a model.",
        epilog=_EPILOG,
    )
    add_text_options(parser, tokens=65536)
    parser.add_argument("--out", type=Path, metavar="PATH", help="file or folder (default: beside the checkpoint)")
    parser.add_argument("--force", action="store_true", help="fit again, even where a fit exists")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="continue a stopped fit (default: yes)"
    )
    parser.add_argument(
        "--on-policy",
        action="store_true",
        help="fit twice, the second time on the states of a run that waits for no expert; for approximate policies",
    )
    parser.add_argument("--estimator", action="store_true", help="also train the paper's estimator, a small network")
    _add_estimator(parser)
    options.add_common_options(parser)
    options.add_model_options(parser)
    add_memory_options(parser)


def _add_estimator(parser: argparse.ArgumentParser) -> None:
    """Add flags for the estimator's size and training: one per field of EstimatorSettings that users may change."""
    group = parser.add_argument_group("estimator")
    for name, default, text in (
        ("shrink", 2, "m: hidden width over inner width"),
        ("widen", 2, "n: width of its MLP over inner width"),
        ("epochs", 8, "times that each token is trained on"),
    ):
        group.add_argument(
            f"--estimator-{name}",
            type=options.at_least(1),
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )


def add_text_options(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Add MODEL, the text and its windows to `parser`, for `fit` and `score`; `tokens` is the default of --tokens."""
    options.add_model(parser)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--tokens",
        type=options.at_least(2),
        default=tokens,
        metavar="N",
        help=f"most tokens to use, spread evenly over the text (default: {tokens:,})",
    )
    parser.add_argument(
        "--context", type=options.at_least(2), metavar="N", help="tokens per window (default: 512, or the model's)"
    )
    parser.add_argument(
        "--rows",
        type=options.at_least(1),
        default=8,
        metavar="N",
        help="windows per forward pass: more read each expert less often, and take more memory (default: 8)",
    )


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add --memory and --packed, as the engine has them."""
    group = parser.add_argument_group("engine")
    group.add_argument("--memory", metavar="MEMORY", help="memory for experts (default: chosen from free RAM)")
    group.add_argument("--packed", default="auto", metavar="PACKED", help='packed store: "auto", "no" or a path')


def context_of(config: Any, asked: int | None) -> int:
    """Tokens per window: as `asked`, else what suits a model with this transformers config."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 512
    return min(asked or 512, longest)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    folder = options.find_model(args)
    config = EngineConfig(memory=args.memory, packed=args.packed, predictor="no")
    options.quiet_libraries(args)
    with figures.busy("Loading the model", args.json):
        import foreroute
        from foreroute.checkpoint.locate import read_index
        from foreroute.model.generation_settings import decoder_start
        from foreroute.model.text import load_tokenizer
        from foreroute.predict.sidecar import SIDECAR_NAME
        from foreroute.prepare.corpus import read_corpus

        options.apply_threads(args)
        path = options.place_beside(folder, SIDECAR_NAME, args.out)
        _check_place(path, force=args.force)
        index = read_index(folder)
        tokenizer = load_tokenizer(folder)
    with figures.loading(args.json) as progress:
        model = foreroute.load(folder, dtype=args.dtype, config=config, progress=progress)
    with closing(model.foreroute):
        # Raises where files changed in between: the fingerprint is that of the loaded model, or none.
        fingerprint = index.fingerprint()
        corpus = read_corpus(
            tokenizer, args.text, args.tokens, context_of(model.config, args.context), decoder_start(model)
        )
        sidecar = _fit(args, model, fingerprint, corpus, path)
    _tell(args, sidecar, path, is_beside=path == beside(folder, SIDECAR_NAME))
    return 0


def _check_place(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise PredictorError(f"{path} exists already. --force fits again and replaces it.")
    if not path.parent.is_dir():
        raise PredictorError(f"{path.parent} is not a folder. Choose another --out.")
    check_writable(path, PredictorError, "Choose another --out, and give that to --predictor.")


def _fit(args: argparse.Namespace, model: "OffloadedModel", fingerprint: str, corpus: Any, path: Path) -> "Sidecar":
    from foreroute.prepare.estimator_training import EstimatorSettings
    from foreroute.prepare.fit import FitSettings, fit

    estimator = None
    if args.estimator:
        estimator = EstimatorSettings(args.estimator_shrink, args.estimator_widen, args.estimator_epochs)
    with figures.counting_bar("fitting", corpus.num_tokens, "tokens", args.json) as show:
        return fit(
            model,
            fingerprint,
            corpus,
            path,
            settings=FitSettings(
                rows=args.rows,
                estimator=estimator,
                on_policy=args.on_policy,
            ),
            progress=show,
            resume=args.resume,
        )


def _tell(args: argparse.Namespace, sidecar: "Sidecar", path: Path, *, is_beside: bool) -> None:
    about = sidecar.about
    recall = {name: scores["mean"]["recall_k"] for name, scores in about["held_out"].items()}
    if args.json:
        figures.print_json(
            path=str(path),
            nbytes=path.stat().st_size,
            fingerprint=sidecar.fingerprint,
            found_automatically=is_beside,
            choice=sidecar.choice,
            **about,
        )
        return
    console = figures.stdout_console()
    how = "used automatically from now on" if is_beside else f"use it with --predictor {path}"
    console.print(f"Wrote {path}: {format_memory(path.stat().st_size)}, {how}.", soft_wrap=True)
    rows: list[figures.Row] = [
        ("tokens", f"{about['tokens']['fitted']:,}", f"+ {about['tokens']['held_out']:,} held out")
    ]
    for name, value in recall.items():
        if value is not None:
            uses = sum(chosen == name for chosen in sidecar.choice)
            rows.append((name, figures.percent(value), f"recall of the top-k, held out; chosen in {uses} layers"))
    first = about["held_out"].get("token table")
    if first is not None:
        rows.append(
            ("token table", figures.percent(first["recall_k"][0]), "recall in layer 0, from the token in its context")
        )
    figures.print_rows(console, rows)
