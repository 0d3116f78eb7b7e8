"""A few cases of benchmarks/server_fuzz.py, over the fake engine; the benchmark makes thousands on a model."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Served

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, which foreroute[dev] installs")


def test_a_hundred_requests(serve: Callable[..., Served]) -> None:
    from benchmarks.server_fuzz import fuzz

    served = serve(answer="a漢")
    schema = schemathesis.openapi.from_dict(served.client.get("/openapi.json").json())

    def call(case: Any) -> Any:
        made = case.as_transport_kwargs(base_url="http://127.0.0.1:8000")
        made = {name: value for name, value in made.items() if value is not None}
        made.pop("cookies", None)
        if "data" in made:
            made["content"] = made.pop("data")
        return served.client.request(made.pop("method"), made.pop("url"), **made)

    seen = fuzz(schema, 100, call)
    assert sum(seen.values()) > 80
    statuses = {name.split()[-1] for name in seen}
    assert {"200", "400"} <= statuses
    assert served.engine.state().running == 0
