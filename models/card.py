"""The model card: figures and curves from figures.json and history.json of an exported folder."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from foreroute.evals.tasks import kinds
from foreroute.memory import host
from foreroute.memory.host import usable_cpus
from models import card_text as text
from models import sources
from models.families import Recipe
from models.seq2seq import rows

Entry = dict[str, float]


def rounded(entry: Entry) -> Entry:
    """A history entry with four significant decimals, as it is stored."""
    return {key: round(value, 4) for key, value in entry.items()}


def cpu_name() -> str:
    """The processor as /proc/cpuinfo names it, with the cores that this process may use."""
    return f"{host.cpu_name() or platform.processor()}, {usable_cpus()} cores"


def plot(history: list[Entry], title: str, path: Path) -> None:
    """Loss, bits per character and the worst expert's load over training tokens, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    named = [
        ("loss", "training loss, nats/token"),
        ("bits_per_char", "held-out bits/char"),
        ("worst_load", "max/mean load"),
    ]
    named = [(key, label) for key, label in named if any(key in entry for entry in history)]
    figure, axes = pyplot.subplots(1, len(named), figsize=(4 * len(named), 3.2))
    for axis, (key, label) in zip(axes, named, strict=True):
        points = [(entry["tokens"] / 1e6, entry[key]) for entry in history if key in entry]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else "")
        axis.set_xlabel("million tokens")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def summary(figures: dict[str, Any]) -> str:
    """The figures in a few lines, for the terminal."""
    accuracy = ", ".join(f"{kind} {share:.0%}" for kind, share in figures["accuracy"].items())
    told = f"{figures['bits_per_char']['all']:.3f} bits/char; {accuracy}"
    for name, found in figures.get("acceptance", {}).items():
        told += f"; {name} accepts {found['text']['all']:.0%} of text, {found['tasks']['all']:.0%} of exercises"
    if routers := figures.get("router"):
        told += (
            f"; max/mean load {max(layer['max_over_mean'] for layer in routers):.2f}, entropy "
            f"{min(layer['entropy'] for layer in routers):.3f}, previous-token reuse {_mean_reuse(routers):.3f} "
            f"(untrained {_mean_reuse(figures['router_untrained']):.3f})"
        )
    return told


def _mean_reuse(routers: list[dict[str, float]]) -> float:
    return sum(layer["reuse"] for layer in routers) / len(routers)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _accuracy_table(figures: dict[str, Any]) -> str:
    # `define` is a kind only with a glossary of some words.
    about = kinds({str(number): "gloss" for number in range(9)})
    rows = [
        [kind, about[kind].about, "yes" if about[kind].multi_step else "", f"{share:.0%}"]
        for kind, share in figures["accuracy"].items()
    ]
    return _table(["kind", "what", "multi-step", f"right of {figures['per_kind']}"], rows)


def _router_section(figures: dict[str, Any], layers: str) -> str:
    if "router" not in figures:
        return ""
    rows = [
        [str(int(new["layer"])), f"{new['max_over_mean']:.2f}", f"{new['entropy']:.3f}", str(int(new["dead_experts"])),
         f"{new['reuse']:.3f}", f"{old['reuse']:.3f}"]
        for new, old in zip(figures["router"], figures["router_untrained"], strict=True)
    ]  # fmt: skip
    head = ["MoE layer", "load max/mean", "entropy / uniform", "dead", "reuse", "reuse untrained"]
    return text.ROUTERS.format(layers=layers, table=_table(head, rows))


def _text_table(figures: dict[str, Any]) -> str:
    """Sources, and bits per character in a column for each way that it was measured."""
    measured = {"held-out bits/char": figures["bits_per_char"]}
    if "bits_per_char_tail" in figures:
        measured = {"spans, bits/char": figures["bits_per_char"], "tail, bits/char": figures["bits_per_char_tail"]}
    rows = [
        [source.name, source.package or "Python's standard library", source.licence, f"{source.share:.0%}",
         *(f"{column[source.name]:.3f}" for column in measured.values())]
        for source in sources.SOURCES
    ]  # fmt: skip
    rows.append(["all", "", "", "100%", *(f"{column['all']:.3f}" for column in measured.values())])
    return _table(["source", "Debian package", "licence", "share of text", *measured], rows)


def _acceptance_section(figures: dict[str, Any], window: int) -> str:
    if "acceptance" not in figures:
        return ""
    rows = [
        [name, f"{found['text']['all']:.0%}", f"{found['tasks']['all']:.0%}"]
        for name, found in figures["acceptance"].items()
    ]
    by_kind = next(iter(figures["acceptance"].items()))
    kinds_table = _table(
        [f"kind, beside {by_kind[0]}", "the same"],
        [[kind, f"{share:.0%}"] for kind, share in by_kind[1]["tasks"].items() if kind != "all"],
    )
    table = _table(["model it drafts for", "on text", "on exercises"], rows)
    return text.ACCEPTANCE.format(window=window, table=f"{table}\n\n{kinds_table}")


def _samples(figures: dict[str, Any]) -> str:
    short = (one for one in figures["samples"] if len(one["prompt"]) < 160)
    blocks = [f"```text\n{one['prompt']}\n=> {one['got']}\n(expected: {one['expected']})\n```" for one in short]
    return "\n".join(blocks)


def write(recipe: Recipe, folder: Path, note: str = "") -> None:
    """Write README.md and curves.png beside the exported model, from its figures and history.

    `note` says what is particular to these weights; it is kept in the folder for later cards.
    """
    if note:
        (folder / "note.txt").write_text(note + "\n", encoding="utf-8")
    elif (folder / "note.txt").exists():
        note = (folder / "note.txt").read_text(encoding="utf-8").strip()
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    last = history[-1]
    plot(history, recipe.name, folder / "curves.png")
    balance = "; a load-balance loss per layer" if "router" in figures else ""
    words = _words(recipe, figures)
    card = text.CARD.format(
        **words,
        name=recipe.name,
        parameters=figures["parameters"] / 1e6,
        class_name=config["architectures"][0],
        routing=recipe.routing,
        cpu=cpu_name(),
        minutes=last["seconds"] / 60,
        tokens=last["tokens"] / 1e6,
        steps=int(last["step"]),
        acceptance=_acceptance_section(figures, recipe.seq_len),
        accuracy=_accuracy_table(figures),
        text=_text_table(figures),
        python=platform.python_version(),
        balance=balance + (" and an aux-loss-free correction bias" if recipe.bias_rate else ""),
        seed=recipe.seed,
        text_share=recipe.text_share,
        samples=_samples(figures),
        note=f"\n{note}\n" if note else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _words(recipe: Recipe, figures: dict[str, Any]) -> dict[str, str]:
    """What the card says of a sort of model: encoder-decoder, draft, or decoder with experts."""
    names = {"name": recipe.name, "target": recipe.drafts_for}
    if recipe.config().is_encoder_decoder:
        return {
            "tag": "mixture-of-experts",
            "what": text.SWITCH,
            "knows": text.SWITCH_KNOWS,
            "example": text.SWITCH_EXAMPLE.format(**names),
            "text_intro": text.SWITCH_TEXT.format(
                scored=figures["scored_tokens"], window=rows.WINDOW, spans=rows.SPANS, tail=rows.TAIL
            ),
            "routers": _router_section(figures, text.SWITCH_LAYERS),
        }
    draft = bool(recipe.drafts_for)
    return {
        "tag": "draft" if draft else "mixture-of-experts",
        "what": text.DRAFT.format(**names) if draft else text.MOE,
        "knows": text.KNOWS,
        "example": (text.DRAFT_EXAMPLE if draft else text.EXAMPLE).format(**names),
        "text_intro": text.TEXT.format(scored=figures["scored_tokens"], window=recipe.seq_len),
        "routers": _router_section(figures, ""),
    }
