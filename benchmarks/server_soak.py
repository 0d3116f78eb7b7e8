"""Many clients at once, some of which leave or hardly read: nothing but promised errors, and everything given back.

    python -m benchmarks.server_soak models/foreroute-tiny [--minutes 5] [--clients 64]

Each client asks again and again: streamed or whole, short or long, a fifth of the time leaving in the middle, a tenth
of the time reading slowly. Afterwards no request may be open and no KV block taken; the memory is held against what the
server had when it was ready and after its first minute. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import _harness

_PROMISED = (429, 503)
_LEAVE, _SLOW = 0.2, 0.1
_WITHIN_S = 120.0


async def client(draw: random.Random, host: str, port: int, until_s: float, seen: Counter[str]) -> None:
    """Ask until time is up; count what came."""
    while time.monotonic() < until_s:
        kind = draw.random()
        manner = "leaves" if kind < _LEAVE else "slow" if kind < _LEAVE + _SLOW else "reads"
        is_stream = draw.random() < 0.6
        text = "import " * draw.choice((1, 10, 100))
        asked = {
            "prompt": text, "max_tokens": draw.choice((4, 16, 48)), "stream": is_stream,
            "temperature": draw.choice((0, 1)), "n": draw.choice((1, 1, 2)),
        }  # fmt: skip
        status = await asyncio.wait_for(_ask(draw, host, port, asked, manner), _WITHIN_S)
        seen[f"{manner} {status}"] += 1
        if status in _PROMISED:
            await asyncio.sleep(draw.uniform(0.2, 1.0))


async def _ask(draw: random.Random, host: str, port: int, asked: dict[str, Any], manner: str) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        if manner == "leaves" and draw.random() < 0.5:
            await asyncio.sleep(draw.uniform(0, 0.5))
            return 0
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        got = b""
        while part := await reader.read(512 if manner == "slow" else 65536):
            got += part
            if manner == "leaves" and len(got) > 500:
                return status
            if manner == "slow":
                await asyncio.sleep(0.05)
        if status == 200:
            assert b'{"error":' not in got, got[-500:]
            assert not asked["stream"] or b"data: [DONE]" in got, got[-500:]
        return status
    finally:
        writer.close()


def rss_bytes(process_id: int) -> int:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process_id}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def scraped(host: str, port: int) -> dict[str, float]:
    """The server's metrics."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode().split("\r\n\r\n", 1)[1]
    writer.close()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("foreroute_"))
    return {name: float(value) for name, value in rows}


async def soak(host: str, port: int, process_id: int, clients: int, seconds: float) -> dict[str, Any]:
    """Let the clients at it; returns what was seen, after everything came to rest."""
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + seconds
    tasks = [asyncio.create_task(client(random.Random(at), host, port, until_s, seen)) for at in range(clients)]
    memory, waiting, running = [], 0.0, 0.0
    while time.monotonic() < until_s:
        await asyncio.sleep(min(1.0, seconds / 10))
        memory.append(rss_bytes(process_id))
        metrics = await scraped(host, port)
        waiting = max(waiting, metrics["foreroute_num_requests_waiting"])
        running = max(running, metrics["foreroute_num_requests_running"])
    await asyncio.gather(*tasks)
    rest_by_s = time.monotonic() + 20
    while True:
        metrics = await scraped(host, port)
        left = {
            name: metrics[f"foreroute_{name}"]
            for name in ("num_requests_running", "num_requests_waiting")
        }  # fmt: skip
        if not any(left.values()) or time.monotonic() > rest_by_s:
            break
        await asyncio.sleep(0.2)
    files = len(list(Path(f"/proc/{process_id}/fd").iterdir()))
    threads = len(list(Path(f"/proc/{process_id}/task").iterdir()))
    first = memory[: max(len(memory) // 5, 1)]
    return {
        "answers": dict(seen), "requests": sum(seen.values()), "most_running": running, "most_waiting": waiting,
        "left": left, "kv_cache_usage": metrics["foreroute_kv_cache_usage_perc"], "files": files, "threads": threads,
        "rss_first_mb": max(first) / 1e6, "rss_most_mb": max(memory) / 1e6, "rss_last_mb": rss_bytes(process_id) / 1e6,
        "tokens": metrics["foreroute_generation_tokens_total"],
    }  # fmt: skip


def main() -> None:
    """Serve, soak, check, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--trial", action="store_true", help="keep nothing")
    asked = parser.parse_args()
    from tests.server.process import serving

    with serving("--max-waiting", "32", model=asked.model) as served:
        host, port = served.url.removeprefix("http://").split(":")
        files = len(list(Path(f"/proc/{served.child.pid}/fd").iterdir()))
        ready_mb = rss_bytes(served.child.pid) / 1e6
        found = asyncio.run(soak(host, int(port), served.child.pid, asked.clients, 60 * asked.minutes))
        is_alive = served.child.poll() is None
    figures = {
        "clients": asked.clients,
        "minutes": asked.minutes,
        "rss_ready_mb": ready_mb,
        "files_ready": files,
        **found,
    }
    _harness.record("server-soak", _harness.rounded(figures, 1), keep=not asked.trial)
    assert is_alive, "the server has died"
    statuses = {int(name.split()[1]) for name in found["answers"]}
    assert statuses <= {0, 200, *_PROMISED}, statuses
    assert not any(found["left"].values()), "requests are still open"
    assert found["files"] <= files + 2, "connections were not given back"
    # After the first fifth of the time every shape has been seen: from there on memory must not grow.
    assert found["rss_most_mb"] <= 1.05 * found["rss_first_mb"], "memory grows"


if __name__ == "__main__":
    main()
