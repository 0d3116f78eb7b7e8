"""Unmodified clients and scripted models: chats, streams, objects, calls in every format and what they came to."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients import scripted
from tests.clients.conftest import Do
from tests.clients.told import CLIENTS, REFUSED, wanted_of
from tests.server.dialogue.answers import TOOLS, VALID, Written

# Of each format the answer that says most.
CALLING = list({one.format: one for one in sorted(VALID, key=lambda one: len(one.calls)) if one.calls}.values())


@pytest.fixture(scope="module")
def urls(byte_tokenizer: Any) -> Iterator[list[str]]:
    """A server for each format of calls."""
    with contextlib.ExitStack() as stack:
        grammars = stack.enter_context(scripted.compiler(byte_tokenizer))
        yield [stack.enter_context(scripted.scripted(byte_tokenizer, one, grammars)) for one in CALLING]


def job_for(url: str) -> dict[str, Any]:
    return {
        "url": url, "model": "scripted", "question": scripted.QUESTION, "again": scripted.ASK_AGAIN,
        "call": scripted.CALL, "tools": [dict(tool.definition) for tool in TOOLS.values()], "choice": "",
        "result": scripted.RESULT, "person": scripted.PERSON_QUESTION, "limit": 2000,
    }  # fmt: skip


def expected(client: str, written: Written) -> dict[str, Any]:
    """What a client should have got, of the things that it is to tell."""
    calls = [[name, json.loads(arguments)] for name, arguments in written.calls]
    everything = {
        "text": scripted.TEXT, "streamed": scripted.TEXT, "reasoning": scripted.THOUGHT,
        "again": scripted.AGAIN, "again_after_stream": scripted.AGAIN, "calls": calls, "streamed_calls": calls,
        "after": scripted.AFTER, "streamed_after": scripted.AFTER, "looped": scripted.AFTER,
        "refused": REFUSED, "person": scripted.PERSON, "streamed_person": scripted.PERSON,
    }  # fmt: skip
    return {name: everything[name] for name in wanted_of(client)}


@pytest.mark.parametrize("client", CLIENTS)
def test_every_format_of_calls(client: str, urls: list[str], do: Do) -> None:
    jobs = [job_for(url) for url in urls]
    for written, found in zip(CALLING, do(client, jobs), strict=True):
        assert found == expected(client, written), written
