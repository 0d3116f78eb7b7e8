"""Unmodified clients and the model that ships: chats, streams, an enforced call and its result, objects by a schema."""

from collections.abc import Iterator

import pytest

from tests.clients.conftest import CLIENTS, Do
from tests.server.process import NAME, serving


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """The model that ships. It has no tools of its own: they are described to it, and calls are enforced."""
    with serving("--tool-parser", "hermes") as process:
        yield process.url


QUESTION, ANSWER = "12 + 34", "2+4+0=6 c0\n1+3+0=4 c0\n= 46"
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
        "choice": "look", "result": "1", "person": "Who?", "limit": 100,
    }  # fmt: skip
    (found,) = do(client, [job])
    for name, value in found.items():
        if name in ("text", "streamed"):
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
        else:
            assert isinstance(value, str), name
