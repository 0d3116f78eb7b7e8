"""Grammars of every kind: which texts they take, where they end, and how what cannot be enforced is refused."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foreroute.errors import GrammarError
from foreroute.structured.compiler import GrammarCompiler
from foreroute.structured.grammar import Grammar
from foreroute.structured.vocabulary import vocabulary_of
from tests.structured.conftest import ENDS, VOCABULARY

SPECIAL = 2


def takes(compiler: GrammarCompiler, tokenizer: Any, grammar: Grammar, *parts: str | int) -> bool:
    """Whether the parts, texts and ids, can be a whole answer."""
    mask = compiler.compile(grammar).start()
    ids = [one for part in parts for one in ([part] if isinstance(part, int) else tokenizer(part)["input_ids"])]
    for token in ids:
        if not mask.allowed()[token]:
            return False
        mask.accept(token)
    return bool(mask.allowed()[ENDS[0]])


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar.json_schema(CITY), ['{"city": "é😀"}', '{\n  "city":"x"}'],
            ["{}", '{"city": 1}', '{"city":"x"} ', "x"]),
        (Grammar.json_schema(json.dumps(CITY)), ['{"city": ""}'], ["[]"]),
        (Grammar.json_schema(True), ["1", "[]", '"a"'], ["", "a"]),
        (Grammar.json_object(), ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1"]),
        (Grammar.json_object(), ['{ "a" : 1 }', '{\n    "a": 1,\r\n\t"b": 2\n}'],
            ["{  }", "{\n\n}", "{\n" + " " * 21 + "}"]),
        (Grammar.regex(r"a/b\/c\n+"), ["a/b/c\n", "a/b/c\n\n"], ["a/b/c"]),
        (Grammar.regex("a\nb|\"'"), ["a\nb", "\"'"], ["a"]),
        (Grammar.regex("[0-9]{2,}"), ["12", "123456"], ["1", "12a"]),
        (Grammar.grammar('start: "a" | "b" start'), ["a", "bba"], ["b", "ab"]),
        (Grammar.grammar('root ::= "a" | "b" root'), ["a", "bba"], ["b", "ab"]),
        (Grammar.choice(["yes", "yes sir", 'q"\\', "\x01\x7f", "é😀", "x\ny", "/"]),
         ["yes", "yes sir", 'q"\\', "\x01\x7f", "é😀", "x\ny", "/"], ["yes s", "no", ""]),
    ],
)  # fmt: skip
def test_a_grammar_takes_what_it_says(
    compiler: GrammarCompiler, tokenizer: Any, grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not takes(compiler, tokenizer, grammar, text)] == []
    assert [text for text in bad if takes(compiler, tokenizer, grammar, text)] == []


def test_where_settings_leave_no_token_the_grammar_holds(compiler: GrammarCompiler, tokenizer: Any) -> None:
    mask = compiler.compile(Grammar.choice(["ab"])).start()
    scores = torch.full((VOCABULARY,), -torch.inf)
    scores[ENDS[0]] = 1.0
    assert torch.equal(mask.apply(scores).isfinite(), mask.allowed())
    assert not mask.allowed()[list(ENDS)].any()


def test_a_processor_follows_rows_that_change_places(compiler: GrammarCompiler, tokenizer: Any) -> None:
    (a,), (b,), (x,), (y,) = (tokenizer(one)["input_ids"] for one in "abxy")
    processor = compiler.compile(Grammar.choice(["ax", "by"])).processor()
    scores = torch.zeros(2, VOCABULARY)
    first = processor(torch.tensor([[9], [9]]), scores)
    assert first[0, [a, b]].tolist() == [0, 0]
    for rows in ([[9, a], [9, b]], [[9, b], [9, a]]):
        masked = processor(torch.tensor(rows), scores)
        for row, ids in zip(masked, rows, strict=True):
            assert row[[x, y]].isfinite().tolist() == ([True, False] if ids[-1] == a else [False, True])


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def chain(links: int) -> dict[str, Any]:
    """References one after the other: their compiler calls itself for each."""
    parts = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(links)}
    return {"$ref": "#/$defs/a0", "$defs": {**parts, f"a{links}": {"type": "string"}}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema({"properties": {"x": {"not": {}}}}), r'"not", which cannot be enforced'),
        (lambda: Grammar.json_schema({"type": "array", "uniqueItems": True}), r'"uniqueItems", which cannot'),
        (lambda: Grammar.json_schema({"type": "strin"}), "Invalid type: strin"),
        (lambda: Grammar.json_schema({"type": "string", "format": "colour"}), "Unknown format: colour"),
        (lambda: Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}), "regex is not accepted: look-around"),
        (lambda: Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "No answer is valid"),
        (lambda: Grammar.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), 'Use "anyOf"'),
        (lambda: Grammar.json_schema({"$ref": "http://example.com/s"}), "does not fetch"),
        (lambda: Grammar.json_schema({"x-guidance": {"lenient": True}, "not": {}}), '"not"'),
        (lambda: Grammar.json_schema(False), "no answer is valid"),
        (lambda: Grammar.json_schema("{"), "not valid JSON"),
        (lambda: Grammar.json_schema("[1]"), "is an object"),
        (lambda: Grammar.json_schema(nested(200)), "nested deeper than 96"),
        (lambda: Grammar.json_schema(chain(5_000)), "nested too deep"),
        (lambda: Grammar.json_schema({"enum": ["x" * 20] * 20_000}), "at most 262144"),
        (lambda: Grammar.regex("(("), "regex is not accepted: unclosed group"),
        (lambda: Grammar.regex(""), "pattern is empty"),
        (lambda: Grammar.regex("(a{1000}){1000}"), "more than 160 MiB"),
        (lambda: Grammar.grammar("start: foo"), 'unknown name: "foo"'),
        (lambda: Grammar.grammar(" "), "grammar is empty"),
        (lambda: Grammar.grammar("root ::= (("), "cannot be read as GBNF"),
        (lambda: Grammar.grammar("root ::= " + "(" * 10_000), "nested too deep"),
        (lambda: Grammar.grammar("start: " + "(" * 10_000), "deep"),
        (lambda: Grammar.choice([]), "no choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_named(compiler: GrammarCompiler, make: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        compiler.compile(make())


def test_the_same_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    assert compiler.compile(Grammar.json_object()) is compiler.compile(Grammar.json_object())


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: a word begins with an underline, and bytes stand for what has no token."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁some", "▁text", "key", '{"', "true"]
    backend = Tokenizer(
        models.BPE({one: at for at, one in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def whole_words() -> PreTrainedTokenizerFast:
    """Neither bytes nor bytes to fall back to: each token is a text."""
    chars = ["<unk>", "</s>", *(chr(one) for one in range(32, 127)), "\n"]
    backend = Tokenizer(models.BPE({one: at for at, one in enumerate(chars)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("make", [sentencepiece, whole_words])
def test_other_tokenizers(make: Any) -> None:
    tokenizer = make()
    size = len(tokenizer) + 5
    mask = GrammarCompiler(tokenizer, size, [1]).compile(Grammar.json_schema(CITY)).start()
    ids = tokenizer('{"city": "text"}', add_special_tokens=False)["input_ids"]
    if make is sentencepiece:
        assert not mask.allowed()[ids[0]], "the space before the first word is no JSON"
        ids = ids[1:]
    for token in ids:
        assert mask.allowed()[token], tokenizer.convert_ids_to_tokens(token)
        mask.accept(token)
    assert mask.is_complete
    assert mask.allowed().nonzero().flatten().tolist() == [1]
    assert len(mask.allowed()) == size


def test_a_model_without_an_end_token_ends_where_the_grammar_does(tokenizer: Any) -> None:
    mask = GrammarCompiler(tokenizer, VOCABULARY, []).compile(Grammar.choice(["a"])).start()
    mask.accept(int(tokenizer("a")["input_ids"][0]))
    assert mask.is_complete
    with pytest.raises(GrammarError, match="no end token"):
        mask.allowed()


def test_a_tokenizer_whose_bytes_are_not_known_is_refused() -> None:
    tokenizer = whole_words()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(GrammarError, match="not known"):
        vocabulary_of(tokenizer, len(tokenizer), [1])


def test_host_names_are_as_long_as_the_standard_allows(compiler, tokenizer) -> None:
    """253 characters; also those of properties that are named as keywords, of which data is left alone."""
    longest = ".".join(["a" * 63] * 3 + ["a" * 61])
    for name in ("format", "default"):
        host = {"type": "string", "format": "hostname"}
        named = Grammar.json_schema({"type": "object", "properties": {name: host}, "required": [name]})
        assert takes(compiler, tokenizer, named, json.dumps({name: longest}), ENDS[0])
        assert not takes(compiler, tokenizer, named, json.dumps({name: f"{longest}a"}), ENDS[0])
    data = Grammar.json_schema({"const": {"format": "hostname"}})
    assert takes(compiler, tokenizer, data, '{"format": "hostname"}', ENDS[0])
