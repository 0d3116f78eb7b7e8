"""What a client is asked to do, and how it tells what came of it: jobs as JSON come in, results as JSON go out."""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel


class Job(NamedTuple):
    """url: of the server, without /v1. question, again: a chat's first and second turn.

    call: a question that is answered with calls of `tools` (name, description, parameters). choice: the name of
    one that must be called, or "". result: what each call came to. person: a question that is answered with a `Person`.
    limit: of an answer's tokens.
    """

    url: str
    model: str
    question: str
    again: str
    call: str
    tools: list[dict[str, Any]]
    choice: str
    result: str
    person: str
    limit: int

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The tools as chat completions have them."""
        return [{"type": "function", "function": tool} for tool in self.tools]


class Person(BaseModel):
    name: Literal["Ada", "Grace"]
    is_old: bool

    def plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def run(client: Callable[[Job], dict[str, Any]]) -> None:
    """Do every job that standard input names, and write the results to standard output."""
    jobs = [Job(**one) for one in json.load(sys.stdin)]
    # Some print advice there.
    with contextlib.redirect_stdout(sys.stderr):
        results = [client(job) for job in jobs]
    json.dump(results, sys.stdout)
