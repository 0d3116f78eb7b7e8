"""Content of /metrics, under vLLM's names with our prefix. Engine and expert counts are read at each scrape."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foreroute.batching.requests import EngineState
from foreroute.engine.pool import ExpertPool
from foreroute.server.backend import Backend

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST_S = (0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 240, 480, 960, 1920)


class ServerMetrics:
    """Counts and times of requests, in a separate registry.

    Args:
        backend: whose engine and experts are read at each scrape.
        clock: in seconds.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._registry = registry = CollectorRegistry()
        self.first_token_s = Histogram(
            "foreroute_time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=_FIRST_S,
            registry=registry,
        )  # fmt: skip
        self.between_s = Histogram(
            "foreroute_inter_token_latency_seconds", "From one token of a request to its next.", buckets=_TOKEN_S,
            registry=registry,
        )  # fmt: skip
        self.per_token_s = Histogram(
            "foreroute_time_per_output_token_seconds", "Of a request: (last - first token) / (tokens - 1).",
            buckets=_TOKEN_S, registry=registry,
        )  # fmt: skip
        self.request_s = Histogram(
            "foreroute_e2e_request_latency_seconds", "From a request's arrival to its end.", buckets=_REQUEST_S,
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("foreroute_prompt_tokens", "Prompt tokens of ended requests.", registry=registry)
        self.generation_tokens = Counter("foreroute_generation_tokens", "Tokens generated.", registry=registry)
        self.ended = Counter(
            "foreroute_request_success", "Requests that ended, by reason.", ["finished_reason"], registry=registry
        )
        for reason in ("stop", "length", "abort"):
            self.ended.labels(reason)
        registry.register(_EngineCollector(backend))

    def begin(self) -> "RequestClock":
        """Count an arriving request, and start its clock."""
        return RequestClock(self)

    def expose(self) -> bytes:
        """Format everything in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestClock:
    """Times of one request. Costs about 2 us per token."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._began_s = metrics.clock()
        self._first_s = self._last_s = 0.0
        self._tokens = 0

    def token(self) -> None:
        """Record a token."""
        now = self._metrics.clock()
        if self._tokens == 0:
            self._first_s = now
            self._metrics.first_token_s.observe(now - self._began_s)
        else:
            self._metrics.between_s.observe(now - self._last_s)
        self._last_s = now
        self._tokens += 1
        self._metrics.generation_tokens.inc()

    def finished(self, reason: str, prompt_tokens: int) -> None:
        """Record an end with `reason`, after prompt_tokens."""
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._end(reason if reason in ("stop", "length") else "abort")

    def abandoned(self) -> None:
        """Record that the client has left, or that the request could not be queued."""
        self._end("abort")

    def _end(self, reason: str) -> None:
        self._metrics.request_s.observe(self._metrics.clock() - self._began_s)
        if self._tokens > 1:
            self._metrics.per_token_s.observe((self._last_s - self._first_s) / (self._tokens - 1))
        self._metrics.ended.labels(reason).inc()


class _EngineCollector(Collector):
    """Reads the engine only when scraped."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        loaded = self._backend.loaded
        if loaded is None:
            return
        state = loaded.engine.state()
        yield GaugeMetricFamily("foreroute_num_requests_running", "Requests being computed.", state.running)
        yield GaugeMetricFamily("foreroute_num_requests_waiting", "Requests that wait their turn.", state.waiting)
        share = state.kv_blocks_used / state.kv_blocks if state.kv_blocks else 0.0
        yield GaugeMetricFamily("foreroute_kv_cache_usage_perc", "KV cache in use, 0 to 1.", share)
        aside = "Times that an answer was set aside, for want of room or to let another begin."
        yield CounterMetricFamily("foreroute_answers_set_aside", aside, state.set_aside)
        yield from _prefix_metrics(state)
        yield from _draft_metrics(state)
        if loaded.model is not None:
            yield from expert_metrics(loaded.model.foreroute.host_engine.pool)

    def describe(self) -> list[Metric]:
        """Return nothing: the registry must not read the engine just to learn the names."""
        return []


def _prefix_metrics(state: EngineState) -> Iterator[Metric]:
    """Metrics of beginnings of earlier prompts, which are not computed again."""
    yield GaugeMetricFamily("foreroute_prefix_cache_bytes", "Kept of earlier prompts.", state.prefix_bytes)
    counts = {
        "lookups": ("Prompts that were looked up among earlier ones.", state.prefix_lookups),
        "hits": ("Those of them whose beginning was kept.", state.prefix_hits),
        "saved_tokens": ("Prompt tokens that were not computed again.", state.prefix_tokens),
    }
    for name, (meaning, value) in counts.items():
        yield CounterMetricFamily(f"foreroute_prefix_cache_{name}", meaning, value)


def _draft_metrics(state: EngineState) -> Iterator[Metric]:
    """Metrics of drafted tokens; none where nothing drafts."""
    counts = {
        "draft_tokens": ("Tokens that were drafted.", state.drafted),
        "draft_tokens_accepted": ("Drafted tokens that answers kept.", state.accepted),
        "verify_steps": ("Steps that verified drafted tokens.", state.verify_steps),
    }
    for name, (meaning, value) in counts.items():
        if value is not None:
            yield CounterMetricFamily(f"foreroute_{name}", meaning, value)


def expert_metrics(pool: ExpertPool) -> Iterator[Metric]:
    """Metrics of experts: hits, late hits and misses; outcomes of prefetches; bytes and stalls.

    Reads counts that the engine's thread writes, each atomically; `snapshot` would write, and is for that thread only.
    """
    phases = pool.stats.phases
    residency = pool.residency

    def total(name: str) -> float:
        return sum(getattr(phase, name) for phase in phases)

    counts = {
        "cache_hits": ("Demanded experts that were resident.", total("hits")),
        "cache_late_hits": ("Demanded experts whose prefetch was in flight.", total("late_hits")),
        "cache_misses": ("Demanded experts that were absent.", total("misses")),
        "cache_evictions": ("Experts that were evicted.", residency.evictions),
        "prefetch_issued": ("Prefetches that were queued.", total("prefetch_loads") + total("prefetch_cancelled")),
        "prefetch_used": ("Prefetched experts that were demanded.", residency.prefetch_used),
        "prefetch_late_hits": ("Prefetched experts that were demanded while in flight.", total("late_hits")),
        "prefetch_wasted": ("Prefetched experts that were evicted before any demand.", residency.prefetch_wasted),
        "stall_seconds": ("Time in which compute waited for experts.", total("stall_s")),
    }
    for name, (meaning, value) in counts.items():
        yield CounterMetricFamily(f"foreroute_expert_{name}", meaning, value)
    read = CounterMetricFamily("foreroute_expert_bytes", "Bytes of experts that were read.", labels=["kind"])
    read.add_metric(["demand"], total("demand_bytes"))
    read.add_metric(["prefetch"], total("prefetch_bytes"))
    read.add_metric(["deferred"], total("deferred_bytes"))
    yield read
