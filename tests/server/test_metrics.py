"""/metrics: text that Prometheus reads, vLLM's names, and figures that agree with what the client measured."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from llmkit import LLM, SamplingParams
from llmkit.errors import EngineUnavailableError, InvalidRequestError
from llmkit.server.app import create_app
from llmkit.server.engine_client import TokenPrompt
from llmkit.server.in_process import InProcessEngine
from llmkit.server.metrics.endpoint import Metrics, exposition
from llmkit.server.metrics.metered import CountRequests, Metered
from llmkit.server.metrics.prometheus import Shared
from llmkit.server.options import ServerOptions

OPTIONS = ServerOptions(served_model_names=('ti"ny\\\n',))
LABELS = {"model_name": 'ti"ny\\\n', "engine": "0"}
PROMPT = TokenPrompt(list(range(100, 140)), None)
LONG = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
# names, less their vllm:, that vLLM's two Grafana boards (examples/online_serving/dashboards) ask for
BOARDS = [
    "e2e_request_latency_seconds_bucket", "e2e_request_latency_seconds_count", "e2e_request_latency_seconds_sum",
    "generation_tokens_total", "inter_token_latency_seconds_bucket", "kv_cache_usage_perc", "num_requests_running",
    "num_requests_waiting", "prompt_tokens_total", "request_decode_time_seconds_sum", "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_sum", "request_prefill_time_seconds_sum", "request_prompt_tokens_bucket",
    "request_queue_time_seconds_sum", "request_success_total", "time_per_output_token_seconds_bucket",
    "time_to_first_token_seconds_bucket", "request_params_n_bucket", "request_params_max_tokens_bucket",
    "iteration_tokens_total_bucket", "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
    "cache_config_info", "request_time_per_output_token_seconds_bucket", "request_inference_time_seconds_sum",
]


@pytest.fixture
def llm(dummy_folder: Path) -> Iterator[LLM]:
    with LLM(dummy_folder, load_format="dummy", dtype="float32", max_model_len=256) as llm:
        yield llm


@pytest.fixture
def engine(llm: LLM) -> Metered:
    return Metered(InProcessEngine(llm))


def text_of(engine: Any) -> str:
    return "\n".join([*exposition(engine, OPTIONS), ""])


@dataclass
class Scrape:
    """What Prometheus would keep."""

    text: str

    def __post_init__(self) -> None:
        self.families = {f.name: f for f in text_string_to_metric_families(self.text)}
        self.samples = [s for f in self.families.values() for s in f.samples]

    def value(self, name: str, **labels: str) -> float:
        (found,) = (s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())
        return found

    def mean(self, name: str) -> float:
        return self.value(f"{name}_sum") / self.value(f"{name}_count")


def scrape(engine: Any) -> Scrape:
    return Scrape(text_of(engine))


async def read(engine: Metered, params: SamplingParams = LONG, prompt: TokenPrompt = PROMPT) -> list[float]:
    """When the tokens of a stream came, the beginning first."""
    times = [time.monotonic()]
    async for chunk in engine.stream(prompt, params, request_id="r"):
        times += [time.monotonic()] * len(chunk.token_ids)
    return times


def check_rules(text: str) -> None:
    """What promtool checks: every family is declared once, before its samples, and its samples stand together; counters end in
    _total; buckets rise to +Inf and agree with the count; names and labels are legal. (vLLM's colons and its histogram
    `iteration_tokens_total` are what its boards ask for.)"""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    seen: list[str] = []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            kinds[name] = kind
            seen.append(name)
        elif line.startswith("# HELP "):
            assert re.fullmatch(r"# HELP [a-z0-9_:]+ \S.*\.", line)
        else:
            name = re.match(r"[a-zA-Z_:][a-zA-Z0-9_:]*", line)[0]  # type: ignore[index]
            family = seen[-1]
            suffixes = ("_bucket", "_count", "_sum") if kinds[family] == "histogram" else ("",)
            assert name in [family + s for s in suffixes], f"{name} stands under {family}"
            assert (kinds[family] == "counter") <= name.endswith("_total")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert len({line.rpartition(" ")[0] for line in samples}) == len(samples)


def check_histograms(found: Scrape) -> None:
    for family in found.families.values():
        if family.type != "histogram":
            continue
        groups: dict[tuple, list] = {}
        for s in family.samples:
            groups.setdefault(tuple(sorted((k, v) for k, v in s.labels.items() if k != "le")), []).append(s)
        for group in groups.values():
            buckets = [(float(s.labels["le"]), s.value) for s in group if s.name.endswith("_bucket")]
            assert buckets == sorted(buckets)
            assert buckets[-1][0] == math.inf
            assert [c for _, c in buckets] == sorted(c for _, c in buckets)
            assert buckets[-1][1] == next(s.value for s in group if s.name.endswith("_count"))


def test_valid_text_with_every_name_of_vllms_boards(engine):
    asyncio.run(read(engine))
    text = text_of(engine)
    check_rules(text)
    found = Scrape(text)
    check_histograms(found)
    names = {s.name for s in found.samples}
    assert [n for n in BOARDS if f"vllm:{n}" not in names] == []
    assert all(s.labels.items() >= LABELS.items() for s in found.samples if s.name.startswith("vllm:"))
    edges = [s.labels["le"] for s in found.samples if s.name == "vllm:iteration_tokens_total_bucket"]
    assert edges == ["1.0", *(f"{2**i}.0" for i in range(3, 15)), "+Inf"]
    edges = [float(s.labels["le"]) for s in found.samples if s.name == "vllm:request_prompt_tokens_bucket"]
    assert edges == [1, 2, 5, 10, 20, 50, 100, 200, math.inf]  # 1, 2, 5 ... up to the context's 256, as vLLM


def test_figures_agree_with_the_client(engine):
    """Streams side by side: TTFT, ITL, TPOT and latency within a tenth; tokens, requests and cache exactly."""

    async def load() -> list[list[float]]:
        return await asyncio.gather(*(read(engine, LONG, TokenPrompt([i, *PROMPT.ids])) for i in range(5)))

    asyncio.run(read(engine))  # warms up; the numbers below are differences
    before, begin = scrape(engine), time.monotonic()
    streams = asyncio.run(load())
    elapsed, after = time.monotonic() - begin, scrape(engine)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    def mean(name: str) -> float:
        return grown(f"{name}_sum") / grown(f"{name}_count")

    ttft = sum(t[1] - t[0] for t in streams) / 5
    itl = sum(t[-1] - t[1] for t in streams) / (5 * 29)
    assert mean("vllm:time_to_first_token_seconds") == pytest.approx(ttft, rel=0.1, abs=1e-3)
    assert mean("vllm:inter_token_latency_seconds") == pytest.approx(itl, rel=0.1, abs=1e-4)
    assert mean("vllm:request_time_per_output_token_seconds") == pytest.approx(itl, rel=0.1, abs=1e-4)
    assert mean("vllm:e2e_request_latency_seconds") == pytest.approx(sum(t[-1] - t[0] for t in streams) / 5, rel=0.1, abs=1e-3)
    phases = [mean(f"vllm:request_{p}_time_seconds") for p in ("queue", "prefill", "decode")]
    assert sum(phases) == pytest.approx(mean("vllm:e2e_request_latency_seconds"), rel=0.1, abs=2e-3)
    assert 0 <= phases[0] < elapsed
    assert phases[1] + phases[2] == pytest.approx(mean("vllm:request_inference_time_seconds"))
    assert grown("vllm:inter_token_latency_seconds_count") == 5 * 29
    assert grown("vllm:prompt_tokens_total") == 5 * 41
    assert grown("vllm:generation_tokens_total") == 5 * 30
    assert grown("vllm:request_success_total", finished_reason="length") == 5
    assert after.value("vllm:num_requests_running") == after.value("vllm:num_requests_waiting") == 0
    assert after.value("vllm:kv_cache_usage_perc") == 0
    assert grown("vllm:iteration_tokens_total_sum") == pytest.approx(5 * 41 + 5 * 29, abs=0)


def test_whole_answers_are_timed_by_the_engine(engine, llm):
    async def ask() -> tuple[Any, float]:
        begin = time.monotonic()
        output = await engine.generate(PROMPT, LONG.clone(n=2), request_id="r")
        return output, time.monotonic() - begin

    (output, elapsed), found = asyncio.run(ask()), scrape(engine)
    assert found.value("vllm:time_to_first_token_seconds_sum") == pytest.approx(output.metrics.ttft, rel=0.1, abs=1e-3)
    assert found.value("vllm:e2e_request_latency_seconds_sum") == pytest.approx(elapsed, rel=0.1, abs=1e-3)
    assert found.value("vllm:inter_token_latency_seconds_count") == 2 * 29
    assert found.value("vllm:prompt_tokens_total") == 40
    assert found.value("vllm:generation_tokens_total") == 60
    assert found.value("vllm:request_success_total", finished_reason="length") == 2
    assert found.mean("vllm:request_params_n") == 2
    assert found.mean("vllm:request_params_max_tokens") == 30


def test_cache_hits_and_usage_while_it_runs(engine, llm):
    async def twice() -> float:
        await read(engine)
        stream = engine.stream(PROMPT, LONG.clone(max_tokens=200), request_id="r")
        await anext(stream)
        held = scrape(engine).value("vllm:kv_cache_usage_perc")
        running = scrape(engine).value("vllm:num_requests_running")
        await stream.aclose()
        assert running == 1
        return held

    held, found, total = asyncio.run(twice()), scrape(engine), llm.stats()["kv_blocks_total"]
    assert 0 < held < 1
    assert held * total == pytest.approx(round(held * total))
    assert found.value("vllm:prefix_cache_queries_total") == 80
    assert found.value("vllm:prefix_cache_hits_total") == found.value("vllm:request_prompt_tokens_sum") - found.value(
        "vllm:request_prefill_kv_computed_tokens_sum") + 32  # the aborted one told nobody what it found  # fmt: skip
    assert found.value("vllm:request_success_total", finished_reason="abort") == 1


class Broken:
    """An engine that says no in one way."""

    healthy, facts = True, type("Facts", (), {"model": "m", "max_model_len": 99})

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def stream(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        raise self.error
        yield

    async def embed(self, *_: Any, **__: Any) -> Any:
        raise self.error

    def stats(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("error", "counted"), [(EngineUnavailableError("gone"), 1), (InvalidRequestError("no"), 0)])
def test_broken_requests_count_and_refused_ones_do_not(error, counted):
    engine = Metered(Broken(error))  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        asyncio.run(read(engine))
    with pytest.raises(type(error)):
        asyncio.run(engine.embed([PROMPT]))
    found = scrape(engine)
    assert found.value("vllm:request_success_total", finished_reason="error") == 2 * counted
    assert found.value("vllm:e2e_request_latency_seconds_count") == 2 * counted
    assert "vllm:num_requests_running" not in found.families


def test_several_fronts_add_up():
    """Each answers for all, those that are gone too; one that comes in another's place goes on from its numbers."""
    with Shared.create(3) as file:
        fronts = [Metrics(Shared(file.fileno(), i, 3)) for i in range(2)]
        for i, front in enumerate(fronts):
            front.observe("time_to_first_token_seconds", 0.3 + i)
            front.count("prompt_tokens_total", 10)
            front.ended("stop")
        pid = os.fork()
        if pid == 0:
            Metrics(Shared(file.fileno(), 2, 3)).count("prompt_tokens_total", 7)
            os._exit(0)
        os.waitpid(pid, 0)
        fronts[1] = Metrics(Shared(file.fileno(), 1, 3))
    fronts[1].count("prompt_tokens_total", 1)
    for front in fronts:
        found = Scrape("\n".join([*front.lines(LABELS), ""]))
        assert found.value("vllm:prompt_tokens_total") == 28
        assert found.value("vllm:time_to_first_token_seconds_sum") == pytest.approx(1.6)
        assert found.value("vllm:time_to_first_token_seconds_bucket", le="0.5") == 1
        assert found.value("vllm:request_success_total", finished_reason="stop") == 2


def test_http_requests_by_route_and_status(engine):
    app = create_app(engine, OPTIONS)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"prompt": PROMPT.ids, "max_tokens": 2}
            for _ in range(2):
                assert (await client.post("/v1/completions", json=body)).status_code == 200
            await client.post("/v1/completions", json={})
            await client.get("/v1/nowhere")
            await client.get("/openapi.json")
            return await client.get("/metrics")

    response = asyncio.run(ask())
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    check_rules(response.text)
    found = Scrape(response.text)
    counts = {(s.labels["handler"], s.labels["status"]): s.value for s in found.samples if s.name == "http_requests_total"}
    assert counts == {("/v1/completions", "2xx"): 2, ("/v1/completions", "4xx"): 1, ("none", "4xx"): 1, ("none", "2xx"): 1}
    assert found.value("http_request_duration_seconds_count", handler="/v1/completions") == 3


def test_the_time_to_the_first_token_begins_when_the_request_came(engine):
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)  # what an endpoint does before it asks the engine
        await read(engine)

    app = CountRequests(serve, engine.metrics)
    scope = {"type": "http", "method": "GET", "app": FastAPI()}
    asyncio.run(app(scope, None, None))  # type: ignore[arg-type]
    asyncio.run(read(engine))
    assert 0.2 < scrape(engine).value("vllm:time_to_first_token_seconds_sum") < 0.4


def test_embeddings_count_as_requests(engine):
    asyncio.run(engine.embed([PROMPT, PROMPT]))
    found = scrape(engine)
    assert found.value("vllm:request_success_total", finished_reason="stop") == 2
    assert found.value("vllm:prompt_tokens_total") == 80


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_the_caches_dtype_is_told(dummy_folder: Path, kept: str) -> None:
    with LLM(dummy_folder, load_format="dummy", dtype="float32", max_model_len=256, kv_cache_dtype=kept) as llm:
        lines = [x for x in exposition(InProcessEngine(llm), ServerOptions()) if x.startswith("vllm:cache_config_info{")]
    assert len(lines) == 1
    assert f'cache_dtype="{kept}"' in lines[0]
