"""Sentinels in a text, and a text with gaps for both sides of an encoder-decoder."""

from pathlib import Path

import pytest
import torch

from foreroute.errors import CheckpointError, PredictorError
from foreroute.model.text import TextPieces, load_tokenizer, sentinels
from foreroute.prepare.corpus import sides, with_gaps
from tests.support.checkpoints import edit_json
from tests.support.seq2seq import END, FIRST_SENTINEL, NUM_SENTINELS, PAD, save_seq2seq, switch_config

SENTINELS = tuple(range(FIRST_SENTINEL, FIRST_SENTINEL + NUM_SENTINELS))


def test_sentinels_are_shown_and_other_special_tokens_are_not(switch: Path) -> None:
    """As they are in the tokens, also between the bytes of a character."""
    tokenizer = load_tokenizer(switch)
    assert sentinels(tokenizer) == SENTINELS
    ids = [PAD, SENTINELS[0], *tokenizer("ä b", add_special_tokens=False)["input_ids"], SENTINELS[1], END]
    pieces = TextPieces(tokenizer)
    written = [pieces.push(one) for one in ids]
    assert "".join(written) + pieces.finish() == "<extra_id_0>ä b<extra_id_1>"
    assert written[1] == "<extra_id_0>"


def test_a_text_with_gaps_is_whole_on_both_sides_together() -> None:
    """Each gap's tokens are on the decoder's side, behind the sentinel that has their place on the encoder's."""
    windows = torch.arange(3 * 64).view(3, 64) % 250
    both = with_gaps(windows, SENTINELS, PAD, END)
    assert torch.equal(both, with_gaps(windows, SENTINELS, PAD, END))
    reads, writes = sides(both, PAD)
    assert (writes[:, 0] == PAD).all()
    assert (reads[:, -1] == END).all()
    for window, read, written in zip(windows.tolist(), reads.tolist(), writes.tolist(), strict=True):
        gaps: dict[int, list[int]] = {}
        for token in written[1:]:
            if token in SENTINELS:
                gaps[token] = []
            else:
                gaps[list(gaps)[-1]].append(token)
        assert list(gaps) == list(SENTINELS[: len(gaps)])
        assert {len(gap) for gap in gaps.values()} == {3}
        whole = [one for token in read[:-1] for one in gaps.get(token, [token])]
        assert whole == window


def test_without_sentinels_the_decoder_writes_what_the_encoder_reads() -> None:
    """One token behind, as in training."""
    windows = torch.arange(12).view(2, 6) + 1
    reads, writes = sides(windows, 99)
    assert torch.equal(reads, windows)
    assert writes.tolist() == [[99, 1, 2, 3, 4, 5], [99, 7, 8, 9, 10, 11]]


def test_a_decoder_without_a_first_token_is_refused(tmp_path: Path, load: object) -> None:
    """Before any of its experts is read."""
    folder = save_seq2seq(switch_config(), tmp_path / "model")
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, decoder_start_token_id=None, bos_token_id=None)
    with pytest.raises(CheckpointError, match="which token the decoder begins with"):
        load(folder)  # type: ignore[operator]


def test_a_width_that_a_router_cannot_rank_is_refused(switch: Path, load: object, monkeypatch: object) -> None:
    """A top-1 router without logits names one expert; guesses of two would silently hold one."""
    from dataclasses import replace

    from foreroute.loading import checkpoint as module

    found = module.probe

    def without_logits(*args: object) -> object:
        return [replace(layer, router=replace(layer.router, logits_at=-1)) for layer in found(*args)]

    monkeypatch.setattr(module, "probe", without_logits)  # type: ignore[attr-defined]
    with pytest.raises(PredictorError, match="gives no logits"):
        load(switch, prefetch_width=2)  # type: ignore[operator]
