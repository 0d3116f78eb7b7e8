"""Requests made by schemathesis out of the server's own OpenAPI, good and bad ones: no 5xx, no hang, errors in shape.

    python -m benchmarks.server_fuzz models/foreroute-tiny [--cases 5000]

Half of the cases fit the schema, half do not. 503 and 429 are no failures (they are promised). After every hundredth a
plain request must be answered as at the start. Then come those of server_abuse.py. The last line is JSON.
"""

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks import _harness, server_abuse

_ALLOWED_5XX = (503,)
# Longer than any answer takes here (64 tokens of context), shorter than a hang.
_WITHIN_S = 60.0
_OFTEN = 100


def fuzz(
    schema: Any, cases: int, call: Callable[[Any], Any], still_well: Callable[[], object] = lambda: None
) -> Counter[str]:
    """Make about `cases` requests and look at every answer.

    Args:
        schema: of schemathesis. call: sends a case, returns its response. still_well: called after every hundredth.
    Returns:
        How many answers of each status each operation gave ("POST /tokenize 400").
    Raises:
        AssertionError: an answer that must not be; it names the request.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode

    operations = [found.ok() for found in schema.get_all_operations()]
    # Those that read a body have more ways to go wrong.
    weights = [8 if operation.method.upper() == "POST" else 1 for operation in operations]
    seen: Counter[str] = Counter()

    def look(case: Any) -> None:
        label, began = case.operation.label, time.monotonic()
        response = call(case)
        status = response.status_code
        seen[f"{label} {status}"] += 1
        if sum(seen.values()) % _OFTEN == 0:
            still_well()
        assert status < 500 or status in _ALLOWED_5XX, f"{label} gave {status} to {case.body!r}"
        if status >= 400 and status != 503:
            error = json.loads(response.content)["error"]
            shape = ["type", "message"] if "/v1/messages" in label else ["message", "type", "param", "code"]
            assert [name for name in error if name != "details"] == shape, f"{label}: {error}"
        assert time.monotonic() - began < _WITHIN_S, f"{label} took too long with {case.body!r}"

    for operation, weight in zip(operations, weights, strict=True):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method.upper() != "POST":
                continue
            share = max(cases * weight // sum(weights), 1)
            many = share if operation.method.upper() != "POST" else max(share // 2, 1)
            # Not shrunk and not kept: what failed is printed as it was.
            settings(
                max_examples=many, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(operation.as_strategy(generation_mode=mode))(look))()  # fmt: skip
    return seen


def abuse(url: str, cases: int) -> Counter[str]:
    """Send some `cases` of server_abuse.py.

    Raises:
        AssertionError: an answer that must not be.
    """
    seen: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=_WITHIN_S, headers={"Content-Type": "application/json"}) as client:
        for seed in itertools.count():
            server_abuse.broken_off(url, seed, _WITHIN_S)
            for path, body in server_abuse.bodies(seed):
                if sum(seen.values()) >= cases:
                    return seen
                status = client.post(path, content=body).status_code
                seen[f"abuse {path} {status}"] += 1
                assert status < 500 or status in _ALLOWED_5XX, f"{path} gave {status} to {body[:300]!r}"
    return seen


def plain(url: str) -> str:
    """The answer to a plain request."""
    asked = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8}
    found = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=_WITHIN_S)
    return str(found.json()["choices"][0]["message"]["content"])


def main() -> None:
    """Serve the model, fuzz it, print what came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--abuse", type=int, default=500, help="of server_abuse.py")
    asked = parser.parse_args()
    import schemathesis

    from tests.server.process import serving

    # A short context, so that an answer without a length limit is short too.
    with serving("--ctx-size", "64", model=asked.model) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        began = time.perf_counter()
        first = plain(served.url)

        def still_well() -> None:
            again = plain(served.url)
            assert again == first, f"a plain request was answered {first!r}, and now {again!r}"

        seen = fuzz(schema, asked.cases, lambda case: case.call(base_url=served.url, timeout=_WITHIN_S), still_well)
        seen += abuse(served.url, asked.abuse)
        still_well()
        seconds = time.perf_counter() - began
        is_alive = served.child.poll() is None
    for name, count in sorted(seen.items()):
        print(f"{count:6} {name}")
    figures = {"cases": sum(seen.values()), "seconds": round(seconds, 1), "is_alive": is_alive, "answers": dict(seen)}
    assert is_alive, "the server has died"
    _harness.record("server-fuzz", figures)


if __name__ == "__main__":
    main()
