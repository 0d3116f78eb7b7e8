"""A client that tells less than its script does, or something else, is noticed: also where none is installed."""

from typing import Any

import pytest

from tests.clients import test_formats, test_shipped
from tests.clients.told import CLIENTS, REFUSED, wanted_of

SHIPPED: dict[str, Any] = {
    "text": test_shipped.ANSWER, "streamed": test_shipped.ANSWER, "reasoning": "",
    "again": test_shipped.ANSWER_AGAIN, "again_after_stream": test_shipped.ANSWER_AGAIN,
    "calls": [["look", {"count": 1}]], "streamed_calls": [["look", {"count": 2}]],
    "after": "1", "streamed_after": "1\n1", "looped": test_shipped.ANSWER, "refused": REFUSED,
    "person": {"name": "Ada", "is_old": True}, "streamed_person": {"name": "Grace", "is_old": False},
    "called_person": {"name": "Ada", "is_old": False},
}  # fmt: skip


def wrongs(right: dict[str, Any]) -> list[dict[str, Any]]:
    """Nothing, one thing less, and one thing that is wrong."""
    less = [{name: value for name, value in right.items() if name != missing} for missing in right]
    return [{}, *less, *({**right, name: "It cannot."} for name in right)]


@pytest.mark.parametrize("client", CLIENTS)
def test_what_the_model_that_ships_says(client: str) -> None:
    right = {name: SHIPPED[name] for name in wanted_of(client, is_enforced=True)}
    test_shipped.check(client, right)
    for wrong in wrongs(right):
        with pytest.raises((AssertionError, AttributeError)):
            test_shipped.check(client, wrong)


@pytest.mark.parametrize("client", CLIENTS)
def test_what_scripted_models_say(client: str) -> None:
    for written in test_formats.CALLING:
        right = test_formats.expected(client, written)
        assert right.keys() == wanted_of(client)
        assert all(found != right for found in wrongs(right))
