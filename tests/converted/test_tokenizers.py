"""Tokenizers of GGUF files: 1,000 strings of every kind against the tokenizer that the file was made of."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from foreroute.checkpoint.gguf_file import read_array, read_gguf
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from foreroute.model.generation_settings import complete_generation_config
from foreroute.model.gguf.pre_tokenizers import PRE_TOKENIZERS
from foreroute.model.gguf.tokenizer import gguf_tokenizer
from foreroute.model.text import default_template, load_tokenizer
from tests.converted.convert import MERGES
from tests.converted.tokenizer_sources import (
    END,
    PUBLISHED,
    START,
    TEMPLATE,
    TURN,
    Published,
    byte_level_source,
    sentencepiece_source,
    texts,
    word_piece_source,
    write_vocabulary,
)
from tests.formats.gguf_writer import write_copy
from tests.support.checkpoints import save_tokenizer

_TEXTS = texts()


def assert_same(ours: Any, source: PreTrainedTokenizerFast, *, keeps_text: bool = False) -> None:
    """Check that both make the same tokens of every text, and the same texts of the tokens."""
    expected, found = (one(_TEXTS)["input_ids"] for one in (source, ours))
    for text, theirs, mine in zip(_TEXTS, expected, found, strict=True):
        assert mine == theirs, (text, source.convert_ids_to_tokens(theirs), ours.convert_ids_to_tokens(mine))
    for is_shown in (False, True):
        theirs, mine = (one.batch_decode(expected, skip_special_tokens=is_shown) for one in (source, ours))
        assert mine == theirs
    if keeps_text:
        assert ours.batch_decode(ours(_TEXTS, add_special_tokens=False)["input_ids"]) == _TEXTS


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda one: one.names[0])
def test_byte_level_bpe_is_the_one_it_was_made_of(published: Published, tmp_path: Path) -> None:
    source = byte_level_source(published)
    ours = gguf_tokenizer(read_gguf(write_vocabulary(source, tmp_path / "m.gguf", "gpt2", published.names[0])))
    assert_same(ours, source, keeps_text=not published.composes)
    assert (ours.bos_token, ours.eos_token, ours.chat_template) == (START, END, TEMPLATE)
    assert ours.get_vocab() == source.get_vocab()


def test_every_name_is_one_of_those() -> None:
    """Names that stand for the same have the same rule, and none is left out."""
    assert {name for one in PUBLISHED for name in one.names} == PRE_TOKENIZERS.keys()
    for one in PUBLISHED:
        assert {PRE_TOKENIZERS[name] for name in one.names} == {PRE_TOKENIZERS[one.names[0]]}


@pytest.mark.parametrize(("architecture", "prefixed"), [("llama", True), ("ernie4_5-moe", False), ("phimoe", True)])
@pytest.mark.parametrize("has_scores", [True, False])
def test_sentencepiece_is_the_one_it_was_made_of(
    architecture: str, prefixed: bool, has_scores: bool, tmp_path: Path
) -> None:
    """Some converters write one score for all tokens: their order says what is merged first."""
    source, scores = sentencepiece_source(architecture, prefixed=prefixed)
    path = write_vocabulary(
        source, tmp_path / "m.gguf", "llama", "default", architecture=architecture,
        scores=scores if has_scores else [-1000.0] * len(scores), flags={} if prefixed else {"add_space_prefix": False},
    )  # fmt: skip
    assert_same(gguf_tokenizer(read_gguf(path)), source, keeps_text=architecture == "ernie4_5-moe")


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_pieces_are_those_it_was_made_of(lowercase: bool, tmp_path: Path) -> None:
    source = word_piece_source(lowercase=lowercase)
    flags = {"normalizer.lowercase": lowercase}
    path = write_vocabulary(source, tmp_path / "m.gguf", "bert", "jina-v2-en", flags=flags)
    assert_same(gguf_tokenizer(read_gguf(path)), source)


@pytest.fixture(scope="module")
def source() -> PreTrainedTokenizerFast:
    return byte_level_source(next(one for one in PUBLISHED if "qwen2" in one.names))


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_what_is_put_around_a_text_is_what_the_file_says(
    starts: bool, ends: bool, source: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    flags = {"add_bos_token": starts, "add_eos_token": ends}
    path = write_vocabulary(source, tmp_path / "m.gguf", "gpt2", "qwen2", flags=flags)
    ours = gguf_tokenizer(read_gguf(path))
    inside = source.encode("the fox", add_special_tokens=False)
    first, last = [source.bos_token_id] * starts, [source.eos_token_id] * ends
    assert ours.encode("the fox") == [*first, *inside, *last]
    assert ours.encode("the fox", "the fox") == [*first, *inside, *last, *first, *inside, *last]
    assert ours.encode("the fox", add_special_tokens=False) == inside


@pytest.mark.parametrize(("name", "starts"), [("qwen2", False), ("llama-bpe", True), ("tekken", True)])
def test_without_a_word_on_the_start_token_its_kind_says(
    name: str, starts: bool, source: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    said = {"tokenizer.ggml.add_bos_token": None}
    ours = gguf_tokenizer(read_gguf(write_vocabulary(source, tmp_path / "m.gguf", "gpt2", name, said=said)))
    assert (ours.encode("the fox")[0] == source.bos_token_id) == starts


@pytest.mark.parametrize("role", ["padding", "unknown", "bos"])
def test_an_ordinary_token_with_a_role_stays_text(role: str, source: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Converters copy pad_token_id 0 of a config, which is "!" in many vocabularies."""
    number = source.convert_tokens_to_ids("!")
    said = {f"tokenizer.ggml.{role}_token_id": number, "tokenizer.ggml.add_bos_token": role == "bos"}
    ours = gguf_tokenizer(read_gguf(write_vocabulary(source, tmp_path / "m.gguf", "gpt2", "qwen2", said=said)))
    text = "wait! what!! !"
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == source.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=True) == text
    assert (ours.encode(text)[0] == number) == (role == "bos")


def test_of_a_merge_that_is_listed_twice_the_first_counts(source: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_vocabulary(source, tmp_path / "m.gguf", "gpt2", "qwen2")
    merges = read_array(read_gguf(path), "tokenizer.ggml.merges")
    said = {"tokenizer.ggml.merges": [*merges, *merges[:40]]}
    ours = gguf_tokenizer(read_gguf(write_vocabulary(source, tmp_path / "twice.gguf", "gpt2", "qwen2", said=said)))
    assert_same(ours, source)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_model_without_a_tokenizer_beside_it_has_its_own(
    in_parts: bool, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of a model in parts the first one has it."""
    alone = tmp_path / "sha256-17"
    if in_parts:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe", split_max_tensors=20)
        write_copy(gguf.GGUFReader(converted("qwen3moe")), writer)
        alone = max(tmp_path.glob("*.gguf"))
    else:
        shutil.copyfile(converted("qwen3moe"), alone)
    (tmp_path / "source").mkdir()
    save_tokenizer(tmp_path / "source", MERGES)
    ours, beside = load_tokenizer(alone), load_tokenizer(tmp_path / "source")
    for text in ("the thing in the north", "Ünïcode<eos>", " 7\n"):
        assert ours.encode(text) == beside.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("the")) < len("the")
    assert ours.eos_token == "<eos>"


def test_chat_templates_have_their_names(source: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tools = "{{ 'tools: ' + messages[0]['content'] }}"
    said = {"tokenizer.chat_template.tool_use": tools}
    ours = gguf_tokenizer(read_gguf(write_vocabulary(source, tmp_path / "m.gguf", "gpt2", "qwen2", said=said)))
    assert ours.chat_template == {"default": TEMPLATE, "tool_use": tools}
    assert default_template(ours) == TEMPLATE
    chat = [{"role": "user", "content": "the fox"}]
    assert ours.apply_chat_template(chat, return_dict=False) == source.apply_chat_template(chat, return_dict=False)
    assert ours.apply_chat_template(chat, chat_template="tool_use", tokenize=False) == "tools: the fox"
    broken = {"tokenizer.chat_template.rag": "{% if"}
    path = write_vocabulary(source, tmp_path / "broken.gguf", "gpt2", "qwen2", said=broken)
    with pytest.raises(CorruptCheckpointError, match=r"tokenizer.chat_template.rag is not a chat template that can"):
        gguf_tokenizer(read_gguf(path))


def _ends(path: Path) -> set[str]:
    """The tokens that end an answer, by what a model's file says."""
    index = read_gguf(path)
    config = SimpleNamespace(eos_token_id=None, vocab_size=10**6, is_encoder_decoder=False)
    config.get_text_config = lambda: config
    settings = SimpleNamespace(eos_token_id=None, pad_token_id=None, use_cache=None)
    model: Any = SimpleNamespace(config=config, generation_config=settings)
    complete_generation_config(model, path, index)
    found = settings.eos_token_id
    return set(gguf_tokenizer(index).convert_ids_to_tokens(found if isinstance(found, list) else [found]))


def test_an_answer_ends_at_all_that_the_file_says(source: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The end of the text, of a turn and of a message; and what its chat template puts behind an answer."""
    ids = {f"tokenizer.ggml.{name}_token_id": source.convert_tokens_to_ids(token)
           for name, token in (("eot", "<think>"), ("eom", "</think>"))}  # fmt: skip
    path = write_vocabulary(source, tmp_path / "m.gguf", "gpt2", "qwen2", said=ids)
    assert _ends(path) == {END, TURN, "<think>", "</think>"}
    source.chat_template = None
    try:
        assert _ends(write_vocabulary(source, tmp_path / "plain.gguf", "gpt2", "qwen2")) == {END}
    finally:
        source.chat_template = TEMPLATE


@pytest.mark.parametrize(
    ("kind", "name", "said", "error", "message"),
    [
        ("gpt2", "qwen9", {}, UnsupportedModelError, r"splits texts as 'qwen9' does .* Put the model's tokenizer.json"),
        ("gpt2", "", {}, UnsupportedModelError, r"does not say how a text is split .* Put the model's tokenizer.json"),
        ("rwkv", "", {}, UnsupportedModelError, r"vocabularies of the kind 'rwkv' are not read; gpt2, llama, bert are"),
        ("llama", "default", {}, CorruptCheckpointError, "has no tokenizer.ggml.scores"),
        ("gpt2", "qwen2", {"tokenizer.ggml.add_eos_token": 3}, CorruptCheckpointError, "is 3, not true or false"),
        ("gpt2", "qwen2", {"tokenizer.chat_template.a": 3}, CorruptCheckpointError, "chat_template.a is 3, not a text"),
        ("gpt2", "qwen2", {"tokenizer.ggml.merges": ["zz zz"]}, CorruptCheckpointError, "makes no tokenizer"),
        ("gpt2", "qwen2", {"tokenizer.ggml.merges": ["zz"]}, CorruptCheckpointError, "'zz' is no merge"),
        ("gpt2", "qwen2", {"tokenizer.ggml.merges": "a b"}, CorruptCheckpointError, "merges is 'a b', not a list"),
        ("gpt2", "qwen2", {"tokenizer.ggml.tokens": ["a", "a"]}, CorruptCheckpointError, "a token is listed twice"),
        ("gpt2", "qwen2", {"tokenizer.ggml.tokens": [1, 2]}, CorruptCheckpointError, "a token .* is no text"),
        ("llama", "", {"tokenizer.ggml.tokens": ["a", "b" * 2000], "tokenizer.ggml.token_type": [1, 1],
                       "tokenizer.ggml.scores": [0.5, -1.5]}, CorruptCheckpointError, "a token has 2,000 characters"),
        ("gpt2", "qwen2", {"tokenizer.ggml.token_type": [1]}, CorruptCheckpointError, "token_type has 1 numbers"),
        ("gpt2", "", {"tokenizer.ggml.pre": [1, 2]}, UnsupportedModelError, r"splits texts as \[1, 2\] does"),
        ("llama", "", {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1],
                       "tokenizer.ggml.scores": [0.5, math.nan]}, CorruptCheckpointError, "or one that is no number"),
    ],
)  # fmt: skip
def test_what_makes_no_tokenizer_is_named(
    kind: str, name: str, said: dict[str, Any], error: type[CheckpointError], message: str,
    source: PreTrainedTokenizerFast, tmp_path: Path,
) -> None:  # fmt: skip
    path = write_vocabulary(source, tmp_path / "m.gguf", kind, name, said=said)
    with pytest.raises(error, match=message):
        gguf_tokenizer(read_gguf(path))


def test_texts_that_are_no_utf_8_are_named(source: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_vocabulary(source, tmp_path / "m.gguf", "gpt2", "qwen2")
    content = path.read_bytes()
    at = content.index(b"<|im_start|>", content.index(b"tokenizer.ggml.tokens"))
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(CorruptCheckpointError, match=r"tokenizer.ggml.tokens is not whole: 'utf-8' codec"):
        gguf_tokenizer(read_gguf(path))
