"""Sending a load by plan: at random times however slow the server is (open), or always so many at once (closed).

A request's clock starts when the plan says, not when the client got to it: a server that stalls makes those wait that would have
come meanwhile, and they count (https://en.wikipedia.org/wiki/Coordinated_omission). Nothing is parsed while the load runs.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llmkit.client.connection import Piece
from llmkit.client.openai import OpenAIClient, Reply, timed_events
from llmkit.errors import ServerError


@dataclass(frozen=True)
class Load:
    """rate: requests a second, at random times (inf: all at once); or concurrency: so many at once. One of the two."""

    rate: float | None = None
    concurrency: int | None = None

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} at once"
        return "all at once" if math.isinf(self.rate) else f"{self.rate:g} a second"

    def times(self, count: int, seed: object) -> list[float]:
        """When an open load sends, in seconds from its beginning: a Poisson process."""
        r, when, times = random.Random(f"{seed}/times"), 0.0, list[float]()
        for _ in range(count):
            when += 0.0 if self.rate is None or math.isinf(self.rate) else r.expovariate(self.rate)
            times.append(when)
        return times


@dataclass
class Sent:
    """One request: when it was due and when it went, in seconds from the beginning, and what came back."""

    due: float
    sent: float
    status: int = 0
    pieces: list[Piece] = field(default_factory=list)
    done: float = 0.0
    trouble: str = ""


@dataclass
class Outcome:
    """One request in figures; times in seconds from the beginning of the load. error: why there is no whole answer, or "".
    gaps: between pieces of the answer. late: how much later than due the client sent it."""

    due: float
    late: float
    first: float
    last: float
    input_tokens: int
    output_tokens: int
    gaps: list[float]
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.due

    @property
    def e2e(self) -> float:
        return self.last - self.due

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token, which has no time between tokens."""
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass
class Run:
    """A load that is over. seconds: from its beginning to the last answer. cpu: seconds of processor that the client used."""

    load: Load
    seconds: float
    cpu: float
    outcomes: list[Outcome]


async def run_load(client: OpenAIClient, load: Load, path: str, bodies: Sequence[bytes], seed: object) -> Run:
    """Send all `bodies` to `path`, and wait for every answer."""
    requests = [client.request("POST", path, body, stream=True) for body in bodies]
    cpu, begin = time.process_time(), time.perf_counter()
    send = _open if load.concurrency is None else _closed
    sent = await send(client, load, requests, begin, seed)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return Run(load, seconds, cpu, [_outcome(s, begin) for s in sent])


async def _open(client: OpenAIClient, load: Load, requests: list[bytes], begin: float, seed: object) -> list[Sent]:
    tasks: list[asyncio.Task[Sent]] = []
    async with asyncio.TaskGroup() as group:
        for due, request in zip(load.times(len(requests), seed), requests):
            if (wait := begin + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(_send(client, request, due, begin)))
    return [task.result() for task in tasks]


async def _closed(client: OpenAIClient, load: Load, requests: list[bytes], begin: float, seed: object) -> list[Sent]:
    """A request is due when the one before it has ended: that is what a closed load means."""
    todo, sent = iter(requests), list[Sent]()

    async def work(todo: Iterator[bytes]) -> None:
        for request in todo:
            sent.append(await _send(client, request, time.perf_counter() - begin, begin))

    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency or 1):
            group.create_task(work(todo))
    return sent


async def _send(client: OpenAIClient, request: bytes, due: float, begin: float) -> Sent:
    result = Sent(due, time.perf_counter() - begin)
    try:
        async with client.exchange(request) as exchange:
            result.status = exchange.response.status
            try:
                await exchange.whole()
            finally:
                result.pieces = list(exchange.pieces)
    except ServerError as e:
        result.trouble = e.message
    result.done = time.perf_counter() - begin
    return result


def _outcome(sent: Sent, begin: float) -> Outcome:
    """Read what came back, now that nothing waits for it."""
    times, usage, trouble = list[float](), dict[str, int](), sent.trouble
    if sent.status not in (0, 200):
        trouble = f"{sent.status}: " + Reply(sent.status, {}, b"".join(data for _, data in sent.pieces)).message
    elif sent.status == 200:
        for when, event in timed_events(sent.pieces):
            trouble = trouble or _trouble(event)
            usage = event.get("usage") or usage
            if any(map(_says_something, event.get("choices") or ())):
                times.append(when - begin)
    if not times:
        trouble = trouble or "an answer without a token"
    gaps = [b - a for a, b in itertools.pairwise(times)]
    first, last = (times[0], times[-1]) if times else (sent.done, sent.done)
    tokens = usage.get("completion_tokens") or len(times)
    return Outcome(sent.due, sent.sent - sent.due, first, last, usage.get("prompt_tokens") or 0, tokens, gaps, trouble)


def _trouble(event: dict[str, object]) -> str:
    error = event.get("error")
    return str(error.get("message", error)) if isinstance(error, dict) else str(error or "")


def _says_something(choice: dict[str, object]) -> bool:
    delta = choice.get("delta")
    said = delta if isinstance(delta, dict) else choice
    return any(said.get(name) for name in ("text", "content", "reasoning_content", "reasoning", "tool_calls"))
