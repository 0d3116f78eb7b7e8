"""What `foreroute pack --quant` asks beside packing: a codec's cost on a text, and which experts get more bits."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.codecs import CODECS
from foreroute.cli import figures, options
from foreroute.errors import EvaluationError, StoreError

if TYPE_CHECKING:
    from foreroute.evals.quantised import Reading
    from foreroute.evals.text import Windows
    from foreroute.model.skeleton import Outline
    from foreroute.prepare.quantise import Quantiser

_DEFAULT_SHARE = 0.25


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of --quant: the text, and those of mixed bits."""
    group = parser.add_argument_group("quality of --quant")
    group.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 text on which the store is priced, also one that is there",
    )
    group.add_argument(
        "--windows", type=options.at_least(1), default=28, metavar="N",
        help="at most so many windows of each file (default: 28)",
    )  # fmt: skip
    group.add_argument(
        "--context", type=options.at_least(2), metavar="N", help="tokens per window (default: 512, or the model's)"
    )
    group.add_argument("--memory", metavar="MEMORY", help="for experts while reading the text (default: chosen)")
    group.add_argument(
        "--threads", type=options.at_least(1), metavar="N", help="torch threads (default: one per usable core)"
    )
    mixed = parser.add_argument_group("--quant mixed")
    mixed.add_argument(
        "--int8-share", type=_share, metavar="SHARE", help='of all experts, those in int8: "25%%" (default: 25%%)'
    )
    mixed.add_argument(
        "--predictor", default="auto", metavar="PATH",
        help='the fit that knows which are used most: "auto", a path, or "no" to count on --text (default: auto)',
    )  # fmt: skip


def _share(text: str) -> float:
    number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the experts: give one between 0 and 100 %")
    return number


def refuse_misfits(args: argparse.Namespace) -> None:
    """Raises StoreError for flags that do not go together."""
    if args.text and args.quant is None:
        raise StoreError("Without --quant the output stays the same to the bit: --text has nothing to price.")
    if args.int8_share is not None and args.quant != "mixed":
        raise StoreError("--int8-share belongs to --quant mixed, which is not given.")


@dataclass
class Quality:
    """The text that a store is priced on, and what was read of it so far. windows: empty where there is no text."""

    args: argparse.Namespace
    folder: Path
    windows: "list[Windows]" = field(default_factory=list)
    stored: "Reading | None" = None

    def read_stored(self, *, counts_uses: bool = False) -> "Reading":
        """The text under the model as it is stored."""
        if self.stored is None:
            self.stored = self._read("auto", "reading as stored", counts_uses)
        return self.stored

    def price(self, store: Path) -> dict[str, Any] | None:
        """What the store costs on the text; None where there is no text."""
        from foreroute.evals.quantised import compared

        if not self.windows:
            return None
        stored = self.read_stored()
        return compared(stored, self._read(str(store), f"reading in {self.args.quant}", counts_uses=False))

    def _read(self, packed: str, what: str, counts_uses: bool) -> "Reading":
        from foreroute.evals.quantised import read

        options.apply_threads(self.args)
        with figures.counting_bar(what, sum(len(one.ids) for one in self.windows), "windows", self.args.json) as show:
            return read(self.folder, packed, self.windows, self.args.memory, show, counts_uses=counts_uses)


def quality_of(args: argparse.Namespace, folder: Path, sketch: "Outline") -> Quality:
    """The text of --text cut into windows, before anything is packed.

    Raises:
        EvaluationError: a file cannot be read, or is too short for a window.
    """
    if not args.text:
        return Quality(args, folder)
    from foreroute.cli.commands.fit import context_of
    from foreroute.evals.text import cut_windows
    from foreroute.model.text import load_tokenizer
    from foreroute.reading import read_text

    texts = {str(path): read_text(path, EvaluationError) for path in args.text}
    context = context_of(sketch.config, args.context)
    shares = dict.fromkeys(texts, 1.0)
    return Quality(args, folder, cut_windows(texts, shares, load_tokenizer(folder), context, args.windows))


def make_quantiser(
    args: argparse.Namespace, sketch: "Outline", path: Path, quality: Quality, check_room: Callable[[Any], None]
) -> "Quantiser":
    """The quantiser that the flags ask for; for mixed bits after the experts have been chosen.

    Args:
        path: of the store; the choice of one that was begun there is kept.
        check_room: is called with the table of what will be stored, before any work.
    """
    from foreroute.checkpoint.codecs import encoded_table
    from foreroute.prepare.choosing import most_used
    from foreroute.prepare.quantise import Quantiser

    codec = CODECS[args.quant]
    if not codec.often:
        quantiser = Quantiser(sketch.table, codec, sketch.is_transposed)
        check_room(quantiser.table)
        return quantiser
    share = args.int8_share or _DEFAULT_SHARE
    widths = [layer.num_experts for layer in sketch.table.layers]
    # As many experts as will be chosen, whichever they are: what does not fit is said before uses are counted.
    some, _ = most_used([[1] * width for width in widths], share)
    check_room(encoded_table(sketch.table, codec, sketch.is_transposed, some))
    often, choice = _begun(path, sketch, share, args) or _choose(args, sketch, quality, share)
    return Quantiser(sketch.table, codec, sketch.is_transposed, often=often, choice=choice)


def _begun(
    path: Path, sketch: "Outline", share: float, args: argparse.Namespace
) -> tuple[list[frozenset[int]], dict[str, Any]] | None:
    from foreroute.checkpoint.records import partial_path, stored_choice

    found = stored_choice(partial_path(path), sketch.table) if args.resume else None
    if found is None or found[0]["int8_share"] != share:
        return None
    return found[1], found[0]


def _choose(
    args: argparse.Namespace, sketch: "Outline", quality: Quality, share: float
) -> tuple[list[frozenset[int]], dict[str, Any]]:
    from foreroute.prepare.choosing import fitted_counts, in_table_order, most_used

    with figures.busy("Looking for a fit", args.json):
        fitted = fitted_counts(quality.folder, sketch, args.predictor)
    if fitted is not None:
        counts, by = fitted
    elif quality.windows:
        counts, by = in_table_order(quality.read_stored(counts_uses=True).counts, sketch.table), "text"
    else:
        raise StoreError(
            "--quant mixed must know which experts are used most. Fit the model first (`foreroute fit MODEL --text "
            "FILE`), or give --text FILE, on which uses are counted."
        )
    often, used = most_used(counts, share)
    return often, {"int8_share": share, "by": by, "uses": sum(map(sum, counts)), "share_of_uses": used}


def check_choice(choice: Mapping[str, Any], args: argparse.Namespace, path: Path) -> None:
    """Raises StoreError where a store that is there was made with another --int8-share than is asked for."""
    if args.int8_share is not None and choice and choice["int8_share"] != args.int8_share:
        raise StoreError(
            f"{path} has {100 * choice['int8_share']:g} % of its experts in int8, not {100 * args.int8_share:g} %. "
            "--force packs over it."
        )


def tell_choice(choice: Mapping[str, Any], per_layer: list[int]) -> None:
    """Which experts have more bits, and how they were chosen."""
    by = "the text" if choice["by"] == "text" else choice["by"]
    least, most = min(per_layer), max(per_layer)
    span = f"{least}" if least == most else f"{least} to {most}"
    print(
        f"In int8: {sum(per_layer)} experts, {span} of each layer, which had {100 * choice['share_of_uses']:.0f} % of "
        f"the uses that {by} counted; the others in int4."
    )


def tell_quality(found: Mapping[str, Any], codec: str) -> None:
    """The store beside the model as stored, on the text."""
    console = figures.stdout_console()
    rows = [
        [name, f"{one['perplexity']:.4g}", f"{one['bits_per_char']:.4f}"]
        for name, one in (("as stored", found["stored"]), (codec, found["packed"]))
    ]
    rows.append(
        ["difference", f"{100 * found['perplexity_delta']:+.2f} %", f"{100 * found['bits_per_char_delta']:+.2f} %"]
    )
    figures.print_grid(console, (f"{found['tokens']:,} tokens", "perplexity", "bits/char"), rows)
