"""POST /v1/completions: a prompt, or many, continued as they are."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llmkit.outputs import CompletionOutput, RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams
from llmkit.server.endpoints.answers import LogprobWriter, prompt_logprobs, usage, usage_of
from llmkit.server.engine_client import EngineClient, TokenPrompt
from llmkit.server.http.body import JsonRoute
from llmkit.server.http.errors import refuse
from llmkit.server.http.params import blaming, sampling_params, structure_field, unknown_fields
from llmkit.server.http.protocol import CompletionRequest
from llmkit.server.http.streaming import DONE, frame, merged, respond, together
from llmkit.server.options import ServerOptions
from llmkit.server.served import Served

MAX_ANSWERS = 2048


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """The route of /v1/completions."""
    served, routes = Served(engine, options), APIRouter(route_class=JsonRoute, tags=["generate"])

    @routes.post("/v1/completions", summary="Continue a prompt", response_model=None)
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        model = served.check(body)
        headers = unknown_fields(body)
        return await respond(request, await prepare(served, model, body), body.stream, options, headers)

    return routes


async def prepare(served: Served, model: str, body: CompletionRequest) -> Completions:
    """Everything that can be refused is refused here, before the engine hears of it."""
    params = _params(served, body)
    prompts = [served.fitted(p, "prompt", body.truncate_prompt_tokens) for p in await _prompts(served, body)]
    return Completions(served, model, body, params, prompts)


def _params(served: Served, body: CompletionRequest) -> SamplingParams:
    nothing = body.max_tokens == 0
    if nothing and not body.echo:
        raise refuse("max_tokens is 0, so there would be no answer", "max_tokens", "ask for at least 1, or for echo")
    own: dict[str, Any] = {"logprobs": body.logprobs, "max_tokens": 1 if nothing else body.max_tokens}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        own["prompt_logprobs"] = body.logprobs
    return sampling_params(served, body, **own)


async def _prompts(served: Served, body: CompletionRequest) -> list[TokenPrompt]:
    """One prompt or many, as text or token ids."""
    given: Any = body.prompt
    if given is None:
        raise refuse("prompt is missing", "prompt", "give text, token ids, or a list of these")
    many = given if isinstance(given, list) and given and isinstance(given[0], (str, list)) else [given]
    if len(many) * (body.n or 1) > MAX_ANSWERS:
        asked = f"{len(many)} prompts" + (f" of {body.n} answers each" if (body.n or 1) > 1 else "")
        raise refuse(f"{asked} in one request; at most {MAX_ANSWERS} answers", "prompt", "send several requests")
    special = body.add_special_tokens is not False
    return [await _prompt(served, p, special) for p in many]


async def _prompt(served: Served, given: Any, add_special_tokens: bool) -> TokenPrompt:
    if isinstance(given, str):
        return await served.encode(given, add_special_tokens)
    if not isinstance(given, list):
        raise refuse(f"a prompt is text, a list of token ids, or a list of these; got {type(given).__name__}", "prompt")
    return TokenPrompt(served.checked_ids(given, "prompt"))


@dataclass
class Completions:
    """The answers to one request, whole or piece by piece. Choice i * n + j is answer j to prompt i."""

    served: Served
    model: str
    body: CompletionRequest
    params: SamplingParams
    prompts: Sequence[TokenPrompt]

    def __post_init__(self) -> None:
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        as_ids = self.body.return_tokens_as_token_ids
        as_ids = self.served.options.return_tokens_as_token_ids if as_ids is None else as_ids
        self.writer = LogprobWriter(self.served.tokenizer, self.body.logprobs or 0, as_ids)
        self.echoes = [self._text(p) for p in self.prompts] if self.body.echo else [""] * len(self.prompts)
        self.wants_answer = self.body.max_tokens != 0
        self.envelope = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _text(self, prompt: TokenPrompt) -> str:
        return self.served.tokenizer.decode(prompt.ids, False) if prompt.text is None else prompt.text

    def _request_id(self, i: int) -> str:
        return f"{self.id}-{i}"

    # ---- whole

    async def whole(self) -> dict[str, Any]:
        """The response body. One prompt that fails ends the others."""
        engine, rank = self.served.engine, self.body.priority or 0
        works = [
            engine.generate(p, self.params, request_id=self._request_id(i), priority=rank) for i, p in enumerate(self.prompts)
        ]
        with blaming(structure_field(self.body)):
            outputs = await together(works)
        choices = [self._choice(i, o, a) for i, o in enumerate(outputs) for a in o.outputs]
        count = usage_of(outputs)
        if not self.wants_answer:
            count |= {"completion_tokens": 0, "total_tokens": count["prompt_tokens"]}
        return {**self.envelope, "choices": choices, "usage": count, "system_fingerprint": None}

    def _choice(self, i: int, output: RequestOutput, done: CompletionOutput) -> dict[str, Any]:
        text, tokens = (done.text, done.token_ids) if self.wants_answer else ("", [])
        choice: dict[str, Any] = {
            "index": i * self.params.n + done.index,
            "text": self.echoes[i] + text,
            "logprobs": self._logprobs(i, output, tokens, done.logprobs),
            "finish_reason": done.finish_reason if self.wants_answer else "length",
            "stop_reason": done.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output, self.writer.text)
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": tokens}
        return choice

    def _logprobs(self, i: int, output: RequestOutput, tokens: list[int], entries: Any) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        if not self.body.echo:
            return self.writer.completion(tokens, entries or [], 0)
        return self.writer.completion([*output.prompt_token_ids, *tokens], [*(output.prompt_logprobs or []), *(entries or [])], 0)

    # ---- piece by piece

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events, up to [DONE]."""
        engine, rank = self.served.engine, self.body.priority or 0
        streams = [
            engine.stream(p, self.params, request_id=self._request_id(i), priority=rank) for i, p in enumerate(self.prompts)
        ]
        asked = self.body.stream_options
        tally = _Tally(self)
        with blaming(structure_field(self.body)):
            async with aclosing(merged(streams)) as chunks:
                async for i, chunk in chunks:
                    for event in tally.events(i, chunk):
                        yield frame(event)
        if asked and asked.include_usage:
            yield frame({**self.envelope, "choices": [], "usage": tally.usage})
        yield DONE


class _Tally:
    """What a stream has said so far: tokens for the usage, characters for the offsets."""

    def __init__(self, job: Completions) -> None:
        self._job = job
        self._written, self._cached = 0, 0
        self._lengths: dict[int, int] = {}  # choice -> characters so far, its echo included
        self._read = sum(len(p.ids) for p in job.prompts)
        asked = job.body.stream_options
        self._continuous = bool(asked and asked.continuous_usage_stats and asked.include_usage)
        self._null = {"usage": None} if asked and asked.include_usage else {}

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self._read, self._written, self._cached)

    def events(self, i: int, chunk: StreamChunk) -> list[dict[str, Any]]:
        """The event of one chunk of prompt i; none while its text is held back."""
        job, which = self._job, i * self._job.params.n + chunk.index
        text, tokens = (chunk.text, chunk.token_ids) if job.wants_answer else ("", [])
        self._written += len(tokens)
        first = which not in self._lengths
        length = self._lengths.setdefault(which, len(job.echoes[i]))
        self._lengths[which] += len(text)
        choice: dict[str, Any] = {"index": which, "text": text, "logprobs": None, "finish_reason": None}
        if job.body.logprobs is not None:
            choice["logprobs"] = job.writer.completion(tokens, chunk.logprobs or [], length)
        if job.body.return_token_ids:
            choice["token_ids"] = tokens
        if chunk.output and (first or chunk.finish_reason):
            self._add_rare(i, choice, chunk, chunk.output(), first)
        silent = not (choice["text"] or choice["logprobs"] or choice["finish_reason"] or job.body.return_token_ids)
        return [] if silent else [{**job.envelope, "choices": [choice], **self._usage()}]

    def _add_rare(self, i: int, choice: dict[str, Any], chunk: StreamChunk, output: RequestOutput, first: bool) -> None:
        """What only the first and the last event of a choice carry."""
        if first:
            self._open(i, choice, output)
        if chunk.finish_reason:
            self._cached += output.num_cached_tokens if chunk.index == 0 else 0
            choice["finish_reason"] = chunk.finish_reason if self._job.wants_answer else "length"
            choice["stop_reason"] = next(a.stop_reason for a in output.outputs if a.index == chunk.index)

    def _usage(self) -> dict[str, Any]:
        return {"usage": usage(self._read, self._written)} if self._continuous else self._null

    def _open(self, i: int, choice: dict[str, Any], output: RequestOutput) -> None:
        """The echo, and what was asked about the prompt."""
        job = self._job
        if job.body.echo:
            choice["text"] = job.echoes[i] + choice["text"]
            if job.body.logprobs is not None:
                ahead = job.writer.completion(output.prompt_token_ids, output.prompt_logprobs or [], 0)
                choice["logprobs"] = {name: ahead[name] + choice["logprobs"][name] for name in ahead}
        if job.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output, job.writer.text)
        if job.body.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
