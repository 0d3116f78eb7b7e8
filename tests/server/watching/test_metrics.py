"""What /metrics says: of requests by a clock that the test moves, of experts by what a model really routed."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foreroute.batching.requests import EngineState
from foreroute.cli.commands import demo
from foreroute.server.backend import Backend, Serving
from foreroute.server.watching.metrics import ServerMetrics, expert_metrics
from tests.server.conftest import Served

Serve = Callable[..., Served]


def values(text: str) -> dict[str, float]:
    """Samples by name and labels."""
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def test_requests(serve: Serve) -> None:
    served = serve(answer="abc")
    served.chat()
    served.chat(n=2, max_tokens=2, stream=True)
    found = values(served.client.get("/metrics").text)
    assert found['foreroute_request_success_total{finished_reason="stop"}'] == 1
    assert found['foreroute_request_success_total{finished_reason="length"}'] == 2
    assert found['foreroute_request_success_total{finished_reason="abort"}'] == 0
    assert found["foreroute_prompt_tokens_total"] == 12
    assert found["foreroute_generation_tokens_total"] == 7
    assert found["foreroute_time_to_first_token_seconds_count"] == 3
    assert found["foreroute_inter_token_latency_seconds_count"] == 4
    assert found["foreroute_time_per_output_token_seconds_count"] == 3
    assert found["foreroute_e2e_request_latency_seconds_count"] == 3
    assert found["foreroute_num_requests_running"] == 0
    assert found["foreroute_num_requests_waiting"] == 0
    assert found["foreroute_kv_cache_usage_perc"] == 0


def test_beginnings_of_earlier_prompts(serve: Serve) -> None:
    engine = serve().engine
    state = replace(engine.state(), prefix_bytes=5000, prefix_lookups=4, prefix_hits=3, prefix_tokens=900)
    engine.state = lambda: state
    found = values(ServerMetrics(Backend(Serving(engine, None, 64))).expose().decode())
    names = ("bytes", "lookups_total", "hits_total", "saved_tokens_total")
    assert [found[f"foreroute_prefix_cache_{name}"] for name in names] == [5000, 4, 3, 900]


def test_times(serve: Serve) -> None:
    now = [0.0]
    backend = Backend(Serving(serve().engine, None, 64))
    metrics = ServerMetrics(backend, clock=lambda: now[0])
    clock = metrics.begin()
    for at in (2.0, 2.5, 4.0):
        now[0] = at
        clock.token()
    now[0] = 5.0
    clock.finished("stop", 10)
    left = metrics.begin()
    left.abandoned()
    found = values(metrics.expose().decode())
    assert found["foreroute_time_to_first_token_seconds_sum"] == 2.0
    assert found["foreroute_inter_token_latency_seconds_sum"] == 2.0
    assert found["foreroute_time_per_output_token_seconds_sum"] == 1.0
    assert found["foreroute_e2e_request_latency_seconds_sum"] == 5.0
    assert found['foreroute_request_success_total{finished_reason="abort"}'] == 1


def test_the_engine_is_read_at_each_scrape_only(serve: Serve) -> None:
    served = serve()
    asked: list[int] = []
    real = served.engine.state
    served.engine.state = lambda: asked.append(1) or real()
    served.chat()
    assert asked == []
    served.client.get("/metrics")
    assert asked == [1]


def test_a_demand_is_a_hit_or_a_late_hit_or_a_miss(load: Any) -> None:
    """hits + late hits + misses are the distinct experts that were routed; bytes are those that were read."""
    import torch

    model = load(demo.find_model(), "30%", dtype="float32", predictor="no")
    routed: list[int] = []
    for layer in model.foreroute.layers:
        forward = layer.experts.engine_forward

        def counting(hidden: Any, ids: Any, weights: Any, forward: Any = forward) -> Any:
            routed.append(ids.unique().numel())
            return forward(hidden, ids, weights)

        layer.experts.engine_forward = counting
    model.generate(torch.tensor([[9, 8, 7, 6]]), max_new_tokens=24, do_sample=False)
    metrics = {
        sample.name + str(sample.labels or ""): sample.value
        for metric in expert_metrics(model.foreroute.engine.pool)
        for sample in metric.samples
    }
    total = {re.sub("^foreroute_expert_|_total", "", name): value for name, value in metrics.items()}
    assert total["cache_hits"] > 0
    assert total["cache_misses"] > 0
    assert total["cache_hits"] + total["cache_late_hits"] + total["cache_misses"] == sum(routed)
    assert total["cache_evictions"] > 0
    assert total["prefetch_issued"] >= total["prefetch_used"] > 0
    stats = model.foreroute.stats()
    assert total["prefetch_used"] == stats.prefetch_used
    assert total["bytes{'kind': 'demand'}"] + total["bytes{'kind': 'prefetch'}"] == pytest.approx(
        (stats.prefill.demand_bytes + stats.decode.demand_bytes)
        + (stats.prefill.prefetch_bytes + stats.decode.prefetch_bytes)
    )
    assert total["stall_seconds"] > 0


def test_the_dashboard_asks_for_existing_metrics(serve: Serve, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(demo.find_model(), "30%", predictor="no")
    served = serve()
    assert served.backend.loaded is not None
    served.backend.loaded.model = model
    served.chat()
    state = EngineState(0, 0, 0, 1, drafted=6, accepted=4, verify_steps=2, set_aside=3)
    monkeypatch.setattr(served.engine, "state", lambda: state)
    assert "foreroute_answers_set_aside_total 3.0" in served.client.get("/metrics").text
    there = {re.split(r"[{ ]", line)[0] for line in served.client.get("/metrics").text.splitlines()}
    dashboard = (Path(__file__).parents[3] / "docs" / "grafana.json").read_text()
    asked = set(re.findall(r"foreroute_\w+", dashboard))
    assert len(asked) > 15
    assert asked <= there
    assert len(json.loads(dashboard)["panels"]) == 14
