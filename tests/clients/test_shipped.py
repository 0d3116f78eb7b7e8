"""Unmodified clients and the model that ships: chats, streams, an enforced call and its result, objects by a schema."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.conftest import Do
from tests.clients.told import CLIENTS, REFUSED, wanted_of
from tests.server.process import NAME, serving


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """The model that ships. It has no tools of its own: they are described to it, and calls are enforced."""
    with serving("--tool-parser", "hermes") as process:
        yield process.url


QUESTION, ANSWER = "12 + 34", "2+4+0=6 c0\n1+3+0=4 c0\n= 46"
RESULT = "1"
AGAIN, ANSWER_AGAIN = "50 + 49", "0+9+0=9 c0\n5+4+0=9 c0\n= 99"
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
        "url": tiny, "model": NAME, "question": QUESTION, "again": AGAIN, "call": QUESTION, "tools": [LOOK],
        "choice": "look", "result": RESULT, "person": "Who?", "limit": 100,
    }  # fmt: skip
    (found,) = do(client, [job])
    check(client, found)


def check(client: str, found: dict[str, Any]) -> None:
    """Check that a client told all that it is to tell of this job, and got what this model says."""
    assert found.keys() == wanted_of(client, is_enforced=True)
    for name, value in found.items():
        if name in ("text", "streamed", "looped"):
            assert value == ANSWER
        elif name in ("again", "again_after_stream"):
            assert value.startswith(ANSWER_AGAIN)
        elif name == "reasoning":
            assert not value
        elif name.endswith("calls"):
            assert value in ([["look", {"count": 1}]], [["look", {"count": 2}]])
        elif name.endswith("person"):
            assert value.keys() == {"name", "is_old"}
            assert value["name"] in ("Ada", "Grace")
            assert isinstance(value["is_old"], bool)
        elif name.endswith("after"):
            assert value.startswith(RESULT), "it has seen what the call came to, and says it again"
        else:
            assert (name, value) == ("refused", REFUSED)
