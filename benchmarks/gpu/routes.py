"""Which experts a step routes to and what was guessed: a trained model's, mapped onto a shape, or drawn at random.

Random weights route like nothing real. So a shape's experts are routed to as those of models/foreroute-tiny are, which
is trained and has 32 per layer: each layer of the shape is several passages of its text at once, each with its share of
the experts. How often an expert comes back is then the trained model's, and so are the guesses with their errors. What
is measured so is mechanics: bytes and time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import foreroute

# isort: split
import torch

from foreroute.predict.base import RouterSample
from foreroute.predict.build import lookahead

TRAINED = Path(__file__).parents[2] / "models" / "foreroute-tiny"


@dataclass(frozen=True)
class Routes:
    """chosen, guessed: int64 [steps, layers, k]; guessed[:, l] is the guess for layer l (layer 0's is its choice)."""

    name: str
    chosen: torch.Tensor
    guessed: torch.Tensor

    @property
    def recall(self) -> float:
        """Share of the chosen experts that were guessed, past the first layer."""
        found = (self.chosen[:, 1:, :, None] == self.guessed[:, 1:, None, :]).any(-1)
        return float(found.double().mean())


def random_routes(steps: int, num_layers: int, num_experts: int, top_k: int) -> Routes:
    """Independent and uniform: the pessimist. Guesses are as blind."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.rand(steps, num_layers, num_experts, generator=generator).topk(top_k).indices

    return Routes("i.i.d.", draw(), draw())


def trained_routes(steps: int, num_layers: int, num_experts: int, top_k: int) -> Routes:
    """A trained model's routes on text that it writes itself, a passage per stream and layer."""
    chosen, guessed = record(TRAINED, 4 * steps)
    # [tokens, trained layers, trained k]
    tokens, trained_layers, trained_k = chosen.shape
    trained_experts = 32
    streams = num_experts // trained_experts
    taken = top_k // streams
    assert streams * trained_experts == num_experts, f"{num_experts} experts are no whole number of {trained_experts}"
    assert taken * streams == top_k <= trained_k * streams, f"top-{top_k} of {streams} streams"
    out = []
    for source in (chosen, guessed):
        layers = []
        for layer in range(num_layers):
            parts = []
            for stream in range(streams):
                # Another passage for every stream, and for layers that share a layer of the trained model.
                start = (stream * 131 + (layer // trained_layers) * 67) % max(1, tokens - steps)
                passage = source[start : start + steps, layer % trained_layers, :taken]
                parts.append(passage + stream * trained_experts)
            layers.append(torch.cat(parts, -1))
        out.append(torch.stack(layers, 1))
    return Routes("trained model's", *out)


def record(folder: Path, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode `tokens` tokens with the trained model: its choices and the lookahead's guesses, best first."""
    config = foreroute.EngineConfig(predictor="no", prefetch="none")
    model = foreroute.load(folder, "100%", "float32", config=config)
    layers = model.foreroute.layers
    ahead: Callable[..., object] = lookahead(layers, model.dtype).guess
    chosen: list[list[torch.Tensor]] = []
    guessed: list[list[torch.Tensor]] = []

    def observe(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if len(ids) != 1:
            return
        best = ids.gather(-1, weights.argsort(-1, descending=True))
        if layer == 0:
            chosen.append([])
            guessed.append([best])
        chosen[-1].append(best)
        guess = ahead(layer, RouterSample(hidden, ids, weights), ids.shape[-1])
        if guess is not None and layer + 1 < len(layers):
            guessed[-1].append(guess.ids)  # type: ignore[attr-defined]

    model.foreroute.engine.routing_listener = observe
    torch.manual_seed(0)
    try:
        model.generate(
            torch.tensor([[5, 17, 40, 8]]), max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=True,
            temperature=1.0, disable_compile=True,
        )  # fmt: skip
    finally:
        model.foreroute.close()

    def stacked(rows: list[list[torch.Tensor]]) -> torch.Tensor:
        return torch.stack([torch.cat(row) for row in rows])

    return stacked(chosen), stacked(guessed)
