"""How well each predictor knows the route: every trained model, and its untrained twin, under the same predictors.

    python -m benchmarks.predictors models/foreroute-tiny models/foreroute-tiny-oss ... [--tokens 65536]

Held-out text (`make held-out`) is cut in two: predictors are fitted to the first half of every source and scored on the
second, on text that neither the models nor the predictors were trained on. The twin is the model before its first
training step: what a predictor reads there is a property of the probe, not of a model.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import foreroute
from benchmarks import _harness
from foreroute import EngineConfig
from foreroute.checkpoint.locate import read_index
from foreroute.cli.commands.evaluate import default_held_out
from foreroute.cli.commands.fit import context_of
from foreroute.evals.text import read_held_out
from foreroute.model.generation_settings import decoder_start
from foreroute.model.text import load_tokenizer
from foreroute.prepare import plot
from foreroute.prepare.corpus import read_corpus
from foreroute.prepare.estimator_training import EstimatorSettings
from foreroute.prepare.fit import FitSettings, fit
from foreroute.prepare.score import Scores, score
from models.export import untrained
from models.families import recipe_of

SHOWN = ("recall_k", "recall_k2", "recall_2k", "missed_mass")


def halves(held_out: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """The held-out text as files: the first half of every source, and the second."""
    files: tuple[list[Path], list[Path]] = ([], [])
    for source, text in read_held_out(held_out).texts.items():
        middle = text.rfind("\n\n", 0, len(text) // 2)
        for half, part in enumerate((text[:middle], text[middle:])):
            path = folder / f"{source}.{half}.txt"
            path.write_text(part, encoding="utf-8")
            files[half].append(path)
    return files


def measure(folder: Path, files: tuple[list[Path], list[Path]], tokens: int, scratch: Path) -> tuple[Scores, list[Any]]:
    """Fit everything to the model in `folder` and score it; with the choice per layer."""
    model = foreroute.load(folder, "100%", dtype="float32", config=EngineConfig(prefetch="none"))
    tokenizer = load_tokenizer(folder)
    context, start = context_of(model.config, None), decoder_start(model)
    corpus = read_corpus(tokenizer, files[0], tokens, context, start)
    settings = FitSettings(estimator=EstimatorSettings())
    sidecar = fit(model, read_index(folder).fingerprint(), corpus, scratch, settings=settings)
    windows = read_corpus(tokenizer, files[1], tokens // 4, context, start).windows
    scores = score(model, windows, sidecar, rows=8)
    model.foreroute.close()
    scratch.unlink()
    return scores, sidecar.choice


def twin_of(trained: Path, folder: Path) -> Path:
    """The model before training, with the trained one's tokenizer, as a checkpoint."""
    model = untrained(recipe_of(trained.name))
    model.config._experts_implementation = model.config._attn_implementation = None
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((trained / file).read_bytes())
    return folder


def summary(scores: Scores, choice: list[Any]) -> dict[str, Any]:
    """What is recorded of one model."""
    whole = scores.as_dict()
    return {
        "k": whole["k"],
        "tokens": whole["tokens"],
        "choice": choice,
        "predictors": {
            name: {
                **{figure: entry["mean"][figure] for figure in SHOWN},
                "layer_0": entry["recall_k"][0],
                "per_layer": entry["recall_k"],
                "cost_us": entry["cost_us"],
            }
            for name, entry in whole["predictors"].items()
        },
    }


def show(name: str, measured: dict[str, Any]) -> None:
    """A table for the terminal."""
    print(f"\n{name} (k = {measured['k']}, {measured['tokens']:,} tokens)")
    print(f"{'':18}" + "".join(f"{figure:>13}" for figure in (*SHOWN, "layer_0")))
    for predictor, entry in measured["predictors"].items():
        row = [entry[figure] for figure in (*SHOWN, "layer_0")]
        print(f"{predictor:18}" + "".join(f"{'-' if one is None else f'{one:.4f}':>13}" for one in row))


def main() -> None:
    """Measure every model and its twin, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of the models that ship, or others of a recipe")
    parser.add_argument("--tokens", type=int, default=65536, help="to fit to; a quarter of it is scored")
    parser.add_argument("--held-out", type=Path, default=default_held_out())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="predictors", help="of the record")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        files = halves(asked.held_out, scratch)
        for folder in asked.models:
            scores, choice = measure(folder, files, asked.tokens, scratch / "fit")
            plot.draw(scores, _harness.RESULTS / f"recall-{folder.name}.png", folder.name)
            twin, twin_choice = measure(twin_of(folder, scratch / f"{folder.name}-twin"), files,
                                        asked.tokens, scratch / "fit")  # fmt: skip
            found[folder.name] = {"trained": summary(scores, choice), "untrained": summary(twin, twin_choice)}
            show(folder.name, found[folder.name]["trained"])
            show(f"{folder.name}, untrained", found[folder.name]["untrained"])
    _harness.record(asked.name, _harness.rounded({"fitted_to": asked.tokens, "models": found}, 4))


if __name__ == "__main__":
    main()
