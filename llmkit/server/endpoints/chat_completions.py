"""POST /v1/chat/completions: a conversation answered through the model's chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llmkit.outputs import CompletionOutput, RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams
from llmkit.server.endpoints.answers import LogprobWriter, prompt_logprobs, usage, usage_of
from llmkit.server.engine_client import EngineClient, TokenPrompt
from llmkit.server.http.body import JsonRoute
from llmkit.server.http.errors import refuse
from llmkit.server.http.params import blaming, sampling_params, structure, structure_field, unknown_fields
from llmkit.server.http.protocol import ChatRequest
from llmkit.server.http.streaming import DONE, frame, merged, respond
from llmkit.server.message import Message, MessageReader
from llmkit.server.options import ServerOptions
from llmkit.server.reasoning import ThoughtSplitter, find_tags
from llmkit.server.served import Served
from llmkit.server.tools import ToolUse


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """The route of /v1/chat/completions."""
    served, routes = Served(engine, options), APIRouter(route_class=JsonRoute, tags=["generate"])

    @routes.post("/v1/chat/completions", summary="Answer a conversation", response_model=None)
    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        model = served.check(body)
        headers = unknown_fields(body)
        return await respond(request, await prepare(served, model, body), body.stream, options, headers)

    return routes


async def prepare(served: Served, model: str, body: ChatRequest) -> ChatCompletion:
    """Everything that can be refused is refused here, before the engine hears of it."""
    template = served.template_of(body)
    tools = ToolUse.of(template, served.options, body.tools, body.tool_choice, body.parallel_tool_calls)
    prompt = await served.chat_prompt(body, tools.messages(body.messages), tools.for_template)
    prompt = served.fitted(prompt, "messages", body.truncate_prompt_tokens)
    return ChatCompletion(served, model, body, _params(served, body, tools), prompt, tools, template)


def _params(served: Served, body: ChatRequest, tools: ToolUse) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise refuse("top_logprobs needs logprobs to be true", "top_logprobs", "add logprobs: true")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit == 0:
        raise refuse("max_tokens is 0, so there would be no answer", "max_tokens", "ask for at least 1")
    own: dict[str, Any] = {"max_tokens": limit, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if tools.shows_special_tokens and body.skip_special_tokens is None:
        own["skip_special_tokens"] = False  # the parser has to see the marks
    own["structured_outputs"] = tools.grammar(structure(body))
    return sampling_params(served, body, **own)


@dataclass
class ChatCompletion:
    """The answers to one conversation, whole or piece by piece."""

    served: Served
    model: str
    body: ChatRequest
    params: SamplingParams
    prompt: TokenPrompt
    tools: ToolUse
    template: str

    def __post_init__(self) -> None:
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        as_ids = self.body.return_tokens_as_token_ids
        as_ids = self.served.options.return_tokens_as_token_ids if as_ids is None else as_ids
        self.writer = LogprobWriter(self.served.tokenizer, self.body.top_logprobs or 0, as_ids)
        self.role, self.echo = self._role_and_echo()
        self.tags = None if self.params.structured_outputs else find_tags(self.template, self.served.options.reasoning_parser)

    def _role_and_echo(self) -> tuple[str, str]:
        """The answer's role, and with `echo` the text that it continues."""
        last = self.body.messages[-1]
        role = self.served.options.response_role if self.body.add_generation_prompt is not False else last["role"]
        content = last.get("content") if self.body.echo and last["role"] == role else None
        return role, content if isinstance(content, str) else ""

    def reader(self) -> MessageReader:
        """What splits one answer's text into thoughts, content and calls."""
        thoughts = None
        if self.tags is not None:
            thoughts = ThoughtSplitter(self.tags, opened=(self.prompt.text or "").rstrip().endswith(self.tags[0]))
        return MessageReader(thoughts, self.tools.parser(), self.body.include_reasoning is not False)

    @property
    def structure_field(self) -> str | None:
        """The field that asked for a grammar."""
        return "tools" if self.tools.choice in ("required", "named") else structure_field(self.body)

    # ---- whole

    async def whole(self) -> dict[str, Any]:
        """The response body."""
        priority = self.body.priority or 0
        with blaming(self.structure_field):
            output = await self.served.engine.generate(self.prompt, self.params, request_id=self.id, priority=priority)
        whole: dict[str, Any] = {
            "id": self.id, "object": "chat.completion", "created": self.created, "model": self.model,
            "choices": [self._choice(a) for a in output.outputs], "usage": usage_of([output]), "system_fingerprint": None,
        }  # fmt: skip
        return whole | self.about_prompt(output)

    def about_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """What was asked about the prompt."""
        about: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            about["prompt_logprobs"] = prompt_logprobs(output, self.writer.text)
        if self.body.return_token_ids:
            about["prompt_token_ids"] = output.prompt_token_ids
        return about

    def _choice(self, done: CompletionOutput) -> dict[str, Any]:
        reader, message = self.reader(), Message(self.role, self.echo)
        message.take([*reader.push(done.text), *reader.finish()])
        wanted = self.body.logprobs and done.logprobs is not None
        choice: dict[str, Any] = {
            "index": done.index,
            "message": message.body(),
            "logprobs": self.writer.chat(done.token_ids, done.logprobs or []) if wanted else None,
            "finish_reason": finish_reason(done.finish_reason, bool(message.calls)),
            "stop_reason": done.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = done.token_ids
        return choice

    # ---- piece by piece

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events, up to [DONE]."""
        priority = self.body.priority or 0
        chunks = self.served.engine.stream(self.prompt, self.params, request_id=self.id, priority=priority)
        told = _Telling(self)
        with blaming(self.structure_field):
            async with aclosing(merged([chunks])) as pieces:
                async for _, chunk in pieces:
                    if data := told.frames(chunk):
                        yield data
        asked = self.body.stream_options
        if asked and asked.include_usage:
            yield frame({**told.envelope, "choices": [], "usage": told.usage})
        yield DONE


def finish_reason(engine_reason: str | None, called: bool) -> str | None:
    """OpenAI's word: an answer that ended by itself and called tools ended for them."""
    return "tool_calls" if called and engine_reason == "stop" else engine_reason


class _Telling:
    """What a stream has told so far, for each of its n answers."""

    def __init__(self, job: ChatCompletion) -> None:
        self._job = job
        self._readers = [job.reader() for _ in range(job.params.n)]
        self._called = [False] * job.params.n
        self._begun = [False] * job.params.n
        self._written, self._cached = 0, 0
        asked = job.body.stream_options
        self._counts = bool(asked and asked.include_usage)
        self._continuous = bool(self._counts and asked and asked.continuous_usage_stats)
        self.envelope = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model}
        told = job.body.logprobs or job.body.return_token_ids or self._continuous
        self._frames_of_text = None if told or job.tags or job.tools.parser() else [self._around(i) for i in range(job.params.n)]

    @property
    def usage(self) -> dict[str, Any]:
        return usage(len(self._job.prompt.ids), self._written, self._cached)

    def frames(self, chunk: StreamChunk) -> bytes:
        """The events of one chunk, none while its text is held back."""
        job, i = self._job, chunk.index
        self._written += len(chunk.token_ids)
        if self._frames_of_text and self._begun[i] and not chunk.finish_reason:
            before, after = self._frames_of_text[i]
            return before + msgspec.json.encode(chunk.text) + after if chunk.text else b""
        output = chunk.output() if chunk.output and (chunk.finish_reason or not self._begun[i]) else None
        if output:
            self._cached = output.num_cached_tokens
        about = job.about_prompt(output) if output and not any(self._begun) else {}
        choices = [] if self._begun[i] else self._opening(i)
        events = self._readers[i].push(chunk.text)
        if chunk.finish_reason:
            events += self._readers[i].finish()
        deltas = [e.delta() for e in events]
        self._called[i] |= any("tool_calls" in d for d in deltas)
        logprobs = job.writer.chat(chunk.token_ids, chunk.logprobs or []) if job.body.logprobs else None
        if not deltas and (logprobs or job.body.return_token_ids) and not chunk.finish_reason:
            deltas = [{}]  # nothing to show yet, but the tokens are told
        choices += [self._choice(i, d) for d in deltas]
        if chunk.finish_reason:
            choices.append(self._last(i, chunk, output))
        self._attach(choices, logprobs, chunk)
        return b"".join([self._frame(c, about if n == 0 else {}) for n, c in enumerate(choices)])

    def _around(self, i: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in an event of nothing but text, as most are: a microsecond makes one."""
        before, after = self._frame(self._choice(i, {"content": 0}), {}).split(b'"content":0')
        return before + b'"content":', after

    def _opening(self, i: int) -> list[dict[str, Any]]:
        job = self._job
        self._begun[i] = True
        first = self._choice(i, {"role": job.role, "content": ""})
        return [first, self._choice(i, {"content": job.echo})] if job.echo else [first]

    def _choice(self, i: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}

    def _last(self, i: int, chunk: StreamChunk, output: RequestOutput | None) -> dict[str, Any]:
        reason = finish_reason(chunk.finish_reason, self._called[i])
        stops = [a.stop_reason for a in output.outputs if a.index == i] if output else []
        return {**self._choice(i, {}), "finish_reason": reason, "stop_reason": stops[0] if stops else None}

    def _attach(self, choices: list[dict[str, Any]], logprobs: dict[str, Any] | None, chunk: StreamChunk) -> None:
        """The tokens' own facts go with the last event of their chunk."""
        if not choices:
            return
        if logprobs and logprobs["content"]:
            choices[-1]["logprobs"] = logprobs
        if self._job.body.return_token_ids:
            choices[-1]["token_ids"] = chunk.token_ids

    def _frame(self, choice: dict[str, Any], about: dict[str, Any]) -> bytes:
        event: dict[str, Any] = {**self.envelope, "choices": [choice], **about}
        if self._counts:
            event["usage"] = usage(len(self._job.prompt.ids), self._written) if self._continuous else None
        return frame(event)
