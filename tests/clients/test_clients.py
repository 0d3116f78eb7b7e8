"""Clients as people have them, unmodified: chats, streams, calls and their results, objects, and turns after reasoning.

Each is tried against scripted models that call tools in every format, and against the model that ships.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from foreroute.server.dialogue.parsing.formats import format_named
from tests.clients import scripted
from tests.server.dialogue.answers import TOOLS, VALID, Written
from tests.server.process import NAME, serving

Do = Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]]

CLIENTS = (
    "with_openai_chat.py",
    "with_openai_responses.py",
    "with_anthropic.py",
    "with_langchain.py",
    "with_litellm.py",
    "with_instructor.py",
    "with_agents.py chat",
    "with_agents.py responses",
    "with_openai_chat.mjs",
    "with_openai_responses.mjs",
    "with_ai_sdk.mjs compatible",
    "with_ai_sdk.mjs chat",
    "with_ai_sdk.mjs responses",
)
CALLING = [one for one in VALID if one.calls]
# Formats without a grammar of calls, in which none can be enforced.
FREE = ("gemma", "pythonic", "deepseek_dsml")


@pytest.fixture(scope="module")
def urls(byte_tokenizer: Any) -> Iterator[list[str]]:
    """A server for each way of calling."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(scripted.scripted(byte_tokenizer, one)) for one in CALLING]


def job_for(url: str, written: Written) -> dict[str, Any]:
    return {
        "url": url, "model": "scripted", "question": scripted.QUESTION, "again": scripted.ASK_AGAIN,
        "call": scripted.CALL, "tools": [dict(tool.definition) for tool in TOOLS.values()], "choice": "auto",
        "result": scripted.RESULT, "person": scripted.PERSON_QUESTION, "forced": False,
    }  # fmt: skip


def expected(written: Written, found: dict[str, Any]) -> dict[str, Any]:
    """What a client should have got, of the things that it tells."""
    calls = [[name, json.loads(arguments)] for name, arguments in written.calls]
    everything = {
        "text": scripted.TEXT, "streamed": scripted.TEXT, "reasoning": scripted.THOUGHT,
        "again": scripted.AGAIN, "again_after_stream": scripted.AGAIN, "calls": calls, "streamed_calls": calls,
        "after": scripted.AFTER, "streamed_after": scripted.AFTER, "looped": scripted.AFTER,
        "person": scripted.PERSON, "streamed_person": scripted.PERSON,
    }  # fmt: skip
    return {name: everything[name] for name in found}


@pytest.mark.parametrize("client", CLIENTS)
def test_every_format_of_calls(client: str, urls: list[str], do: Do) -> None:
    jobs = [job_for(url, written) for url, written in zip(urls, CALLING, strict=True)]
    for written, found in zip(CALLING, do(client, jobs), strict=True):
        assert found == expected(written, found), written


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """The model that ships. It has no tools of its own: they are described to it, and calls are enforced."""
    with serving("--tool-parser", "hermes") as process:
        yield process.url


QUESTION, ANSWER = "12 + 34", "2+4+0=6 c0\n1+3+0=4 c0\n= 46"
LOOK = {
    "name": "look",
    "description": "Looks.",
    "parameters": {
        "type": "object",
        "properties": {"count": {"type": "integer", "enum": [1, 2]}},
        "required": ["count"],
        "additionalProperties": False,
    },
}

@pytest.mark.parametrize("client", CLIENTS)
def test_the_model_that_ships(client: str, tiny: str, do: Do) -> None:
    job = {
        "url": tiny, "model": NAME, "question": QUESTION, "again": "50 + 49", "call": QUESTION, "tools": [LOOK],
        "choice": "required", "result": "1", "person": "Who?", "forced": True,
    }  # fmt: skip
    (found,) = do(client, [job])
    for name, value in found.items():
        if name in ("text", "streamed"):
            assert value == ANSWER
        elif name == "reasoning":
            assert not value
        elif name.endswith("calls"):
            assert value
            assert all(call in (["look", {"count": 1}], ["look", {"count": 2}]) for call in value)
        elif name.endswith("person"):
            assert value.keys() == {"name", "is_old"}
            assert value["name"] in ("Ada", "Grace")
            assert isinstance(value["is_old"], bool)
        else:
            assert isinstance(value, str), name
