"""Policies of an encoder-decoder: what the evaluation without a cache says is what the engine does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.checkpoint.locate import read_index
from foreroute.evals.fetched_only import fetched_only
from foreroute.model.caches import cache_argument, cache_of
from foreroute.policy import Policy
from foreroute.predict.sidecar import Sidecar
from foreroute.prepare.corpus import Corpus
from foreroute.prepare.estimator_training import EstimatorSettings
from foreroute.prepare.fit import FitSettings, fit
from tests.support.seq2seq import PAD, PROMPT

SETTINGS = FitSettings(rows=4, estimator=EstimatorSettings(epochs=1, batch=64))


@pytest.fixture(scope="module")
def sidecar(switch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted predictors of the Switch Transformers."""
    path = tmp_path_factory.mktemp("fitted") / "switch.safetensors"
    model = foreroute.load(switch, "100%", config=foreroute.EngineConfig(predictor="no"))
    ids = torch.randint(5, 240, (24, 32), generator=torch.Generator().manual_seed(2))
    fit(model, read_index(switch).fingerprint(), Corpus(ids, "random"), path, settings=SETTINGS)
    model.foreroute.close()
    return path


@torch.no_grad()
def decoded(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the decoder, fed `tokens` one by one; the prompt is encoded first."""
    encoded = model.get_encoder()(input_ids=PROMPT)
    said, cache = [], dict[str, Any]()
    for token in tokens:
        step = model(encoder_outputs=encoded, decoder_input_ids=token.view(1, 1), **cache, use_cache=True)
        said.append(step.logits[0, -1])
        cache = cache_argument(cache_of(step))
    return torch.stack(said)


@pytest.mark.parametrize("policy", ["exact", "speculative", "paper"])
def test_without_a_cache_it_is_what_the_evaluation_says(
    load: Callable[..., Any], switch: Path, sidecar: Path, policy: str
) -> None:
    """The encoder's layers are exact and not counted; the decoder's first waits, as nothing guesses it."""
    asked, tokens = Policy.parse(policy), torch.tensor([PAD, *range(80, 110, 3)])
    whole = load(switch, "100%", dtype="float32", predictor=str(sidecar))
    exact = decoded(whole, tokens)
    fitted = Sidecar.load(sidecar, read_index(switch).fingerprint())
    with fetched_only(whole, fitted, asked, in_prompts=False) as tally:
        expected = decoded(whole, tokens)
    assert torch.equal(expected, exact) == (policy == "exact")
    width = int(whole.foreroute.layers[0].top_k)
    model = load(
        switch, "50%", dtype="float32", predictor=str(sidecar), cache=False, deterministic=True, prefetch_width=width
    )
    model.foreroute.set_policy(asked)
    model.foreroute.engine.prefetcher.predictor.without_waiting = False  # widths and weights as there
    found = decoded(model, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    decode = model.foreroute.stats().decode
    assert tally.tokens == decode.tokens > 0
    if asked.substitutes:
        assert decode.substituted == tally.missed - tally.waited > 0
    if not asked.replaces_route:
        assert decode.misses + decode.late_hits == tally.waited + tally.first_waited > 0
