"""Between the endpoints and the engine: an EngineClient that times what passes, and an ASGI layer that notes when it came."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.errors import InvalidRequestError, QueueFullError
from llmkit.outputs import RequestMetrics, RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams
from llmkit.server.engine_client import EngineClient, EngineFacts, TokenPrompt
from llmkit.server.metrics.endpoint import Metrics
from llmkit.tokenizer import Tokenizer

_NO_ANSWER = SamplingParams(max_tokens=1)  # what an embedding counts as
_arrived: ContextVar[float | None] = ContextVar("arrived", default=None)  # when the HTTP request came, for who serves it


class Metered:
    """An EngineClient that notes what passes through it on the way to another; all else is that other's."""

    tokenizer: Tokenizer  # found by __getattr__, as everything that is not here
    facts: EngineFacts

    def __init__(self, engine: EngineClient, metrics: Metrics | None = None) -> None:
        self._engine, self.metrics = engine, metrics or Metrics()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def healthy(self) -> bool:
        return self._engine.healthy

    def stats(self) -> dict[str, Any]:
        """See EngineClient."""
        return self._engine.stats()

    async def stream(
        self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncGenerator[StreamChunk, None]:
        """See EngineClient."""
        with self._watch(prompt, params) as watch:
            chunks: Any = self._engine.stream(prompt, params, request_id=request_id, priority=priority)
            async with aclosing(chunks):
                async for chunk in chunks:
                    watch.see(chunk)
                    yield chunk

    async def generate(self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0) -> RequestOutput:
        """See EngineClient."""
        with self._watch(prompt, params) as watch:
            output = await self._engine.generate(prompt, params, request_id=request_id, priority=priority)
            watch.see_whole(output)
            return output

    async def embed(self, prompts: list[TokenPrompt], pooling: str = "last", normalize: bool = True) -> list[list[float]]:
        """See EngineClient."""
        with ExitStack() as watches:
            each = [watches.enter_context(self._watch(prompt, _NO_ANSWER)) for prompt in prompts]
            vectors = await self._engine.embed(prompts, pooling, normalize)
            for watch in each:
                watch.see_vector()
            return vectors

    @contextmanager
    def _watch(self, prompt: TokenPrompt, params: SamplingParams) -> Iterator[Watch]:
        """Note how it ends: complete, aborted by who asked, or broken. A refused request is none."""
        watch = Watch(self.metrics, prompt, params, self._engine.facts.max_model_len)
        try:
            yield watch
        except (InvalidRequestError, QueueFullError):
            raise
        except Exception:
            watch.end("error")
            raise
        except BaseException:  # cancelled, or the reader closed the stream
            watch.end("abort")
            raise
        else:
            watch.end("abort")


class Watch:
    """Times one request from outside, by the clock of who waits for it."""

    def __init__(self, metrics: Metrics, prompt: TokenPrompt, params: SamplingParams, max_model_len: int) -> None:
        self.metrics, self.n = metrics, params.n
        self.begin = _arrived.get() or time.monotonic()
        self.num_prompt = len(prompt.ids)
        self.last: dict[int, float] = {}  # when the newest token of each answer came
        self.first: dict[int, float] = {}
        self.tokens: dict[int, int] = {}
        self.reasons: dict[int, str] = {}
        self.times: RequestMetrics | None = None
        self.num_cached = 0
        self.ended: float | None = None  # when all of it was here; who reads it may take his time
        self.max_tokens = params.max_tokens or max_model_len - self.num_prompt

    def see(self, chunk: StreamChunk) -> None:
        """A piece has come."""
        if chunk.token_ids:
            self._see_tokens(chunk.index, len(chunk.token_ids))
        if chunk.finish_reason is not None:
            self.reasons[chunk.index] = chunk.finish_reason
            if len(self.reasons) == self.n and chunk.output is not None:
                self._see_end(chunk.output())

    def _see_tokens(self, index: int, count: int) -> None:
        now = time.monotonic()
        if not self.tokens:
            self._see_first(now - self.begin)
        if index in self.last:
            self._gap((now - self.last[index]) / count, count)
        else:
            self.first[index], self.tokens[index] = now, 0
        self.last[index] = now
        self.tokens[index] += count
        self.metrics.count("generation_tokens_total", count)

    def _see_first(self, seconds: float) -> None:
        self.metrics.observe("time_to_first_token_seconds", seconds)
        self.metrics.count("prompt_tokens_total", self.num_prompt)

    def _gap(self, seconds: float, count: int) -> None:
        self.metrics.observe("inter_token_latency_seconds", seconds, count)

    def see_whole(self, output: RequestOutput) -> None:
        """A whole answer has come: the engine says when its tokens did."""
        for answer in output.outputs:
            self.tokens[answer.index] = len(answer.token_ids)
            self.reasons[answer.index] = answer.finish_reason or "abort"
            self.metrics.count("generation_tokens_total", len(answer.token_ids))
        self._see_end(output)
        times = self.times
        if times is None or times.first_token_time is None or times.finished_time is None:
            return self.metrics.count("prompt_tokens_total", self.num_prompt)
        self._see_first(times.first_token_time - min(self.begin, times.arrival_time))
        for index, count in self.tokens.items():
            self.first[index], self.last[index] = times.first_token_time, times.finished_time
            if count > 1:
                self._gap((times.finished_time - times.first_token_time) / (count - 1), count - 1)

    def see_vector(self) -> None:
        """An embedding has come: the prompt was read, and nothing is said."""
        self.reasons[0] = "stop"
        self.metrics.count("prompt_tokens_total", self.num_prompt)

    def _see_end(self, output: RequestOutput) -> None:
        self.times, self.num_cached, self.ended = output.metrics, output.num_cached_tokens, time.monotonic()

    def end(self, otherwise: str) -> None:
        """It is over; answers that did not finish ended by `otherwise`."""
        for index in range(self.n):
            self.metrics.ended(self.reasons.get(index, otherwise))
            self.metrics.observe("request_generation_tokens", self.tokens.get(index, 0))
            if index in self.first and self.tokens[index] > 1:
                mean = (self.last[index] - self.first[index]) / (self.tokens[index] - 1)
                self.metrics.observe("request_time_per_output_token_seconds", mean)
        values = {
            "e2e_request_latency_seconds": (self.ended or time.monotonic()) - self.begin,
            "request_prompt_tokens": self.num_prompt,
            "request_max_num_generation_tokens": max(self.tokens.values(), default=0),
            "request_prefill_kv_computed_tokens": self.num_prompt - self.num_cached,
            "request_params_n": self.n,
            "request_params_max_tokens": self.max_tokens,
        }
        for name, value in values.items():
            self.metrics.observe(name, value)
        self._observe_phases()

    def _observe_phases(self) -> None:
        """Queue, prefill and decode, by the engine's clock."""
        times = self.times
        if times is None or times.scheduled_time is None:
            return
        self.metrics.observe("request_queue_time_seconds", times.scheduled_time - times.arrival_time)
        if times.finished_time is not None:
            self.metrics.observe("request_inference_time_seconds", times.finished_time - times.scheduled_time)
        if times.first_token_time is not None and times.finished_time is not None:
            self.metrics.observe("request_prefill_time_seconds", times.first_token_time - times.scheduled_time)
            self.metrics.observe("request_decode_time_seconds", times.finished_time - times.first_token_time)


class CountRequests:
    """ASGI: tells `HttpMetrics` of each request, and `Metered` when it came."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics, self._knows = app, metrics, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if not self._knows:
            self._metrics.http.know(scope["app"].routes)  # those that no router brought
            self._knows = True
        begin, status = time.monotonic(), 500
        token = _arrived.set(begin)

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            _arrived.reset(token)
            path = getattr(scope.get("route"), "path", "none")
            self._metrics.http.saw(path, scope["method"], status, time.monotonic() - begin)
