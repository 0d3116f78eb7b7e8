"""Measure and print what `foreroute pack --quant` costs on a text."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.codecs import EARLIER, STORED, codecs_that_fit
from foreroute.cli import figures, options
from foreroute.errors import EvaluationError, StoreError

if TYPE_CHECKING:
    from foreroute.evals.quantised import Reading
    from foreroute.evals.text import TextWindows
    from foreroute.model.build.skeleton import Outline

# Names of --quant in earlier versions that are still understood.
RENAMED = tuple(name for name in EARLIER if name != "mixed")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of --quant: the text, and how it is cut."""
    group = parser.add_argument_group("quality of --quant and --dense")
    group.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 text on which the store's loss is measured; also for a store that exists",
    )
    group.add_argument(
        "--windows", type=options.at_least(1), default=28, metavar="N",
        help="most windows of each file (default: 28)",
    )  # fmt: skip
    group.add_argument(
        "--context", type=options.at_least(2), metavar="N", help="tokens per window (default: 512, or the model's)"
    )
    group.add_argument("--memory", metavar="MEMORY", help="for experts while reading the text (default: chosen)")
    group.add_argument(
        "--threads", type=options.at_least(1), metavar="N", help="torch threads (default: one per usable core)"
    )


def choose_codec(args: argparse.Namespace, sketch: "Outline") -> None:
    """Set `args.quant`, where it is an earlier version's name, to the codec that this model's rows can take; say so.

    Says also when the checkpoint is quantised already.
    """
    if args.quant is None:
        return
    notes = []
    if args.quant in RENAMED:
        fitting = codecs_that_fit(sketch.table)
        names = EARLIER[args.quant]
        chosen = next((name for name in names if name in fitting), names[0])
        why = "" if chosen == names[0] else f" ({names[0]} needs rows of whole blocks of 256 weights)"
        notes.append(f"--quant {args.quant} is {chosen} now{why}, in GGUF's blocks.")
        args.quant = chosen
    if sketch.table.stored_as:
        notes.append(
            f"This checkpoint's experts are quantised already ({sketch.table.stored_as}), and --quant {args.quant} "
            "quantises them a second time. `foreroute pack` alone keeps them as they are."
        )
    for note in notes if not args.json else ():
        figures.stderr_console().print(note)


def refuse_misfits(args: argparse.Namespace) -> None:
    """Raise StoreError for flags that do not go together."""
    if args.text and args.quant is None and args.dense is None:
        raise StoreError(
            "Without --quant or --dense the weights stay the same to the bit: --text has nothing to price."
        )


@dataclass
class Quality:
    """The text on which a store is compared. windows: empty where there is no text."""

    args: argparse.Namespace
    folder: Path
    windows: "list[TextWindows]" = field(default_factory=list)

    def price(self, store: Path) -> dict[str, Any] | None:
        """Measure the store's loss on the text; None where there is no text."""
        from foreroute.checkpoint.records import packed_as
        from foreroute.evals.quantised import compared

        if not self.windows:
            return None
        stored = self._read("auto", "reading as stored")
        name = packed_as(self.args.quant or STORED, self.args.dense)
        return compared(stored, self._read(str(store), f"reading in {name}"))

    def _read(self, packed: str, what: str) -> "Reading":
        from foreroute.evals.quantised import read

        options.apply_threads(self.args)
        with figures.counting_bar(what, sum(len(one.ids) for one in self.windows), "windows", self.args.json) as show:
            return read(self.folder, packed, self.windows, self.args.memory, show)


def quality_of(args: argparse.Namespace, folder: Path, sketch: "Outline") -> Quality:
    """Cut the text in `args` into windows for the model in `folder`, outlined by `sketch`, before anything is packed.

    Raises:
        EvaluationError: a file cannot be read, or is too short for a window.
    """
    if not args.text:
        return Quality(args, folder)
    from foreroute.cli.commands.fit import context_of
    from foreroute.evals.text import cut_windows
    from foreroute.model.text import load_tokenizer
    from foreroute.whole_files import read_text

    texts = {str(path): read_text(path, EvaluationError) for path in args.text}
    context = context_of(sketch.config, args.context)
    shares = dict.fromkeys(texts, 1.0)
    return Quality(args, folder, cut_windows(texts, shares, load_tokenizer(folder), context, args.windows))


def tell_quality(found: Mapping[str, Any], packed: str) -> None:
    """Print the figures `found` on the text: the store of this name beside the model as stored."""
    console = figures.stdout_console()
    rows = [
        [name, f"{one['perplexity']:.4g}", f"{one['bits_per_char']:.4f}"]
        for name, one in (("as stored", found["stored"]), (packed, found["packed"]))
    ]
    rows.append(
        ["difference", f"{100 * found['perplexity_delta']:+.2f} %", f"{100 * found['bits_per_char_delta']:+.2f} %"]
    )
    figures.print_grid(console, (f"{found['tokens']:,} tokens", "perplexity", "bits/char"), rows)
