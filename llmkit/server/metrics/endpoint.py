"""GET /metrics: what Prometheus scrapes, under vLLM's names, so that vLLM's Grafana boards show an llmkit server too.

`metered` times what passes between the endpoints and the engine; the engine's own counts (queue, cache, preemptions) are read
when somebody scrapes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Response

from llmkit.server.engine_client import EngineClient
from llmkit.server.metrics.prometheus import MEDIA_TYPE, Histogram, Shared, Store, head, histogram_lines, sample
from llmkit.server.options import ServerOptions

REASONS = ("stop", "length", "abort", "error")
STATUSES = ("1xx", "2xx", "3xx", "4xx", "5xx")
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_HTTP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_COUNTS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5) if m * 10**e <= 1_000_000)
HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "vllm:time_to_first_token_seconds": ("From a request's arrival to its first token.", _TTFT),
    "vllm:inter_token_latency_seconds": ("From one token of a request to its next.", _TOKEN),
    "vllm:request_time_per_output_token_seconds": ("Mean time from one token to the next, one value a request.", _TOKEN),
    "vllm:e2e_request_latency_seconds": ("From a request's arrival to its end.", _REQUEST),
    "vllm:request_queue_time_seconds": ("Time a request waited for its first step.", _REQUEST),
    "vllm:request_inference_time_seconds": ("From a request's first step to its end.", _REQUEST),
    "vllm:request_prefill_time_seconds": ("From a request's first step to its first token.", _REQUEST),
    "vllm:request_decode_time_seconds": ("From a request's first token to its end.", _REQUEST),
    "vllm:request_prompt_tokens": ("Tokens of a request's prompt.", _COUNTS),
    "vllm:request_generation_tokens": ("Tokens of an answer.", _COUNTS),
    "vllm:request_max_num_generation_tokens": ("Tokens of the longest of a request's answers.", _COUNTS),
    "vllm:request_params_n": ("Answers that a request asked for.", (1, 2, 5, 10, 20)),
    "vllm:request_params_max_tokens": ("Tokens that a request allowed.", _COUNTS),
    "vllm:request_prefill_kv_computed_tokens": ("Tokens of a prompt that were not in the prefix cache.", _COUNTS),
}
OLDER_NAMES = {"vllm:time_per_output_token_seconds": "vllm:inter_token_latency_seconds"}  # which boards still ask for
COUNTERS = {
    "vllm:prompt_tokens_total": "Tokens of prompts, cached ones too.",
    "vllm:generation_tokens_total": "Tokens that were generated.",
}
# name -> (type, what it is, its value from the engine's stats)
ENGINE: dict[str, tuple[str, str, Any]] = {
    "vllm:num_requests_running": ("gauge", "Requests that take part in steps.", lambda s: s["running"]),
    "vllm:num_requests_waiting": ("gauge", "Requests that wait for their first step.", lambda s: s["waiting"]),
    "vllm:kv_cache_usage_perc": ("gauge", "Share of the KV cache that requests hold; 1 is all.", lambda s: _usage(s)),
    "vllm:gpu_cache_usage_perc": ("gauge", "The older name of kv_cache_usage_perc.", lambda s: _usage(s)),
    "vllm:prefix_cache_queries_total": ("counter", "Tokens looked up in the prefix cache.", lambda s: s["prefix_cache_queries"]),
    "vllm:prefix_cache_hits_total": ("counter", "Tokens found in the prefix cache.", lambda s: s["prefix_cache_hits"]),
    "vllm:num_preemptions_total": ("counter", "Requests that lost their blocks and began again.", lambda s: s["preemptions"]),
}


class Metrics:
    """Everything that one front has seen; with `shared`, told together with what the others have."""

    def __init__(self, shared: Shared | None = None) -> None:
        self.store = Store(shared)
        self.histograms = {name: Histogram(buckets, self.store) for name, (_, buckets) in HISTOGRAMS.items()}
        self._counters, self._at = self.store.take(len(COUNTERS))
        self._place = {name: i for i, name in enumerate(COUNTERS)}
        self._ended, self._ended_at = self.store.take(len(REASONS))
        self.http = HttpMetrics(self.store)

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """name: without vllm:."""
        self.histograms["vllm:" + name].observe(value, times)

    def count(self, name: str, value: float) -> None:
        """name: without vllm:."""
        self._counters[self._place["vllm:" + name]] += value

    def ended(self, reason: str) -> None:
        self._ended[REASONS.index(reason if reason in REASONS else "error")] += 1

    def lines(self, labels: Mapping[str, str], max_model_len: float = math.inf) -> Iterator[str]:
        """max_model_len: no count of tokens is larger, so no bucket need be."""
        sums = self.store.sums()
        for (name, help), value in zip(COUNTERS.items(), sums[self._at]):
            yield from head(name, "counter", help)
            yield sample(name, labels, value)
        yield from head("vllm:request_success_total", "counter", "Answers that have ended, by how they ended.")
        for reason, value in zip(REASONS, sums[self._ended_at]):
            yield sample("vllm:request_success_total", {**labels, "finished_reason": reason}, value)
        for name, histogram in self.histograms.items():
            yield from head(name, "histogram", HISTOGRAMS[name][0])
            most = max_model_len if histogram.buckets is _COUNTS else math.inf
            yield from histogram.lines(name, labels, sums, most)
        for name, newer in OLDER_NAMES.items():
            yield from head(name, "histogram", f"The older name of {newer}.")
            yield from self.histograms[newer].lines(name, labels, sums)
        yield from self.http.lines(sums)


class HttpMetrics:
    """Requests by route, method and status class, and how long they took. Routes nobody told of are counted together."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._routes: dict[tuple[str, str], tuple[memoryview[float], slice, Histogram]] = {}

    def know(self, routes: Sequence[Any]) -> None:
        """Reserve the places of these routes, in their order, which is the same in every front."""
        for route in routes:
            for method in sorted(getattr(route, "methods", None) or ()):
                self._places(getattr(route, "path", "none"), method)
        self._places("none", "GET")

    def _places(self, path: str, method: str) -> tuple[memoryview[float], slice, Histogram]:
        key = (path, method)
        if key not in self._routes:
            self._routes[key] = (*self._store.take(len(STATUSES)), Histogram(_HTTP, self._store))
        return self._routes[key]

    def saw(self, path: str, method: str, status: int, seconds: float) -> None:
        """A response has ended."""
        counts, _, times = self._routes.get((path, method)) or self._places("none", "GET")
        counts[min(max(status // 100, 1), 5) - 1] += 1
        times.observe(seconds)

    def lines(self, sums: Sequence[float]) -> Iterator[str]:
        used = {key: v for key, v in self._routes.items() if any(sums[v[1]])}
        yield from head("http_requests_total", "counter", "HTTP requests, by route, method and status.")
        for (path, method), (_, where, _) in used.items():
            for status, value in zip(STATUSES, sums[where]):
                if value:
                    yield sample("http_requests_total", {"handler": path, "method": method, "status": status}, value)
        yield from head("http_request_duration_seconds", "histogram", "From an HTTP request to the end of its response.")
        for (path, method), (_, _, times) in used.items():
            yield from times.lines("http_request_duration_seconds", {"handler": path, "method": method}, sums)


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """The route of metrics; unless `engine` is a `Metered` one, only the engine's own counts are there."""
    routes = APIRouter()

    @routes.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response("\n".join([*exposition(engine, options), ""]), media_type=MEDIA_TYPE)

    return routes


def exposition(engine: EngineClient, options: ServerOptions) -> Iterator[str]:
    """All lines. While there is no engine, those that it would answer for are missing."""
    stats, name = engine.stats() if engine.healthy else {}, _model_name(engine, options)
    if name is not None:
        labels = {"model_name": name, "engine": "0"}
        yield from _engine_lines(stats, labels, engine.facts.kv_cache_dtype) if stats else ()
        yield from _end_lines(engine, labels)
        own: Metrics | None = getattr(engine, "metrics", None)
        yield from own.lines(labels, engine.facts.max_model_len if engine.healthy else math.inf) if own is not None else ()
        if own is not None and own.store.shared is None:  # with several, each scrape would meet another
            yield from _process_lines()


def _model_name(engine: EngineClient, options: ServerOptions) -> str | None:
    """None before anybody knows it."""
    if options.served_model_names:
        return options.served_model_names[0]
    return engine.facts.model if engine.healthy else None


def _engine_lines(stats: Mapping[str, Any], labels: Mapping[str, str], kv_cache_dtype: str) -> Iterator[str]:
    for name, (kind, help, value) in ENGINE.items():
        yield from head(name, kind, help)
        yield sample(name, labels, value(stats))
    yield from head("vllm:iteration_tokens_total", "histogram", "Tokens computed in a step.")
    yield from histogram_lines("vllm:iteration_tokens_total", labels, _STEP, _by_step(stats), stats["step_tokens"])
    yield from head("vllm:cache_config_info", "gauge", "How the KV cache is laid out.")
    cache = {"block_size": str(stats["kv_block_size"]), "num_gpu_blocks": str(stats["kv_blocks_total"])}
    yield sample("vllm:cache_config_info", {**labels, **cache, "cache_dtype": kv_cache_dtype}, 1)


def _end_lines(engine: EngineClient, labels: Mapping[str, str]) -> Iterator[str]:
    """Every front was told the same, so these are not summed over them."""
    ends: Mapping[str, int] = getattr(engine, "info", {}).get("ends", {})
    if ends:
        yield from head("llmkit:engine_replaced_total", "counter", "Engine processes that died or hung, and have a successor.")
    for reason, count in ends.items():
        yield sample("llmkit:engine_replaced_total", {**labels, "reason": reason}, count)


def _by_step(stats: Mapping[str, Any]) -> list[int]:
    """steps_by_size[i] counts steps of at most 2^i tokens and more than half of that -> vLLM's buckets, powers of two as well."""
    counts = [0] * (len(_STEP) + 1)
    for i, steps in enumerate(stats["steps_by_size"]):
        counts[bisect_left(_STEP, 2**i)] += steps
    return counts


def _usage(stats: Mapping[str, Any]) -> float:
    return 1 - stats["kv_blocks_free"] / max(1, stats["kv_blocks_total"])


def _process_lines() -> Iterator[str]:
    import psutil

    process = psutil.Process()
    cpu = process.cpu_times()
    for name, kind, help, value in (
        ("process_cpu_seconds_total", "counter", "Processor time of this front.", cpu.user + cpu.system),
        ("process_resident_memory_bytes", "gauge", "Memory of this front.", process.memory_info().rss),
        ("process_start_time_seconds", "gauge", "When this front started.", process.create_time()),
    ):
        yield from head(name, kind, help)
        yield sample(name, {}, value)
