"""Which step a bare call of an encoder-decoder is: one that encodes is a prompt's, whatever its decoder has cached."""

from pathlib import Path
from typing import Any

import torch

from foreroute.model.caches import cache_argument, cache_of
from tests.support.seq2seq import PAD, PROMPT


def counts(model: Any) -> tuple[int, int]:
    """Steps of prompts, and of decoding."""
    stats = model.foreroute.stats()
    return stats.prefill.steps, stats.decode.steps


def test_bare_calls(load: Any, switch: Path) -> None:
    """The encoder, the decoder's start, the tokens after it; and a call of both with a prompt of one token."""
    model = load(switch, "50%")
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=PROMPT)
        assert counts(model) == (1, 0)
        token = torch.full((1, 1), PAD)
        out = model(encoder_outputs=encoded, decoder_input_ids=token, use_cache=True)
        assert counts(model) == (2, 0), "the start token is the prompt's end"
        out = model(encoder_outputs=encoded, decoder_input_ids=token, use_cache=True, **cache_argument(cache_of(out)))
        assert counts(model) == (2, 1)
        model(input_ids=PROMPT[:, :1], decoder_input_ids=token, **cache_argument(cache_of(out)))
        assert counts(model) == (3, 1), "the encoder's tokens are no decoded ones"


def test_the_first_decoded_layer_is_guessed_and_waits(load: Any, switch: Path, monkeypatch: Any) -> None:
    """No layer of the decoder is guessed from the encoder's states, also where prompts prefetch."""
    model = load(switch, "50%", prefetch_prefill="on", governor=False)
    guessed: list[int] = []
    prefetch = model.foreroute.host_engine.prefetcher.prefetch

    def note(layer: int, experts: Any) -> None:
        guessed.append(layer)
        prefetch(layer, experts)

    monkeypatch.setattr(model.foreroute.host_engine.prefetcher, "prefetch", note)
    with torch.no_grad():
        model(input_ids=PROMPT, decoder_input_ids=PROMPT[:, :9])
    assert guessed == [1, 2, 4, 5]
