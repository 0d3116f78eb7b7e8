"""The live feed and what it is fed by: right about each token, nothing before the first viewer or after the last."""

import asyncio
import base64
import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="needs fastapi: pip install foreroute[serve]")

from foreroute.batching.requests import EngineState
from foreroute.generation.generate import generate
from foreroute.residency.slots import FREE, LOADING
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.live import MOST_VIEWERS, LiveFeed
from foreroute.server.watching.metrics import ServerMetrics
from foreroute.server.watching.recorder import DEMAND, PREFETCH, Recorder, digest
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS, TOP_K, make_tokenizer, save_model

PROMPT = torch.arange(10, 30)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("live") / "tiny"
    save_model(made)
    return made


def run(model: Any, new_tokens: int = 12) -> list[int]:
    report = generate(model, make_tokenizer(), PROMPT, max_new_tokens=new_tokens, do_sample=False)
    return list(report.token_ids)


def read(event: bytes) -> tuple[str, Any]:
    kind, data = event.decode().strip().split("\n")
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def feed_of(model: Any, **options: Any) -> LiveFeed:
    return LiveFeed(model.foreroute.engine, model.foreroute.plan, "tiny", **options)


def test_a_record_adds_up_to_what_the_engine_counted(load: Callable[..., Any], folder: Path) -> None:
    model = load(folder, "25%", governor=False)
    pool = model.foreroute.engine.pool
    expected = run(model, 40)
    recorder, before = Recorder(pool), model.foreroute.stats().decode
    steps: list[Any] = []
    pool.add_observer(recorder)
    end = recorder.end_layer

    def noted() -> None:
        end()
        if recorder.last is not None and (not steps or steps[-1] is not recorder.last):
            steps.append(recorder.last)

    recorder.end_layer = noted
    assert run(model, 40) == expected, "who is watched does the same"
    after = model.foreroute.stats().decode
    decoded = [step for step in steps if step.phase == "decode"]
    assert len(decoded) == 39
    assert recorder.timed_steps == 38

    digests = [digest(step, pool.residency.state) for step in decoded]

    def total(*kinds: str) -> int:
        return sum(len(getattr(layer, kind)) for told in digests for layer in told.layers for kind in kinds)

    def reads(why: int) -> int:
        return sum(1 for told in digests for _, one, _, _ in told.reads if one == why)

    assert all(len(told.layers) == NUM_LAYERS for told in digests)
    assert total("hits") == after.hits - before.hits
    assert total("late_hits") == after.late_hits - before.late_hits
    assert total("misses") == after.misses - before.misses == reads(DEMAND)
    assert total("hits", "late_hits", "misses") == 39 * NUM_LAYERS * TOP_K
    # What is in flight at either end is at most the readers' business.
    assert abs(reads(PREFETCH) - (after.prefetch_loads - before.prefetch_loads)) <= pool.residency.staging_slots
    in_time = sum(len(keys) for told in digests for keys in told.in_time)
    assert in_time + total("late_hits") == after.prefetch_used - before.prefetch_used > 0
    assert sum(len(told.wasted) for told in digests) == after.prefetch_wasted - before.prefetch_wasted > 0
    for step, told in zip(decoded, digests, strict=True):
        assert step.began_s <= told.layers[0].began_s <= told.layers[-1].ended_s == step.ended_s
        assert all(step.began_s - 1 < began <= ended <= step.ended_s for _, _, began, ended in told.reads)


def test_nothing_is_recorded_before_the_first_viewer_and_after_the_last(load: Callable[..., Any], folder: Path) -> None:
    model = load(folder, "50%")
    pool = model.foreroute.engine.pool
    feed = feed_of(model)

    async def watch() -> None:
        viewers = [feed.events() for _ in range(2)]
        for viewer in viewers:
            assert feed.enter()
            assert read(await anext(viewer))[0] == "hello"
        run(model, 3)
        assert len(pool.observers) == 1
        feed.leave()
        run(model, 3)
        assert len(pool.observers) == 1
        feed.leave()
        run(model, 3)
        assert pool.observers == ()

    assert pool.observers == ()
    run(model, 3)
    asyncio.run(watch())
    assert feed.num_viewers == 0


def test_without_a_viewer_and_a_scrape_nothing_is_called(
    load: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(Recorder, name)

        def called(*arguments: Any) -> Any:
            calls.append(name)
            return method(*arguments)

        return called

    for name in ("begin_step", "begin_layer", "looked_up", "end_layer", "stalled", "guessed", "deferred", "arrived"):
        monkeypatch.setattr(Recorder, name, counted(name))

    class Behind:
        """A backend that says how often it is read."""

        @property
        def loaded(self) -> Any:
            calls.append("scrape")
            state = EngineState(running=1, waiting=0, kv_blocks_used=0, kv_blocks=0)
            return SimpleNamespace(engine=SimpleNamespace(state=lambda: state), model=model)

    model = load(folder, "50%")
    feed, metrics = feed_of(model), ServerMetrics(Behind())
    run(model, 5)
    assert calls == []
    assert b"foreroute_expert_cache_hits_total" in metrics.expose()
    assert calls == ["scrape"]
    calls.clear()
    assert feed.enter()
    run(model, 5)
    assert calls.count("begin_step") == 5
    assert calls.count("begin_layer") == calls.count("end_layer") == 5 * NUM_LAYERS
    feed.leave()
    calls.clear()
    run(model, 5)
    assert calls == []


def test_the_picture_is_of_the_pool_and_the_last_token(load: Callable[..., Any], folder: Path) -> None:
    model = load(folder, "50%")
    feed, residency = feed_of(model), model.foreroute.engine.pool.residency

    async def watch() -> tuple[Any, Any]:
        assert feed.enter()
        viewer = feed.events()
        hello = read(await anext(viewer))[1]
        run(model)
        picture = read(await anext(viewer))[1]
        await viewer.aclose()
        return hello, picture

    hello, picture = asyncio.run(watch())
    assert hello["experts_per_layer"] == [NUM_EXPERTS] * NUM_LAYERS
    packed = base64.b64decode(picture["pool"])
    codes = [packed[key >> 2] >> (key & 3) * 2 & 3 for key in range(NUM_LAYERS * NUM_EXPERTS)]
    for key, code in enumerate(codes):
        state = residency.state(key)
        assert code == 0 if state == FREE else code == 1 if state == LOADING else code in (2, 3)
    step = picture["step"]
    assert (step["phase"], [layer["layer"] for layer in step["layers"]]) == ("decode", list(range(NUM_LAYERS)))
    for layer in step["layers"]:
        asked = [expert for kind in ("hits", "in_time", "late_hits", "misses") for expert in layer[kind]]
        assert len(set(asked)) == TOP_K
        assert all(0 <= expert < NUM_EXPERTS for expert in asked)
        assert 0 <= layer["t"] <= layer["end"] <= step["end"]
    assert picture["counts"]["decode"]["tokens"] == 11


def test_a_trace_is_written_on_while_the_page_is_watched(load: Callable[..., Any], folder: Path, tmp_path) -> None:
    model = load(folder, "50%", trace=str(tmp_path / "t.jsonl"))
    pool = model.foreroute.engine.pool
    recorder = Recorder(pool)
    run(model, 4)
    pool.add_observer(recorder)
    run(model, 4)
    pool.remove_observer(recorder)
    run(model, 4)
    model.foreroute.close()
    kinds = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    layers = [event for event in kinds if event["event"] == "layer" and "ids" in event]
    assert len(layers) == 3 * 3 * NUM_LAYERS
    assert all(len(event["hits"] + event["late_hits"] + event["misses"]) == TOP_K for event in layers)
    assert kinds[-1]["event"] == "end"


@pytest.mark.parametrize("where", ["routed", "waited"])
def test_who_comes_in_the_middle_of_a_layer_takes_nothing_from_a_trace(
    load: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model = load(folder, "25%", trace=str(tmp_path / "t.jsonl"))
    engine, pool = model.foreroute.engine, model.foreroute.engine.pool
    recorder, stalled = Recorder(pool), pool.stalled_since
    num_come = 0

    def come(*_: Any) -> None:
        nonlocal num_come
        num_come += 1
        # There in every second step: it comes and goes in the middle of a layer.
        (pool.remove_observer if recorder in pool.observers else pool.add_observer)(recorder)

    def come_and_stall(started_s: float) -> None:
        come()
        stalled(started_s)

    if where == "routed":
        engine.routing_listener = come
    else:
        monkeypatch.setattr(pool, "stalled_since", come_and_stall)
    run(model, 12)
    model.foreroute.close()
    events = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    layers = [event for event in events if event["event"] == "layer" and "ids" in event]
    assert num_come >= 6
    assert len(layers) == 11 * NUM_LAYERS
    for event in layers:
        assert sorted(event["hits"] + event["late_hits"] + event["misses"]) == sorted(event["ids"][0])
    assert recorder.last is not None
    assert len(recorder.last.layers) == NUM_LAYERS, "it sees whole steps"


def test_a_picture_of_the_last_layer_is_not_taken_for_the_finished_step(load: Callable[..., Any], folder: Path) -> None:
    model, now = load(folder, "50%"), 0.0
    feed = feed_of(model, clock=lambda: now)
    seen: list[Any] = []

    def look(layer: int, *_: Any) -> None:
        nonlocal now
        if layer == NUM_LAYERS - 1:
            # So long that the step is shown while it goes.
            now += 0.3
            seen.append(read(feed._picture())[1])

    assert feed.enter()
    model.foreroute.engine.routing_listener = look
    run(model, 2)
    while_it_goes, after = seen[-1], read(feed._picture())[1]
    assert while_it_goes["is_busy"]
    assert after["is_busy"]
    assert while_it_goes["step"]["number"] == after["step"]["number"]
    assert [while_it_goes["step"]["end"], after["step"]["end"]] == [None, 300.0]
    assert [len(picture["step"]["layers"]) for picture in (while_it_goes, after)] == [NUM_LAYERS - 1, NUM_LAYERS]


def test_it_is_busy_while_a_long_step_goes_and_not_after_one_that_broke_off(
    load: Callable[..., Any], folder: Path, serve: Callable[..., Any]
) -> None:
    from foreroute.batching.engine import BatchEngine
    from foreroute.batching.requests import Request
    from foreroute.server.backend import Backend, Serving
    from foreroute.server.watching.pages import _feed_of

    model = load(folder, "50%")
    engine = BatchEngine(model, make_tokenizer(), 128)
    serving = Serving(engine, serve().backend.serving().prompts, 128, model=model)
    feed = _feed_of(Backend(serving), ServerSettings())
    # A step that goes now has gone for a minute.
    feed._clock = lambda: time.perf_counter() + 60
    is_there, may_go, events = threading.Event(), threading.Event(), queue.Queue[Any]()

    def hold(*_: Any) -> None:
        is_there.set()
        assert may_go.wait(60)
        raise OSError("the disk is gone")

    try:
        assert feed.enter()
        assert not read(feed._picture())[1]["is_busy"]
        model.foreroute.engine.routing_listener = hold
        engine.submit(Request(range(10, 30), 4), events.put)
        assert is_there.wait(60)
        assert read(feed._picture())[1]["is_busy"]
        may_go.set()
        assert events.get(timeout=60).reason == "error"
        picture = read(feed._picture())[1]
        assert "step" not in picture or picture["step"]["end"] is None, "it never ends"
        assert not picture["is_busy"]
    finally:
        may_go.set()
        engine.close()


def test_the_page_is_static_safe_and_can_be_left_out(serve: Callable[..., Any]) -> None:
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from foreroute.server.watching.pages import add_page

    served = serve()
    app = FastAPI()
    add_page(app, served.backend, ServerSettings())
    client = TestClient(app)
    front = client.get("/")
    policy = front.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "<script>" not in front.text
    assert " style=" not in front.text
    assert "://" not in front.text
    for name in ("main.js", "style.css", "icon.svg"):
        assert client.get(f"/page/{name}").headers["content-security-policy"] == policy
    off = FastAPI()
    add_page(off, served.backend, ServerSettings(allow_pages=False))
    assert [TestClient(off).get(path).status_code for path in ("/", "/page/main.js", "/live")] == [404] * 3


def live_client(feed: LiveFeed, send_s: float = 60.0) -> Any:
    """What speaks to a server that has the page and its feed alone."""
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from foreroute.server.api.problems import ApiError
    from foreroute.server.watching.pages import page_routes

    async def refused(request: Any, error: Any) -> Any:
        return error.response("")

    return TestClient(Starlette(routes=page_routes(lambda: feed, send_s), exception_handlers={ApiError: refused}))


def test_viewers_are_limited_before_their_streams_begin_and_end_with_the_server(
    load: Callable[..., Any], folder: Path
) -> None:
    is_over = False
    feed = feed_of(load(folder, "50%"), is_over=lambda: is_over)
    client = live_client(feed)
    assert client.head("/live").status_code == 200, "who asks for the head alone takes no place"
    assert [feed.enter() for _ in range(MOST_VIEWERS + 1)] == [True] * MOST_VIEWERS + [False]
    refused = client.get("/live")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    feed.leave()
    is_over = True
    seen = client.get("/live")
    assert (seen.status_code, seen.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert seen.text.startswith("event: hello\ndata: {")
    assert feed.num_viewers == MOST_VIEWERS - 1, "its place is free again"


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200), (None, 200)]
)
def test_pages_of_other_sites_do_not_watch(
    load: Callable[..., Any], folder: Path, site: str | None, status: int
) -> None:
    feed = feed_of(load(folder, "50%"), is_over=lambda: True)
    answer = live_client(feed).get("/live", headers={} if site is None else {"Sec-Fetch-Site": site})
    assert answer.status_code == status
    assert feed.num_viewers == 0


@pytest.mark.parametrize("how", ["stalls", "leaves", "breaks"])
def test_who_does_not_read_or_leaves_gives_the_place_back(load: Callable[..., Any], folder: Path, how: str) -> None:
    feed = feed_of(load(folder, "50%"))
    client = live_client(feed, send_s=0.05)
    num_sent = 0

    async def receive() -> Any:
        while how != "leaves" or num_sent < 2:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal num_sent
        num_sent += 1
        assert feed.num_viewers == 1
        if num_sent == 2 and how == "breaks":
            raise OSError("the connection is gone")
        if num_sent == 2 and how == "stalls":
            await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/live", "headers": [], "query_string": b""}
    asyncio.run(asyncio.wait_for(client.app(scope, receive, send), 20))
    assert num_sent >= 2
    assert feed.num_viewers == 0
