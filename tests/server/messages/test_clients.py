"""Anthropic's own client, unmodified, against a scripted model: messages, tools, streams and counts."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.dialogue import templates
from tests.server.dialogue.conftest import Scripted
from tests.server.messages.test_messages import WIRE_TOOLS

anthropic = pytest.importorskip("anthropic", reason="needs anthropic: pip install anthropic")

Speak = Callable[..., Scripted]
FIRST = '<think>Hm.</think>I look.\n<tool_call>\n{"name": "look", "arguments": {"count": 1}}\n</tool_call>'


def client_of(model: Scripted) -> Any:
    return anthropic.Anthropic(
        base_url="http://127.0.0.1:8000", api_key="none", max_retries=0, http_client=model.client
    )


def test_a_conversation_with_a_tool(speak: Speak) -> None:
    """Whole and streamed; the answer goes back as the client holds it."""
    model = speak(templates.HERMES, FIRST)
    client = client_of(model)
    talk: list[Any] = [{"role": "user", "content": "Hi"}]
    asked: dict[str, Any] = {"model": "model", "max_tokens": 999, "tools": WIRE_TOOLS, "system": "Be brief."}
    counted = {name: one for name, one in asked.items() if name != "max_tokens"}
    whole = client.messages.create(messages=talk, **asked)
    with client.messages.stream(messages=talk, **asked) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_message()
    assert {"text", "thinking", "input_json", "content_block_stop", "message_stop"} <= kinds
    for message in (whole, streamed):
        model.engine.answer = "It is 1."
        thought, text, call = message.content
        assert (thought.type, thought.thinking) == ("thinking", "Hm.")
        assert (text.type, text.text) == ("text", "I look.")
        assert (call.type, call.name, call.input) == ("tool_use", "look", {"count": 1})
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens == len(FIRST)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "1"}
        for back in (message.content, [block.model_dump() for block in message.content]):
            more = [{"role": "assistant", "content": back}, {"role": "user", "content": [result]}]
            last = client.messages.create(messages=[*talk, *more], **asked)
            assert [block.text for block in last.content] == ["It is 1."]
            assert "<think>Hm.</think>I look.<tool_call>" in model.prompt
            assert "<tool_response>1</tool_response>" in model.prompt
        count = client.messages.count_tokens(messages=[*talk, *more], **counted)
        assert count.input_tokens == last.usage.input_tokens


def test_the_runner_of_tools(speak: Speak) -> None:
    model = speak(templates.HERMES, FIRST)

    @anthropic.beta_tool
    def look(count: int) -> str:
        """Look."""
        model.engine.answer = "It is 1."
        return str(count)

    runner = client_of(model).beta.messages.tool_runner(
        model="model", max_tokens=999, tools=[look], messages=[{"role": "user", "content": "Hi"}]
    )
    assert runner.until_done().content[0].text == "It is 1."


def test_errors_are_of_the_clients_kinds(speak: Speak) -> None:
    client = client_of(speak(templates.HERMES, "Hello"))
    talk: list[Any] = [{"role": "user", "content": "Hi"}]
    with pytest.raises(anthropic.NotFoundError, match="no such model"):
        client.messages.create(messages=talk, model="other", max_tokens=9)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(messages=talk, model="model", max_tokens=0)
