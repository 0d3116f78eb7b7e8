"""generation/generate.py and model/text.py: text in whole characters, times by the clock, and ends of every kind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import foreroute
from foreroute.errors import CheckpointError, PromptError
from foreroute.generation.generate import GenerationReport, generate, stream
from foreroute.generation.prefix_cache import PromptCache
from foreroute.model.text import TextPieces, encode_prompt, load_tokenizer
from tests.cli.harness import CONTEXT, make_tokenizer

BYTES = make_tokenizer()


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = foreroute.load(tiny, memory="25%")
    yield model
    model.foreroute.close()
    torch.set_num_threads(threads)


@pytest.fixture
def prompt_ids(tokenizer: Any) -> torch.Tensor:
    return encode_prompt(tokenizer, "hello", chat=False)


def pieces_of(ids: list[int]) -> list[str]:
    pieces = TextPieces(BYTES)
    return [*map(pieces.push, ids), pieces.finish()]


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_pieces_are_whole_characters_and_make_up_the_text(text: str) -> None:
    # What spells a special token is one, and says nothing.
    assume(not any(symbol in text for symbol in BYTES.get_added_vocab()))
    ids = BYTES.encode(text, add_special_tokens=False)
    pieces = pieces_of(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = BYTES.encode("a€!", add_special_tokens=False)
    assert len(ids) == 5
    assert pieces_of(ids) == ["a", "", "", "€", "!", ""]


def test_half_a_character_at_the_end_is_not_written() -> None:
    ids = BYTES.encode("ok €", add_special_tokens=False)
    assert "".join(pieces_of(ids[:-1])) == "ok "


def test_bytes_that_are_no_character_hold_nothing_up() -> None:
    broken = BYTES.encode("é", add_special_tokens=False)[:1]
    assert "".join(pieces_of([*broken, *BYTES.encode("next", add_special_tokens=False)])) == "\ufffdnext"


def test_special_tokens_are_no_text() -> None:
    assert "".join(pieces_of(BYTES.encode("a<|end|>b", add_special_tokens=False))) == "ab"


def test_the_report_agrees_with_transformers_and_with_the_engine(model: Any, tokenizer: Any, prompt_ids) -> None:
    pieces: list[str] = []
    report = generate(model, tokenizer, prompt_ids, on_text=pieces.append, max_new_tokens=12, do_sample=False)
    expected = model.generate(prompt_ids, max_new_tokens=12, do_sample=False)[0, prompt_ids.shape[1] :]
    assert list(report.token_ids) == expected.tolist()
    assert "".join(pieces) == report.text
    assert report.text == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
    assert (report.prompt_tokens, report.finish_reason, report.loop) == (5, "length", "lean")
    figures = report.figures()
    assert (figures["prompt_tokens_reused"], figures["prompt_cache_bytes"]) == (0, 0)
    # Every token after the first asks each of 4 layers for 2 experts.
    assert figures["hits"] + figures["late_hits"] + figures["misses"] == 11 * 4 * 2
    assert figures["hit_rate"] + figures["late_hit_rate"] + figures["miss_rate"] == pytest.approx(1)
    assert figures["demand_mb_per_token"] == pytest.approx(figures["misses"] * report.expert_bytes / 1e6 / 11)
    assert figures["evictions"] > 0
    assert figures["peak_rss_bytes"] > 50e6


def test_times_are_those_of_the_clock(model: Any, tokenizer: Any, prompt_ids) -> None:
    ticks = iter([10.0, 12.0, 12.5, 13.0, 15.0, 16.0])
    report = generate(model, tokenizer, prompt_ids, max_new_tokens=4, do_sample=False, clock=lambda: next(ticks))
    assert (report.ttft_s, report.tpot_s, report.total_s) == (2.0, 1.0, 6.0)
    figures = report.figures()
    assert (figures["tpot_ms"], figures["tokens_per_s"], figures["prefill_tokens_per_s"]) == (1000.0, 1.0, 2.5)


def test_one_token_has_no_tpot(model: Any, tokenizer: Any, prompt_ids) -> None:
    report = generate(model, tokenizer, prompt_ids, max_new_tokens=1, do_sample=False)
    assert report.ttft_s > 0
    assert (report.tpot_s, report.figures()["tokens_per_s"], report.figures()["hit_rate"]) == (None, None, None)


def test_the_models_own_end_is_a_stop(model: Any, tokenizer: Any, prompt_ids, monkeypatch) -> None:
    ids = generate(model, tokenizer, prompt_ids, max_new_tokens=8, do_sample=False).token_ids
    monkeypatch.setattr(model.generation_config, "eos_token_id", [ids[5]])
    report = generate(model, tokenizer, prompt_ids, max_new_tokens=8, do_sample=False)
    assert report.finish_reason == "stop"
    assert report.token_ids == ids[: ids.index(ids[5]) + 1]
    monkeypatch.undo()
    asked = generate(model, tokenizer, prompt_ids, max_new_tokens=8, do_sample=False, eos_token_id=ids[5])
    assert (asked.finish_reason, asked.token_ids) == ("stop", report.token_ids)


# Understood by the lean loop, and not.
BOTH_LOOPS = [({}, "lean"), ({"cache_implementation": "dynamic"}, "generate")]


@pytest.mark.parametrize(("options", "loop"), BOTH_LOOPS, ids=["lean", "generate"])
def test_it_stops_when_it_is_told_to(model: Any, tokenizer: Any, prompt_ids, options, loop) -> None:
    pieces: list[str] = []
    report = generate(
        model,
        tokenizer,
        prompt_ids,
        on_text=pieces.append,
        should_stop=lambda: len(pieces) >= 3,
        max_new_tokens=40,
        do_sample=False,
        **options,
    )
    assert (report.finish_reason, report.loop) == ("stopped", loop)
    assert 3 <= len(report.token_ids) < 40
    assert report.stats.decode.steps == len(report.token_ids) - 1


def test_the_rate_of_a_prompt_is_that_of_what_was_computed(model: Any, tokenizer: Any) -> None:
    kept, ids = PromptCache(), torch.arange(40)[None]
    for reused, ticks in ((0, iter([0.0, 2.0, 3.0])), (38, iter([0.0, 0.5, 3.0]))):
        report = generate(
            model, tokenizer, ids, max_new_tokens=1, do_sample=False, reuse=kept, clock=lambda ticks=ticks: next(ticks)
        )
        figures = report.figures()
        assert figures["prompt_tokens_reused"] == reused
        assert figures["prefill_tokens_per_s"] == (40 - reused) / figures["ttft_s"]
        assert figures["prompt_cache_bytes"] == kept.nbytes > 0


def test_ctrl_c_keeps_what_there_is_and_the_model(model: Any, tokenizer: Any, prompt_ids) -> None:
    whole = generate(model, tokenizer, prompt_ids, max_new_tokens=40, do_sample=False)
    seen: list[str] = []

    def interrupted(piece: str) -> None:
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    report = generate(model, tokenizer, prompt_ids, on_text=interrupted, max_new_tokens=40, do_sample=False)
    assert report.finish_reason == "interrupted"
    assert report.text == "".join(seen)
    assert report.token_ids == whole.token_ids[: len(report.token_ids)]
    assert 3 <= len(report.token_ids) < 40
    again = generate(model, tokenizer, prompt_ids, max_new_tokens=40, do_sample=False)
    assert again.token_ids == whole.token_ids


def test_stream_gives_the_same_and_returns_the_report(model: Any, tokenizer: Any, prompt_ids) -> None:
    pieces = stream(model, tokenizer, prompt_ids, max_new_tokens=12, do_sample=False)
    reports: list[GenerationReport] = []

    def read() -> Iterator[str]:
        reports.append((yield from pieces))

    seen = list(read())
    expected = generate(model, tokenizer, prompt_ids, max_new_tokens=12, do_sample=False)
    assert "".join(seen) == expected.text
    assert reports[0].token_ids == expected.token_ids


def test_closing_a_stream_ends_the_answer(model: Any, tokenizer: Any, prompt_ids) -> None:
    before = model.foreroute.stats()
    pieces = stream(model, tokenizer, prompt_ids, max_new_tokens=900, do_sample=False)
    next(pieces)
    pieces.close()
    assert model.foreroute.stats().minus(before).decode.steps < 800


def test_an_error_in_a_stream_is_raised_where_it_is_read(model: Any, tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="context holds"):
        list(stream(model, tokenizer, torch.zeros(1, CONTEXT + 1, dtype=torch.int64)))


def test_the_context_ends_an_answer(model: Any, tokenizer: Any) -> None:
    report = generate(model, tokenizer, torch.ones(1, CONTEXT - 3, dtype=torch.int64), do_sample=False)
    assert (len(report.token_ids), report.finish_reason) == (3, "length")
    with pytest.raises(PromptError, match=f"has {CONTEXT} tokens; the model's context holds {CONTEXT}"):
        generate(model, tokenizer, torch.ones(1, CONTEXT, dtype=torch.int64))


def test_a_chat_template_is_used_when_there_is_one(tokenizer: Any) -> None:
    chat, plain = (encode_prompt(tokenizer, "hi", chat=chat) for chat in (None, False))
    assert tokenizer.decode(chat[0]) == "<|user|>hi<|assistant|>"
    assert tokenizer.decode(plain[0]) == "hi"
    with_system = encode_prompt(tokenizer, "hi", system="be brief")
    assert tokenizer.decode(with_system[0]) == "<|system|>be brief<|user|>hi<|assistant|>"


def test_what_no_template_can_do_is_refused() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    assert bare.decode(encode_prompt(bare, "hi")[0]) == "hi"
    with pytest.raises(PromptError, match="no chat template"):
        encode_prompt(bare, "hi", chat=True)
    with pytest.raises(PromptError, match="system message"):
        encode_prompt(bare, "hi", system="be brief")
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        encode_prompt(bare, "hi")
    with pytest.raises(PromptError, match="empty"):
        encode_prompt(bare, "")


def test_a_folder_without_tokenizer_is_named(copied: Path) -> None:
    for file in copied.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="copied has no tokenizer"):
        load_tokenizer(copied)
