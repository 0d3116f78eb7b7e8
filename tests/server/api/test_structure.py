"""Structured output over the wire: every field that asks for it, and what each is refused for."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from foreroute.errors import ForerouteError, QueueFullError
from foreroute.server.api.structure import FIELDS
from foreroute.structured.compiler import GrammarCompiler
from tests.cli.harness import SPECIAL
from tests.server.conftest import Served

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
VOCABULARY = len(SPECIAL) + 256


@pytest.fixture(scope="module")
def grammars(byte_tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer, VOCABULARY, [0])


@pytest.fixture
def served(serve: Callable[..., Served], grammars: GrammarCompiler) -> Served:
    made = serve(context=512)
    made.backend.serving().grammars = grammars
    return made


def takes(served: Served, tokenizer: Any, text: str) -> bool:
    """Whether the grammar of the last request takes a text as a whole answer."""
    grammar = served.engine.requests[-1].grammar
    assert grammar is not None
    mask = grammar.start()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not mask.allowed()[token]:
            return False
        mask.accept(token)
    return bool(mask.allowed()[0])


OBJECT, NUMBER = '{"a": 1}', "12"


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, OBJECT, NUMBER),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, OBJECT, "{}"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
            OBJECT, "{}"),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, OBJECT, "{}"),
        ({"response_format": {"type": "regex", "pattern": "[0-9]+"}}, NUMBER, OBJECT),
        ({"response_format": {"type": "regex", "value": "[0-9]+"}}, NUMBER, OBJECT),
        ({"response_format": {"type": "grammar", "grammar": 'start: "12"'}}, NUMBER, "1"),
        ({"guided_json": SCHEMA}, OBJECT, "{}"),
        ({"guided_json": json.dumps(SCHEMA)}, OBJECT, "{}"),
        ({"guided_regex": "[0-9]+"}, NUMBER, OBJECT),
        ({"guided_choice": ["12", "x"]}, NUMBER, "y"),
        ({"guided_grammar": 'root ::= "12"'}, NUMBER, "1"),
        ({"structured_outputs": {"json": SCHEMA}}, OBJECT, "{}"),
        ({"structured_outputs": {"json_object": True, "regex": None, "disable_any_whitespace": False}}, OBJECT, NUMBER),
        ({"structured_outputs": {"regex": "[0-9]+"}}, NUMBER, OBJECT),
        ({"structured_outputs": {"choice": ["12"]}}, NUMBER, OBJECT),
        ({"structured_outputs": {"grammar": 'start: "12"'}}, NUMBER, OBJECT),
        ({"json_schema": SCHEMA}, OBJECT, "{}"), ({"regex": "[0-9]+"}, NUMBER, OBJECT),
        ({"ebnf": 'root ::= "12"'}, NUMBER, "1"),
        ({"grammar": 'root ::= "12"'}, NUMBER, "1"),
    ],
)  # fmt: skip
def test_every_way_to_ask(served: Served, byte_tokenizer: Any, asked: dict[str, Any], good: str, bad: str) -> None:
    for answer in (served.chat(**asked), served.complete(**asked)):
        assert answer.status_code == 200, answer.text
        assert takes(served, byte_tokenizer, good)
        assert not takes(served, byte_tokenizer, bad)


def test_free_text_has_no_grammar(served: Served) -> None:
    for asked in ({}, {"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None}):
        assert served.chat(**asked).status_code == 200
        assert served.engine.requests[-1].grammar is None


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format", '"not"'),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", '"uniqueItems"'),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"), ({"guided_json": False}, "guided_json", "no answer"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema", "a JSON schema"),
        ({"response_format": {"type": "yaml"}}, "response_format", "must be"),
        ({"response_format": {}}, "response_format", "must be"),
        ({"response_format": {"type": ["text"]}}, "response_format", "must be"),
        ({"response_format": 3}, "response_format", "dict"),
        ({"response_format": {"type": "regex"}}, "response_format.pattern", "a text"),
        ({"guided_regex": "(("}, "guided_regex", "unclosed"),
        ({"guided_choice": []}, "guided_choice", "no choice"), ({"guided_choice": [1]}, "guided_choice.0", "string"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "foo"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "both"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "leave"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(served: Served, asked: dict[str, Any], param: str, said: str) -> None:
    answer = served.chat(**asked)
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["param"], said in answer.json()["error"]["message"]) == (param, True), answer.text
    assert served.engine.requests == []


def test_every_field_is_one_of_both_kinds_of_request() -> None:
    from foreroute.server.api.schema import ChatRequest, CompletionRequest

    assert ChatRequest.model_fields.keys() >= FIELDS
    assert CompletionRequest.model_fields.keys() >= FIELDS


def test_a_server_without_it_says_so(serve: Callable[..., Served]) -> None:
    answer = serve().chat(guided_regex="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(QueueFullError("18 grammars wait."), 429, "queue_full"), (ForerouteError("No process."), 500, "internal_error")],
)
def test_what_is_no_fault_of_the_grammar_is_no_400(served: Served, error: Any, status: int, code: str) -> None:
    class Busy:
        def submit(self, grammar: Any) -> Any:
            raise error

        def close(self) -> None: ...

    served.backend.serving().grammars = Busy()  # type: ignore[assignment]
    response = served.chat(response_format={"type": "json_object"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in response.headers) == (status == 429)
