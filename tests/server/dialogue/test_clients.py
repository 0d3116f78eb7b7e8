"""Clients as people have them, unmodified, against a scripted model: tools and reasoning, whole and streamed."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.dialogue.parsing.formats import format_named
from tests.server.dialogue import templates
from tests.server.dialogue.answers import VALID, Written
from tests.server.dialogue.conftest import Scripted
from tests.server.dialogue.test_chat_tools import WIRE_TOOLS

Speak = Callable[..., Scripted]
FIRST = '<think>Hm.</think>I look.\n<tool_call>\n{"name": "look", "arguments": {"count": 1}}\n</tool_call>'
URL = "http://127.0.0.1:8000/v1"


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}, which foreroute[dev] installs")


@needs("openai")
@pytest.mark.parametrize("written", [one for one in VALID if one.calls], ids=lambda one: one.format)
def test_openai_reads_every_format(speak: Speak, written: Written) -> None:
    import openai

    own = format_named(written.format)
    model = speak(templates.HARMONY if own.has_channels else templates.HERMES, written.text, own.markers, own)
    client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, http_client=model.client)
    asked: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "tools": WIRE_TOOLS}
    message = client.chat.completions.create(**asked).choices[0].message
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls or []] == list(written.calls)
    with client.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_completion().choices[0]
    assert [(call.function.name, call.function.arguments) for call in found.message.tool_calls or []] == list(
        written.calls
    )
    assert (found.message.content or "") == written.content
    assert found.finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.done") == len(written.calls)


@needs("openai")
def test_openai_with_a_tool_from_a_model_of_pydantic(speak: Speak) -> None:
    """`parse`: strict schemas, arguments as objects, and the answer sent back as the SDK dumps it."""
    import openai
    from pydantic import BaseModel

    class Look(BaseModel):
        count: int

    pytest.importorskip("llguidance", reason="strict needs llguidance: pip install foreroute[structured]")
    from foreroute.structured.compiler import GrammarCompiler

    model = speak(templates.HERMES, FIRST.replace('"look"', '"Look"'))
    model.backend.serving().grammars = GrammarCompiler(model.tokenizer, len(model.tokenizer), [0])
    client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, http_client=model.client)
    asked: dict[str, Any] = {"model": "model", "tools": [openai.pydantic_function_tool(Look)]}
    talk: list[Any] = [{"role": "user", "content": "Hi"}]
    message = client.chat.completions.parse(messages=talk, **asked).choices[0].message
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.function.parsed_arguments == Look(count=1)
    assert message.model_extra == {"reasoning_content": "Hm."}
    model.engine.answer = "It is 1."
    for own in (message, message.model_dump(), message.model_dump(exclude_unset=True)):
        told = [*talk, own, {"role": "tool", "tool_call_id": call.id, "content": "1"}]
        assert client.chat.completions.create(messages=told, **asked).choices[0].message.content == "It is 1."
        assert "<think>Hm.</think>I look.<tool_call>" in model.prompt
        assert "<tool_response>1</tool_response>" in model.prompt


@needs("langchain_openai")
def test_langchain_binds_tools(speak: Speak) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = speak(templates.HERMES, FIRST)
    chat = ChatOpenAI(base_url=URL, api_key="none", model="model", max_retries=0, http_client=model.client)
    bound = chat.bind_tools(WIRE_TOOLS)
    answer = bound.invoke("Hi")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("look", {"count": 1})]
    pieces = list(bound.stream("Hi"))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("look", {"count": 1})]
    model.engine.answer = "It is 1."
    told = [HumanMessage("Hi"), answer, ToolMessage("1", tool_call_id=answer.tool_calls[0]["id"])]
    assert bound.invoke(told).content == "It is 1."
    assert "<tool_response>1</tool_response>" in model.prompt


@needs("llama_index.llms.openai_like" if importlib.util.find_spec("llama_index") else "llama_index")
def test_llama_index_calls_tools(speak: Speak) -> None:
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def look(count: int) -> str:
        """Look."""
        return str(count)

    model = speak(templates.HERMES, FIRST)
    llm = OpenAILike(
        model="model", api_base=URL, api_key="none", is_chat_model=True, is_function_calling_model=True, max_retries=0,
        http_client=model.client,
    )  # fmt: skip
    found = llm.chat_with_tools([FunctionTool.from_defaults(look)], user_msg="Hi")
    calls = llm.get_tool_calls_from_response(found)
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("look", {"count": 1})]


def test_what_a_client_adds_up_is_json(speak: Speak) -> None:
    """Deltas by the rule of every client: the first of an index has id and name, all have pieces of arguments."""
    model = speak(templates.HERMES, FIRST)
    response = model.ask(tools=WIRE_TOOLS, stream=True)
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"]
        for line in response.text.split("\n\n")
        if line.startswith("data: {")
    ]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == {"count": 1}
    assert [bool(piece.get("id")) for piece in pieces] == [True] + [False] * (len(pieces) - 1)
