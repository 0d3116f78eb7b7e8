"""Ask a running server over OpenAI's API with Python's standard library alone, streamed.

foreroute serve foreroute-tiny --port 8000
python examples/serve_client.py [http://127.0.0.1:8000/v1] [QUESTION]
"""

import json
import sys
import urllib.request

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
question = sys.argv[2] if len(sys.argv) > 2 else "Mon 3 Jul + 2 days"


def call(path: str, body: dict[str, object] | None = None) -> urllib.request.Request:
    """A request to the server; a GET without a body."""
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.Request(f"{base_url}{path}", data, {"Content-Type": "application/json"})


with urllib.request.urlopen(call("/models")) as answer:
    model = json.load(answer)["data"][0]["id"]
chat = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 64}
with urllib.request.urlopen(call("/chat/completions", chat)) as stream:
    for line in stream:
        event = line.decode().removeprefix("data: ").strip()
        if event and event != "[DONE]" and event.startswith("{"):
            delta = json.loads(event)["choices"][0]["delta"]
            print(delta.get("content", ""), end="", flush=True)
print()
