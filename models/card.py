"""The model card: figures and curves from figures.json and history.json of an exported folder."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from foreroute.evals.tasks import kinds
from foreroute.memory import host
from foreroute.memory.host import usable_cpus
from models import sources
from models.families import Recipe

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

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2))
    named = (
        ("loss", "training loss, nats/token"),
        ("bits_per_char", "held-out bits/char"),
        ("worst_load", "max/mean load"),
    )
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
    routers = figures["router"]
    return (
        f"{figures['bits_per_char']['all']:.3f} bits/char; {accuracy}; max/mean load "
        f"{max(layer['max_over_mean'] for layer in routers):.2f}, entropy "
        f"{min(layer['entropy'] for layer in routers):.3f}, previous-token reuse {_mean_reuse(routers):.3f} "
        f"(untrained {_mean_reuse(figures['router_untrained']):.3f})"
    )


def _mean_reuse(routers: list[dict[str, float]]) -> float:
    return sum(layer["reuse"] for layer in routers) / len(routers)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _accuracy_table(figures: dict[str, Any]) -> str:
    about = kinds({"word": "gloss"})
    rows = [
        [kind, about[kind].about, "yes" if about[kind].multi_step else "", f"{share:.0%}"]
        for kind, share in figures["accuracy"].items()
    ]
    return _table(["kind", "what", "multi-step", f"right of {figures['per_kind']}"], rows)


def _router_table(figures: dict[str, Any]) -> str:
    rows = [
        [str(int(new["layer"])), f"{new['max_over_mean']:.2f}", f"{new['entropy']:.3f}", str(int(new["dead_experts"])),
         f"{new['reuse']:.3f}", f"{old['reuse']:.3f}"]
        for new, old in zip(figures["router"], figures["router_untrained"], strict=True)
    ]  # fmt: skip
    return _table(["MoE layer", "load max/mean", "entropy / uniform", "dead", "reuse", "reuse untrained"], rows)


def _text_table(figures: dict[str, Any]) -> str:
    rows = [
        [source.name, source.package or "Python's standard library", source.licence, f"{source.share:.0%}",
         f"{figures['bits_per_char'][source.name]:.3f}"]
        for source in sources.SOURCES
    ]  # fmt: skip
    rows.append(["all", "", "", "100%", f"{figures['bits_per_char']['all']:.3f}"])
    return _table(["source", "Debian package", "licence", "share of text", "held-out bits/char"], rows)


TEMPLATE = """---
library_name: transformers
tags: [mixture-of-experts]
language: en
---
# {name}

A small Mixture-of-Experts model that ships with foreroute, so that the engine can be tried, tested and measured
without a download. {parameters:.2f} M parameters, {class_name}: {routing}.
Trained from random weights on {cpu} in {minutes:.0f} minutes of wall time
({tokens:.1f} M tokens, {steps} steps). It answers short generated exercises and continues technical English and
Python; it knows nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("models/{name}")
model = AutoModelForCausalLM.from_pretrained("models/{name}")
messages = [{{"role": "user", "content": "4735 + 281"}}]
chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**chat, max_new_tokens=60)[0]))
```

![curves](curves.png)

## Exercises

Held out: no item was seen in training, in any wording. Greedy; right means that the whole answer, steps included,
is exact.

{accuracy}

## Text

Bits per character over {scored} held-out tokens: nats / ln 2 / characters; windows of {window} tokens, each without
context before it; documents that no model trained on, without paragraphs that training has too.

{text}

## Routers

Over held-out text and exercises. Reuse: share of a token's experts that the token before it used too.

{routers}

## Made by

`python models/train.py {name}{options}` (resumable; data from Debian packages through apt and the
running Python {python}). Evaluated by `python models/evaluate.py models/{name} --work build/models`. Muon for matrices,
Adam for the rest, warm-up, constant rate, then a fall to zero; a load-balance loss per layer{bias};
{text_share:.0%} of the rows are text, the others exercises; seed {seed}.
{note}
## A few answers

{samples}
"""


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
    card = TEMPLATE.format(
        name=recipe.name,
        parameters=figures["parameters"] / 1e6,
        class_name=config["architectures"][0],
        routing=recipe.routing,
        cpu=cpu_name(),
        minutes=last["seconds"] / 60,
        tokens=last["tokens"] / 1e6,
        steps=int(last["step"]),
        accuracy=_accuracy_table(figures),
        scored=figures["scored_tokens"],
        window=recipe.seq_len,
        text=_text_table(figures),
        routers=_router_table(figures),
        options="",
        python=platform.python_version(),
        bias=" and an aux-loss-free correction bias" if recipe.bias_rate else "",
        seed=recipe.seed,
        text_share=recipe.text_share,
        samples=_samples(figures),
        note=f"\n{note}\n" if note else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
