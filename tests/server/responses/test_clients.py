"""OpenAI's own client, unmodified, speaks Responses with a scripted model: tools, streams, items sent back."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.dialogue import templates
from tests.server.dialogue.conftest import Scripted
from tests.server.responses.test_responses import CUSTOM, PATCH, WIRE_TOOLS

openai = pytest.importorskip("openai", reason="needs openai, which foreroute[dev] installs")

Speak = Callable[..., Scripted]
FIRST = '<think>Hm.</think>I look.\n<tool_call>\n{"name": "look", "arguments": {"count": 1}}\n</tool_call>'


def client_of(model: Scripted) -> Any:
    return openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0, http_client=model.client)


def test_a_conversation_with_a_tool(speak: Speak) -> None:
    model = speak(templates.HERMES, FIRST)
    client = client_of(model)
    talk: list[Any] = [{"role": "user", "content": "Hi"}]
    asked: dict[str, Any] = {"model": "model", "tools": WIRE_TOOLS, "instructions": "Be brief."}
    whole = client.responses.create(input=talk, **asked)
    with client.responses.stream(input=talk, **asked) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.done", "response.completed"} <= kinds
    for found in (whole, streamed):
        model.engine.answer = "It is 1."
        assert found.output_text == "I look."
        assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]
        call = found.output[-1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "1"}
        for back in (found.output, [item.model_dump() for item in found.output]):
            last = client.responses.create(input=[*talk, *back, result], **asked)
            assert last.output_text == "It is 1."
            assert "<think>Hm.</think>I look.<tool_call>" in model.prompt
            assert "<tool_response>1</tool_response>" in model.prompt


def test_a_custom_tool(speak: Speak) -> None:
    client = client_of(speak(templates.HERMES, PATCH))
    (item,) = client.responses.create(model="model", input="Hi", tools=[CUSTOM]).output
    assert (item.type, item.input) == ("custom_tool_call", '*** "a"\n+b')


def test_errors_are_of_the_clients_kinds(speak: Speak) -> None:
    client = client_of(speak(templates.HERMES, "Hello"))
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="model", input="Hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.responses.create(model="other", input="Hi")
