"""Encoder-decoders say what transformers' own models say, bit for bit, while their experts come and go."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.errors import DeviceError
from tests.families.installed import encoder_decoders
from tests.support.seq2seq import (
    CONFIGS,
    MASK,
    NEW_TOKENS,
    ROWS,
    assert_same_tensor,
    assert_same_writing,
    resident,
    save_seq2seq,
    write,
)

FAMILIES = tuple(CONFIGS)
Of = Callable[[str], Any]


@pytest.fixture
def tight(load: Any, folder_of: Of) -> Of:
    """The model in a budget of a quarter of its experts, with all guesses prefetched."""
    return lambda family, **options: load(folder_of(family), **{"memory": "25%", "governor": False, **options})


def test_every_encoder_decoder_with_an_adapter_is_here() -> None:
    """As docs/families.md says."""
    assert set(encoder_decoders()) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_resident_model_s(family: str, tight: Of, resident_of: Of) -> None:
    """Tokens and logits, with evictions and guesses that were used."""
    model = tight(family)
    assert_same_writing(write(model), write(resident_of(family)))
    stats = model.foreroute.stats()
    assert stats.evictions > 0, "nothing was evicted: the budget is too wide to prove anything"
    assert stats.decode.prefetch_loads > 0, "no expert was prefetched"
    assert stats.decode.steps == NEW_TOKENS - 1, "each token after the first is a decode step"


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_are_used(family: str, load: Any, folder_of: Of, resident_of: Of) -> None:
    """The same with guesses of several experts, some of which are then demanded."""
    model = load(folder_of(family), "50%", governor=False, prefetch_width=6)
    assert_same_writing(write(model), write(resident_of(family)))
    assert model.foreroute.stats().decode.prefetch_used > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_several_lengths_and_beams(family: str, tight: Of, resident_of: Of) -> None:
    """Padded prompts, and beams over them: their rows share steps."""
    model, theirs = tight(family), resident_of(family)
    assert_same_writing(write(model, ROWS, MASK), write(theirs, ROWS, MASK))
    assert_same_writing(
        write(model, ROWS, MASK, num_beams=3, num_return_sequences=2),
        write(theirs, ROWS, MASK, num_beams=3, num_return_sequences=2),
    )
    assert model.foreroute.stats().evictions > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_alone(family: str, tight: Of, resident_of: Of) -> None:
    """Its hidden states; each expert is read once, however many tokens want it."""
    model, theirs = tight(family), resident_of(family)
    with torch.no_grad():
        ours = model.get_encoder()(input_ids=ROWS, attention_mask=MASK).last_hidden_state
        expected = theirs.get_encoder()(input_ids=ROWS, attention_mask=MASK).last_hidden_state
    assert_same_tensor(ours, expected, "the encoder's states")
    stats = model.foreroute.stats()
    encoded = [layer for layer in model.foreroute.layers if layer.in_encoder]
    assert (stats.prefill.steps, stats.decode.steps) == (1, 0)
    assert 0 < stats.prefill.demand_loads <= sum(layer.experts.num_offloaded for layer in encoded)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_in_one_call(family: str, tight: Of, resident_of: Of) -> None:
    """Teacher forcing: the decoder reads several tokens at once, some of them beyond an expert's capacity."""
    model, theirs = tight(family), resident_of(family)
    given = {"input_ids": ROWS, "attention_mask": MASK, "decoder_input_ids": ROWS[:, :15]}
    with torch.no_grad():
        assert_same_tensor(model(**given).logits, theirs(**given).logits, "logits")


def test_tokens_beyond_the_capacity_go_through_no_expert(load: Any, folder_of: Of) -> None:
    """As transformers drops them: for those the engine is told of no expert."""
    model = load(folder_of("switch_transformers"), "100%")
    dropped: list[int] = []

    def note(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if model.foreroute.layers[layer].in_encoder:
            dropped.append(int((ids == model.foreroute.layers[layer].experts.num_offloaded).sum()))

    model.foreroute.host_engine.routing_listener = note
    write(model)
    assert len(dropped) == 3
    assert any(dropped), "no expert overflowed: the gates prove less than they say"


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str, tmp_path: Path, load: Any) -> None:
    """Weights in bfloat16: the router computes in float32, as it does there."""
    folder = save_seq2seq(CONFIGS[family](), tmp_path / family, torch.bfloat16)
    ours, theirs = write(load(folder, "25%")), write(resident(folder))
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    for left, right in zip(ours.logits, theirs.logits, strict=True):
        assert torch.equal(left, right)


def test_a_broken_expert_is_seen(tight: Of, resident_of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's output off by a millionth: the comparison says so."""
    model = tight("switch_transformers")
    compute = model.foreroute.engine.compute
    monkeypatch.setattr(model.foreroute.engine, "compute", lambda *args: compute(*args) * (1 + 1e-6))
    with pytest.raises(AssertionError, match="numbers differ"):
        assert_same_writing(write(model), write(resident_of("switch_transformers")))


def test_nllb_is_mended_in_the_blocks_alone(folder_of: Of, resident_of: Of) -> None:
    """The reference's block is the routed experts' weighted sum; and this transformers' own is not, which it should be.

    When the last assertion fails, transformers has been mended: compare with its own model then, without `routed_nllb`.
    """
    from transformers import AutoModelForSeq2SeqLM

    mended = resident_of("nllb-moe")
    block = mended.get_encoder().layers[1].ffn
    hidden = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        flat = hidden.view(-1, 64)
        _, gates, _ = block.router(flat, None)
        outputs = torch.stack([block.experts[f"expert_{at}"](flat) for at in range(block.num_experts)], 1)
        scale = 1 - block.experts.moe_token_dropout
        expected = (gates[:, :, None] * outputs).sum(1).mul(scale).view_as(hidden)
        torch.testing.assert_close(block(hidden), expected)
        own = AutoModelForSeq2SeqLM.from_pretrained(folder_of("nllb-moe")).eval().get_encoder().layers[1].ffn
        assert not torch.allclose(own(hidden), expected, atol=1e-3), "transformers computes the routed experts now"


def test_what_differs_from_transformers_is_said(folder_of: Of, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    """In a line, when the model is loaded: its output is not that transformers' own."""
    from foreroute.model.build.stored_names import _say

    _say.cache_clear()
    load(folder_of("nllb-moe"))
    assert "passes them all through experts 0 and 1" in caplog.text
    caplog.clear()
    load(folder_of("switch_transformers"))
    assert caplog.text == ""


def test_the_device_cannot_page_an_encoder(folder_of: Of, load: Any) -> None:
    """Named, and nothing is computed."""
    with pytest.raises(DeviceError, match="an encoder's are not a token's"):
        load(folder_of("switch_transformers"), "100%", control="device")
