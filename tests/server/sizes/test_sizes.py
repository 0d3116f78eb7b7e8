"""How much may be in one request: it is refused before anything is made of it, and what is taken is joined once."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from foreroute.server.api import chat_messages
from foreroute.server.api.messages import blocks
from foreroute.server.api.messages.schema import CountRequest
from foreroute.server.api.responses import items
from foreroute.server.api.responses.schema import ResponsesRequest
from foreroute.server.api.schema import ChatRequest
from foreroute.server.api.strict import MOST_CALLS, MOST_MESSAGES, MOST_PARTS, MOST_TOOLS
from foreroute.server.dialogue.described import with_described_tools
from foreroute.server.dialogue.messages import Dialogue, DialogueMessage, ToolCall, joined
from foreroute.server.dialogue.reading import TemplateReading
from foreroute.server.dialogue.rendering import template_input
from tests.server.conftest import Served

USER = {"role": "user", "content": "Hi"}
PARTS = [{"type": "text", "text": "a"}] * (MOST_PARTS + 1)
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLS = [CALL] * (MOST_CALLS + 1)
CLAUDE = {"max_tokens": 9, "messages": [USER]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": [USER] * (MOST_MESSAGES + 1)}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": PARTS}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": CALLS}]}, "messages"),
        ("chat/completions", {"messages": [USER], "tools": [{}] * (MOST_TOOLS + 1)}, "tools"),
        ("responses", {"input": [USER] * (4 * MOST_MESSAGES + 1)}, "input"),
        ("responses", {"input": [{"role": "user", "content": PARTS}]}, "messages"),
        ("responses", {"input": "Hi", "tools": [{}] * (MOST_TOOLS + 1)}, "tools"),
        ("messages", {**CLAUDE, "messages": [USER] * (MOST_MESSAGES + 1)}, "messages"),
        ("messages", {**CLAUDE, "messages": [{"role": "user", "content": PARTS}]}, "messages"),
        ("messages", {**CLAUDE, "system": PARTS}, "system"),
        ("messages", {**CLAUDE, "tools": [{}] * (MOST_TOOLS + 1)}, "tools"),
        ("messages/count_tokens", {"messages": [USER] * (MOST_MESSAGES + 1)}, "messages"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)  # fmt: skip
def test_too_many_are_refused_before_any_work(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a conversation is made of what is refused")

    for kind in (ChatRequest, CountRequest, ResponsesRequest):
        monkeypatch.setattr(kind, "dialogue", never)
    for kind in (chat_messages.ContentPart, chat_messages.WireCall, blocks.WireText, blocks.WireBlock):
        monkeypatch.setattr(kind, "__init__", never)
    response = serve().client.post(f"/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert "at most" in error["message"]
    assert error.get("param", param) == param


def test_messages_are_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(messages: Sequence[DialogueMessage]) -> DialogueMessage:
        counts.append(len(messages))
        return joined(messages)

    for module in (blocks, items):
        monkeypatch.setattr(module, "joined", counted)
    text = [blocks.WireBlock(type="text", text=str(at)) for at in range(100)]
    (message,) = blocks.conversation("", [blocks.WireMessage(role="user", content=text)] * 3)
    assert (message.text or "").split("\n") == [str(at) for at in range(100)] * 3
    assert counts == [300]
    counts.clear()
    said = [items.WireItem(role="assistant", content=str(at)) for at in range(300)]
    (message,) = items.conversation("", said)
    assert (message.text or "").split("\n") == [str(at) for at in range(300)]
    assert counts == [300]


class Counted(str):
    """An id that counts how often it is compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Counted.count += 1
        return str.__eq__(self, str(other))

    __hash__ = str.__hash__


def test_calls_are_not_searched_for_each_answer() -> None:
    ids = [Counted(f"id{at}") for at in range(500)]
    calls = tuple(ToolCall(one, "look", "{}") for one in ids)
    answers = [DialogueMessage("tool", one, call_id=Counted(one)) for one in ids]
    dialogue = Dialogue((DialogueMessage("assistant", calls=calls), *answers))
    Counted.count = 0
    reading = TemplateReading(has_tools=True, one_call=True)
    messages = template_input(dialogue, "{{ messages }}", reading).messages
    assert [message["content"] for message in messages[1::2]] == ids
    assert Counted.count < 10 * len(ids)


def test_answers_of_tools_follow_their_calls() -> None:
    """Without an id they take the calls in order; what follows each other is one message in words."""
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    given = [
        {"role": "assistant", "tool_calls": [{**call, "id": one} for one in ("a", "b", "c")]},
        {"role": "tool", "content": "2", "tool_call_id": "b"}, *[{"role": "tool", "content": one} for one in "13x"],
        USER,
    ]  # fmt: skip
    messages = chat_messages.messages_of([chat_messages.ChatMessage.model_validate(one) for one in given])
    assert [message.call_id for message in messages[1:5]] == ["b", "a", "c", None]
    told = with_described_tools(Dialogue(messages)).messages
    assert [message.role for message in told] == ["assistant", "user", "user"]
    assert (told[1].text or "").split("\n")[1::3] == ["2", "1", "3", "x"]
