"""Many clients at once, some of which leave or hardly read: nothing but promised errors, and everything given back.

    python -m benchmarks.server_soak models/foreroute-tiny [--seconds 300] [--clients 64]

Each client asks again and again: completions, and as agents do in all three APIs: tools behind a beginning that some of
them share, forced calls, answers by a JSON schema. Streamed or whole, short or long, a fifth of the time leaving in the
middle, a tenth of the time reading slowly: long after its answer is made, though buffers hold so short a one (who reads
nothing of a longer one: tests/server/test_connections.py). Any other answer than 200, 429 or 503 fails, and so does a
hang, or that hardly any are 200.

Memory: the most that the server's process has in RAM during the soak (VmHWM, reset when it begins) may not exceed by
more than 5 % what the server itself said when it was ready, before any request: the total of its plan (the `memory` of
`foreroute serve --json`: dense weights, experts, KV cache, earlier prompts, and its working memory as measured then).
The context is kept short, so that the plan holds little that is never used and a leak could hide in; in runs of two
minutes or more, memory may also not grow by more than 5 % after the first one. The process that renders chat templates
is not counted.

Given back: when all clients are gone, requests open, tokens of the KV cache in use, slots pinned or borrowed, asyncio's
tasks, threads and open files must be what they were when the server had answered its first requests. Threads of
asyncio's pool, of which there are a fixed number, are left out: they come when they are first needed.

--plant puts in a fault that must be seen: `memory` keeps 1 MiB of each request, `request` leaves one that never ends.
The last line is JSON; the exit code is 1 where something failed.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import _harness
from tests.server.dialogue.templates import HERMES

_PROMISED = (429, 503)
_LEAVE, _SLOW = 0.2, 0.1
_WITHIN_S, _REST_WITHIN_S = 120.0, 20.0
_OVER_PLAN = 1.05
_MANNERS = ("reads", "slow", "leaves")
# Answers that each manner must have had, or nothing was tried.
_LEAST_SERVED = 3
# By then every kind of request has been seen; memory may not grow any more, where there is as much time again.
_FIRST_S = 60.0
_FLAGS = ("--max-waiting", "32", "--ctx-size", "512")

# Runs in the server's process: upon SIGUSR1 it says what it holds. The handler runs in the thread of asyncio's loop.
_INSIDE = """
import asyncio, json, os, signal, threading
from foreroute.batching.engine import BatchEngine
from foreroute.residency.states import PINNED

engines, build = [], BatchEngine.__init__

def noting(self, *args, **kwargs):
    build(self, *args, **kwargs)
    engines.append(self)

BatchEngine.__init__ = noting

def tell(number, frame):
    (engine,) = engines
    residency, state = engine._model.foreroute.engine.pool.residency, engine.state()
    keys = engine._model.foreroute.table.num_keys
    held = {
        "requests": state.running + state.waiting,
        "kv_tokens": state.kv_blocks_used,
        "slots_pinned": sum(residency.state(key) == PINNED for key in range(keys)),
        "slots_borrowed": len(residency._borrowed),
        "tasks": len(asyncio.all_tasks()),
        "threads": sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
    }
    with open(PATH + ".part", "w") as file:
        json.dump({"held": held, "kept_bytes": engine._kept.nbytes if engine._kept else 0}, file)
    os.replace(PATH + ".part", PATH)

signal.signal(signal.SIGUSR1, tell)
"""
_PLANTED = {
    "memory": """
leaked, submit = [], BatchEngine.submit

def leaking(self, *args):
    leaked.append(bytearray(b"x" * 2**20))
    return submit(self, *args)

BatchEngine.submit = leaking
""",
    "request": """
from foreroute.batching.requests import Finished, Request
calls, submit = [], BatchEngine.submit

def again(self):
    submit(self, Request([5] * 8, 256, ignore_eos=True), lambda event: isinstance(event, Finished) and again(self))

def forgetting(self, *args):
    calls.append(0)
    if len(calls) == 20:
        again(self)
    return submit(self, *args)

BatchEngine.submit = forgetting
""",
}


_SCHEMA = {
    "type": "object", "properties": {"at": {"type": "integer"}, "is_new": {"type": "boolean"}},
    "required": ["at", "is_new"], "additionalProperties": False,
}  # fmt: skip
# What ends a stream that was not broken off.
_ENDS = {
    "/v1/completions": b"data: [DONE]", "/v1/chat/completions": b"data: [DONE]", "/v1/messages": b"event: message_stop",
    "/v1/responses": b"event: response.",
}  # fmt: skip


def asked_for(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and what is asked there."""
    most, is_stream = draw.choice((4, 16, 48)), draw.random() < 0.6
    common = {"stream": is_stream, "temperature": draw.choice((0, 1)), "model": "foreroute-tiny"}
    kind = draw.random()
    if kind < 0.4:
        text = "import " * draw.choice((1, 10, 100))
        return "/v1/completions", {**common, "prompt": text, "max_tokens": most, "n": draw.choice((1, 1, 2))}
    system = f"You are agent {draw.randrange(3)}. " + "Call a tool, or answer. " * 8
    messages = [{"role": "user", "content": "import " * draw.choice((1, 10, 40))}]
    is_forced, name = draw.random() < 0.3, "look_up"
    if kind < 0.5:
        form = {"type": "json_schema", "json_schema": {"name": "found", "schema": _SCHEMA}}
        messages.insert(0, {"role": "system", "content": system})
        return "/v1/chat/completions", {**common, "messages": messages, "max_tokens": most, "response_format": form}
    if kind < 0.7:
        tool = {"type": "function", "function": {"name": name, "parameters": _SCHEMA}}
        messages.insert(0, {"role": "system", "content": system})
        return "/v1/chat/completions", {
            **common, "messages": messages, "max_tokens": most, "tools": [tool],
            "tool_choice": "required" if is_forced else "auto",
        }  # fmt: skip
    if kind < 0.85:
        return "/v1/responses", {
            **common, "instructions": system, "input": messages, "max_output_tokens": max(most, 16), "store": False,
            "tools": [{"type": "function", "name": name, "parameters": _SCHEMA}],
            "tool_choice": "required" if is_forced else "auto",
        }  # fmt: skip
    return "/v1/messages", {
        **common, "system": system, "messages": messages, "max_tokens": most,
        "tools": [{"name": name, "input_schema": _SCHEMA}], "tool_choice": {"type": "any" if is_forced else "auto"},
    }  # fmt: skip


def agent_model(model: Path, folder: Path) -> Path:
    """`model` in `folder`, by links, with a chat template that knows tools."""
    made = folder / model.name
    made.mkdir()
    for file in model.iterdir():
        (made / file.name).symlink_to(file.resolve())
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (made / "tokenizer_config.json").unlink()
    (made / "chat_template.jinja").unlink(missing_ok=True)
    text = json.dumps({**settings, "chat_template": HERMES})
    (made / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return made


async def client(draw: random.Random, host: str, port: int, until_s: float, seen: Counter[str]) -> None:
    """Ask until time is up; count what came."""
    while time.monotonic() < until_s:
        kind = draw.random()
        manner = "leaves" if kind < _LEAVE else "slow" if kind < _LEAVE + _SLOW else "reads"
        path, asked = asked_for(draw)
        status = await asyncio.wait_for(_ask(draw, host, port, path, asked, manner), _WITHIN_S)
        seen[f"{manner} {status}"] += 1
        seen[f"{path} {status}"] += 1
        if status in _PROMISED:
            await asyncio.sleep(draw.uniform(0.2, 1.0))


async def _ask(draw: random.Random, host: str, port: int, path: str, asked: dict[str, Any], manner: str) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        body = json.dumps(asked).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
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
            assert not asked["stream"] or _ENDS[path] in got[-4000:], got[-500:]
        return status
    finally:
        writer.close()


async def scraped(host: str, port: int) -> dict[str, float]:
    """The server's metrics."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode().split("\r\n\r\n", 1)[1]
    writer.close()
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("foreroute_"))
    return {name: float(value) for name, value in rows}


async def soak(host: str, port: int, process_id: int, clients: int, seconds: float) -> dict[str, Any]:
    """Let the clients at it; returns what was seen meanwhile."""
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + seconds
    tasks = [asyncio.create_task(client(random.Random(at), host, port, until_s, seen)) for at in range(clients)]
    memory, waiting, running, usage = [], 0.0, 0.0, 0.0
    while time.monotonic() < until_s:
        await asyncio.sleep(min(1.0, seconds / 10))
        memory.append(in_ram(process_id))
        metrics = await scraped(host, port)
        waiting = max(waiting, metrics["foreroute_num_requests_waiting"])
        running = max(running, metrics["foreroute_num_requests_running"])
        usage = max(usage, metrics["foreroute_kv_cache_usage_perc"])
    await asyncio.gather(*tasks)
    metrics = await scraped(host, port)
    return {
        "answers": dict(seen), "requests": sum(seen.values()) // 2, "most_running": running, "most_waiting": waiting,
        "most_kv_usage": usage, "tokens": metrics["foreroute_generation_tokens_total"],
        "grown": grown(memory, seconds), "rss_bytes": memory,
    }  # fmt: skip


def grown(memory: list[int], seconds: float) -> float | None:
    """What the last minute has in RAM over what the first had; None where there was no time for both.

    Medians: what requests use comes and goes, and what they leave behind stays.
    """
    num = int(_FIRST_S)
    if seconds < 2 * _FIRST_S or len(memory) < num:
        return None
    return statistics.median(memory[-num:]) / statistics.median(memory[:num])


def in_ram(process_id: int, field: str = "VmRSS") -> int:
    """Bytes of a process in RAM: now, or VmHWM: the most since it was reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process_id}/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def inside(process_id: int, signalled: Any, path: Path) -> dict[str, Any]:
    """What the server's process says that it holds."""
    path.unlink(missing_ok=True)
    signalled(signal.SIGUSR1)
    until_s = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < until_s, f"process {process_id} does not say what it holds"
        time.sleep(0.01)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


async def first_answers(host: str, port: int) -> None:
    """Every kind of request once, and several at a time, so that what is made once is there."""
    draw = random.Random(0)
    done: set[tuple[str, bool, bool]] = set()
    for _ in range(200):
        path, asked = asked_for(draw)
        kind = (path, asked["stream"], "tools" in asked)
        if kind not in done:
            assert {await _ask(draw, host, port, path, asked, "reads") for _ in range(2)} == {200}, (path, asked)
        done.add(kind)
    assert len(done) == 10, done


def faults(found: dict[str, Any]) -> list[str]:
    """What is not as it should be; none is what is wanted."""
    wrong = []
    statuses = {int(name.split()[1]) for name in found["answers"]}
    wrong += [f"nothing was served at {path}" for path in _ENDS if not found["answers"].get(f"{path} 200")]
    if not statuses <= {0, 200, *_PROMISED}:
        wrong.append(f"answers were {sorted(statuses)}")
    for manner in _MANNERS:
        served = found["answers"].get(f"{manner} 200", 0)
        if served < _LEAST_SERVED:
            wrong.append(f"{served} of the clients' requests of the manner '{manner}' were served")
    if found["rss_peak_bytes"] > _OVER_PLAN * found["plan_bytes"]:
        wrong.append(f"the peak is {found['rss_peak_bytes'] / found['plan_bytes']:.1%} of the plan")
    if found["grown"] is not None and found["grown"] > _OVER_PLAN:
        wrong.append(f"memory grew to {found['grown']:.1%} of what the first minute had")
    for name, before in found["held_first"].items():
        if found["held_last"][name] > before:
            wrong.append(f"{name}: {before} before, {found['held_last'][name]} after")
    return wrong


def main() -> int:
    """Serve, soak, check, record; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--plant", choices=sorted(_PLANTED), help="a fault that must be seen")
    parser.add_argument("--trial", action="store_true", help="keep nothing")
    asked = parser.parse_args()
    from tests.server.process import serving

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "held.json"
        before = f"PATH = {str(path)!r}\n{_INSIDE}{_PLANTED.get(asked.plant, '')}"
        with serving(*_FLAGS, model=agent_model(asked.model, Path(folder)), before=before) as served:
            host, port = served.url.removeprefix("http://").split(":")
            child = served.child
            plan = served.started["memory"]
            ready = in_ram(child.pid)
            asyncio.run(first_answers(host, int(port)))
            first = _at_rest(child, path)
            idle = in_ram(child.pid)
            Path(f"/proc/{child.pid}/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
            seen = asyncio.run(soak(host, int(port), child.pid, asked.clients, asked.seconds))
            if child.poll() is not None:
                print("the server has died", file=sys.stderr)
                return 1
            last = _at_rest(child, path, first["held"])
            found = {
                "clients": asked.clients, "seconds": asked.seconds, "planted": asked.plant, **seen,
                "plan": plan, "plan_bytes": plan["total_bytes"], "rss_ready_bytes": ready, "rss_idle_bytes": idle,
                "rss_peak_bytes": in_ram(child.pid, "VmHWM"), "rss_end_bytes": in_ram(child.pid),
                "kept_prompt_bytes": last["kept_bytes"], "held_first": first["held"], "held_last": last["held"],
            }  # fmt: skip
    found["faults"] = faults(found)
    for name in ("rss_ready", "rss_idle", "rss_peak", "rss_end", "plan"):
        print(f"{name:<10} {found[f'{name}_bytes'] / 1e6:8.1f} MB")
    print(f"peak       {found['rss_peak_bytes'] / found['plan_bytes']:8.1%} of the plan")
    for fault in found["faults"]:
        print(f"FAULT      {fault}")
    raw = {"rss_bytes": found.pop("rss_bytes")}
    _harness.record("server-soak", _harness.rounded(found, 3), raw, keep=not asked.trial and asked.plant is None)
    return 1 if found["faults"] else 0


def _at_rest(child: Any, path: Path, wanted: dict[str, int] | None = None) -> dict[str, Any]:
    """What the server holds when nothing is asked of it, or as little as `wanted`; the last word after some time."""
    until_s = time.monotonic() + _REST_WITHIN_S
    while True:
        time.sleep(0.5)
        found = inside(child.pid, child.send_signal, path)
        held = found["held"]
        is_quiet = held["requests"] == held["kv_tokens"] == 0
        if wanted is not None:
            is_quiet = all(held[name] <= wanted[name] for name in wanted)
        if is_quiet or time.monotonic() > until_s:
            return found


if __name__ == "__main__":
    sys.exit(main())
