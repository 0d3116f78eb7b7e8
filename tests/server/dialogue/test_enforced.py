"""Calls that are enforced by a grammar: required, named and strict ones, in every format and over every API."""

from collections.abc import Callable

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from foreroute.server.dialogue.parsing.formats import FORMATS, format_named
from foreroute.structured.compiler import GrammarCompiler
from tests.server.dialogue import templates
from tests.server.dialogue.conftest import Scripted

Speak = Callable[..., Scripted]
# The end token. <|end|>, the first, is a mark of harmony.
END = 1
SCHEMA = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": SCHEMA}}
    for name in ("look", "write")
]
STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
# A call of `look` in each format that has a grammar, with VALUE for its argument.
CALLS = {
    "hermes": '<tool_call>\n{"name": "look", "arguments": {"count": VALUE}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=look>\n<parameter=count>\nVALUE\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>look\n<arg_key>count</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="look">\n<parameter name="count">VALUE</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{\"count\": VALUE}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
    '{"count": VALUE}<|tool_call_end|><|tool_calls_section_end|>',
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": {"count": VALUE}}]',
    "granite": '<|tool_call|>[{"name": "look", "arguments": {"count": VALUE}}]',
    "json_list": '<tool_calls>[{"name": "look", "arguments": {"count": VALUE}}]</tool_calls>',
    "llama": '{"name": "look", "parameters": {"count": VALUE}}',
    "harmony": '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"count": VALUE}',
}  # fmt: skip
THOUGHT = {"harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"}


def served(speak: Speak, name: str, is_special: bool = True, answer: str = "Hello") -> Scripted:
    own = format_named(name)
    template = templates.HARMONY if own.has_channels else templates.HERMES
    special = (*own.markers, "<think>", "</think>") if is_special else ()
    model = speak(template, answer, special, own)
    size = len(model.tokenizer)
    model.backend.serving().grammars = GrammarCompiler(model.tokenizer, size, [END])
    return model


def taken(model: Scripted, text: str) -> bool:
    """Whether the last request's grammar lets this be the whole answer."""
    mask = model.engine.requests[-1].grammar.start()  # type: ignore[union-attr]
    for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not mask.allowed()[token]:
            return False
        mask.accept(token)
    return mask.is_complete or bool(mask.allowed()[END])


@pytest.mark.parametrize("is_special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("name", CALLS)
def test_a_required_call(speak: Speak, name: str, is_special: bool) -> None:
    good = CALLS[name].replace("VALUE", "1")
    model = served(speak, name, is_special, good)
    if name == "harmony" and not is_special:
        error = model.ask(tools=TOOLS, tool_choice="required").json()["error"]
        assert (error["param"], error["code"]) == ("tool_choice", "invalid_grammar")
        return
    for stream in (False, True):
        assert model.ask(tools=TOOLS, tool_choice="required", stream=stream).status_code == 200
        assert taken(model, good)
        assert taken(model, THOUGHT.get(name, "<think>Hm.</think>\n") + good)
        assert taken(model, good.replace("look", "write"))
        for bad in ("Hello", "", good.replace("look", "other"), good.replace("1", '"x"'), f"Hm. {good}"):
            assert not taken(model, bad), bad
    found = model.ask(tools=TOOLS, tool_choice="required").json()["choices"][0]["message"]["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"].replace(" ", "")) for call in found] == [
        ("look", '{"count":1}')
    ]


@pytest.mark.parametrize("name", CALLS)
def test_strict_holds_where_a_call_is_made(speak: Speak, name: str) -> None:
    for is_special in (True,) if name == "harmony" else (True, False):
        model = served(speak, name, is_special)
        assert model.ask(tools=STRICT).status_code == 200
        good, bad = (CALLS[name].replace("VALUE", value) for value in ("1", '"x"'))
        thought = THOUGHT.get(name, "<think>Hm.</think>\n")
        text = "<|channel|>final<|message|>Hello" if name == "harmony" else "Hello"
        for one in (text, thought + text, good, thought + good):
            assert taken(model, one), one
        assert not taken(model, bad)
        if name not in ("harmony", "llama"):
            assert taken(model, f"I look.\n{good}")
            assert not taken(model, f"I look.\n{bad}")


def test_one_that_is_not_strict_is_free(speak: Speak) -> None:
    model = served(speak, "hermes")
    model.ask(tools=[TOOLS[0], STRICT[1]])
    bad = CALLS["hermes"].replace("VALUE", '"x"')
    assert taken(model, bad)
    assert not taken(model, bad.replace("look", "write"))
    model.ask(tools=TOOLS)
    assert model.engine.requests[-1].grammar is None


def test_a_named_function_and_how_many(speak: Speak) -> None:
    model = served(speak, "hermes")
    one = CALLS["hermes"].replace("VALUE", "1")
    model.ask(tools=TOOLS, tool_choice="required")
    assert taken(model, f"{one}\n{one}")
    model.ask(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert not taken(model, f"{one}\n{one}")
    model.ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "look"}})
    assert taken(model, one)
    assert not taken(model, f"{one}\n{one}")
    assert not taken(model, one.replace("look", "write"))


def test_every_api(speak: Speak) -> None:
    model = served(speak, "hermes")
    good, bad = (CALLS["hermes"].replace("VALUE", value) for value in ("1", '"x"'))
    items = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
    blocks = [{"name": name, "input_schema": SCHEMA} for name in ("look", "write")]
    claude = {"max_tokens": 99, "messages": [{"role": "user", "content": "Hi"}]}
    for path, body in (
        ("/v1/responses", {"input": "Hi", "tools": items, "tool_choice": "required"}),
        ("/v1/responses", {"input": "Hi", "tools": items, "tool_choice": {"type": "function", "name": "look"}}),
        ("/v1/responses", {"input": "Hi", "tools": [{**one, "strict": True} for one in items]}),
        ("/v1/messages", {**claude, "tools": blocks, "tool_choice": {"type": "any"}}),
        ("/v1/messages", {**claude, "tools": blocks, "tool_choice": {"type": "tool", "name": "look"}}),
        ("/v1/messages", {**claude, "tools": [{**one, "strict": True} for one in blocks]}),
    ):
        for stream in (False, True):
            response = model.client.post(path, json={**body, "stream": stream})
            assert response.status_code == 200, response.text
            assert taken(model, good)
            assert not taken(model, bad)
    for path, body in (
        ("/v1/responses", {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}),
        ("/v1/messages", {**claude, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    ):
        assert model.client.post(path, json=body).status_code == 200
        assert taken(model, '{"count": 1}')
        assert not taken(model, "Hello")


def test_structure_in_the_last_channel(speak: Speak) -> None:
    """gpt-oss's channels are not part of what a schema describes."""
    model = served(speak, "harmony")
    assert model.ask(guided_json=SCHEMA).status_code == 200
    answer = '<|channel|>final<|message|>{"count": 1}'
    assert taken(model, answer)
    assert taken(model, THOUGHT["harmony"] + answer)
    assert not taken(model, '{"count": 1}')
    assert not taken(model, "<|channel|>final<|message|>Hello")
    assert served(speak, "harmony", is_special=False).ask(guided_json=SCHEMA).status_code == 400


@pytest.mark.parametrize("is_special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("name", CALLS)
def test_structure_beside_tools_leaves_them_callable(speak: Speak, name: str, is_special: bool) -> None:
    if name == "harmony" and not is_special:
        return
    model = served(speak, name, is_special)
    # It begins as a call of llama's does.
    told = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    assert model.ask(tools=STRICT, guided_json=told).status_code == 200
    before = "<|channel|>final<|message|>" if name == "harmony" else ""
    good, bad = (CALLS[name].replace("VALUE", value) for value in ("1", '"x"'))
    thought = THOUGHT.get(name, "<think>Hm.</think>\n")
    for one in (good, thought + good, before + '{"name": "Bob"}', thought + before + '{"name":"lo", "more": [1]}'):
        assert taken(model, one), one
    for one in ("Hello", before + "Hello", before + "{}", f"I look.\n{good}"):
        assert not taken(model, one), one
    # As JSON, any call of llama's is an answer by this schema too.
    for one in (bad, good.replace("look", "other")):
        assert taken(model, one) == (name == "llama"), one
    assert model.ask(tools=TOOLS, guided_regex="[0-9]+", parallel_tool_calls=False).status_code == 200
    for one in (good, bad, before + "12"):
        assert taken(model, one), one
    assert not taken(model, before + '{"name": "Bob"}')
    assert model.ask(tools=TOOLS, tool_choice="none", guided_json=SCHEMA).status_code == 200
    assert not taken(model, good)


def test_structure_beside_tools_over_every_api(speak: Speak) -> None:
    model = served(speak, "hermes")
    good = CALLS["hermes"].replace("VALUE", "1")
    items = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
    blocks = [{"name": name, "input_schema": SCHEMA} for name in ("look", "write")]
    told = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    user = [{"role": "user", "content": "Hi"}]
    for path, body in (
        ("/v1/chat/completions", {"messages": user, "tools": TOOLS, "response_format": {"type": "json_object"}}),
        ("/v1/responses", {"input": "Hi", "tools": items, "text": {"format": told}}),
        (
            "/v1/messages",
            {
                "max_tokens": 99,
                "messages": user,
                "tools": blocks,
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            },
        ),
    ):
        response = model.client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert taken(model, good)
        assert taken(model, '{"count": 1}')
        assert not taken(model, "Hello")


def test_an_answer_in_a_form_may_be_reasoned_about_first(speak: Speak) -> None:
    """Where the model opens its reasoning itself; where the prompt says that there is none, it comes at once."""
    for is_special in (True, False):
        model = served(speak, "hermes", is_special)
        model.ask(guided_json=SCHEMA)
        assert taken(model, '<think>Hm.</think>\n{"count": 1}')
        assert taken(model, '{"count": 1}')
        assert not taken(model, ' {"count": 1}')
        model.ask(guided_json=SCHEMA, enable_thinking=False)
        assert not taken(model, '<think>Hm.</think>\n{"count": 1}')
        assert taken(model, '{"count": 1}')


@pytest.mark.parametrize("name", [one.name for one in FORMATS if one.name not in CALLS])
def test_formats_without_a_grammar(speak: Speak, name: str) -> None:
    model = served(speak, name)
    for more, param in (
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": STRICT}, "tools.strict"),
        ({"tools": TOOLS, "guided_json": SCHEMA}, "guided_json"),
    ):
        response = model.ask(**more)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert name in response.json()["error"]["message"]
    assert model.ask(tools=TOOLS).status_code == 200


def test_what_cannot_be_enforced(speak: Speak) -> None:
    model = served(speak, "hermes")
    required = {"tools": TOOLS, "tool_choice": "required"}
    for more, param in (
        ({**required, "ignore_eos": True}, "ignore_eos"),
        ({**required, "guided_regex": "a"}, "tool_choice"),
        ({**required, "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
         "tool_choice"),
    ):  # fmt: skip
        response = model.ask(**more)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
    model.backend.serving().grammars = None
    error = model.ask(**required).json()["error"]
    assert (error["param"], error["code"]) == ("tool_choice", "unsupported_parameter")
