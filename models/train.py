"""Make one of the shipped models, from nothing to its model card; interrupted runs resume.

    python models/train.py foreroute-tiny         # also -oss, -dsv3, -draft, -switch
    python models/train.py --smoke                # under a minute: the same code on very small models
    python models/train.py NAME --prepare-only    # data, tokenizer and held-out splits alone

Progress is a JSON line every 20 steps. Checkpoints lie under --work; kill the command at any time and start it again.
With --stable-steps the stable phase is cut earlier or later than the recipe says: the rate is constant there, so any
point of it can be cooled down into a finished model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python models/train.py` finds the package

import torch

from models import card, data, loop, sources
from models.evaluate import evaluate
from models.export import export, load_trained
from models.families import RECIPES, SMOKE, SMOKE_DRAFT, SMOKE_SWITCH, Recipe, recipe_of

SMOKE_BITS = 0.7  # the smoke run must lower the held-out bits per character by at least this much


def train(recipe: Recipe, work: Path, stable_steps: int, decay_steps: int, num_ranks: int) -> Path:
    """Run what is still missing of the stable phase and of the decay; returns the finished checkpoint."""
    folder = work / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    stable, cut = folder / "stable.pt", folder / f"stable-{stable_steps}.pt"
    final = folder / f"final-{stable_steps}-{decay_steps}.pt"
    if final.exists():
        return final
    if not cut.exists():
        resume = stable if stable.exists() else None
        loop.run(recipe, work, stable, loop.Span(0, stable_steps, None), resume, num_ranks)
        cut.write_bytes(stable.read_bytes())
    part = folder / "decay.pt"
    span = loop.Span(stable_steps, stable_steps + decay_steps, stable_steps)
    loop.run(recipe, work, part, span, part if part.exists() else cut, num_ranks)
    part.replace(final)
    return final


def finish(recipe: Recipe, work: Path, checkpoint: Path, folder: Path, options: argparse.Namespace) -> None:
    """Export, evaluate, write figures.json, history.json, the curves and the model card."""
    history = export(recipe, checkpoint, work, folder)
    (folder / "history.json").write_text(
        json.dumps([card.rounded(entry) for entry in history], indent=0), encoding="utf-8"
    )
    torch.set_num_threads(2)
    figures = evaluate(folder, work, options.per_kind, options.windows)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    card.write(recipe, folder, options.note)
    print(card.summary(figures))


def smoke() -> None:
    """Train very small models on the standard library and the tasks: with experts, dense, an
    encoder-decoder; fails when one does not learn."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        python = [source for source in sources.SOURCES if source.package is None]
        data.prepare(work, python, max_chars=2_000_000, vocab_size=SMOKE.config().vocab_size)
        for recipe in (SMOKE, SMOKE_DRAFT, SMOKE_SWITCH):
            _smoke_run(recipe, work)


def _smoke_run(recipe: Recipe, work: Path) -> None:
    """Train and compare with the untrained model."""
    began = time.perf_counter()
    final = train(recipe, work, recipe.stable_steps, recipe.decay_steps, num_ranks=1)
    before, after = (
        loop.objective_of(recipe, work, model).held_out_bits()
        for model in (loop.build(recipe), load_trained(recipe, final)[0])
    )
    print(f"{recipe.name}: held-out bits/char {before:.2f} -> {after:.2f} in {time.perf_counter() - began:.0f} s")
    if before - after < SMOKE_BITS:
        raise SystemExit(f"{recipe.name}: held-out bits/char must fall by {SMOKE_BITS}: training is broken")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=sorted(RECIPES))
    parser.add_argument("--smoke", action="store_true", help="prove that training works, on very small models")
    parser.add_argument("--work", type=Path, default=Path("build/models"), help="data and checkpoints (2 GB)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the exported folder's parent")
    parser.add_argument("--prepare-only", action="store_true", help="regenerate data and held-out splits, no training")
    parser.add_argument("--stable-steps", type=int, help="cut the stable phase here instead of where the recipe says")
    parser.add_argument("--decay-steps", type=int)
    parser.add_argument("--seed", type=int, help="another seed: the model is then called NAME-seedN")
    parser.add_argument("--processes", type=int, default=2, help="training processes, one core each")
    parser.add_argument("--per-kind", type=int, default=100, help="held-out items per kind in the evaluation")
    parser.add_argument("--windows", type=int, default=28, help="held-out windows per source in the evaluation")
    parser.add_argument("--note", default="", help="what is particular to these weights, for the model card")
    options = parser.parse_args()
    if options.smoke:
        smoke()
        return
    if options.model is None:
        parser.error("name a model or give --smoke")
    recipe = recipe_of(options.model if options.seed is None else f"{options.model}-seed{options.seed}")
    data.prepare(options.work)
    if options.prepare_only:
        return
    final = train(
        recipe,
        options.work,
        options.stable_steps or recipe.stable_steps,
        options.decay_steps or recipe.decay_steps,
        options.processes,
    )
    finish(recipe, options.work, final, options.out / recipe.name, options)


if __name__ == "__main__":
    main()
