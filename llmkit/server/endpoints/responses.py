"""/v1/responses: OpenAI's newer API, over the same chat templates, tools and reasoning as /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from llmkit.outputs import RequestOutput
from llmkit.server.endpoints.chat_completions import ChatCompletion
from llmkit.server.endpoints.response_input import (
    NAMES,
    QUIET,
    SAMPLING,
    ResponseRequest,
    add_items,
    chat_fields,
    input_items,
    with_instructions,
)
from llmkit.server.endpoints.response_store import ResponseStore, Stored
from llmkit.server.endpoints.response_writer import ResponseWriter
from llmkit.server.endpoints.translation import Conversation, new_id, pieces, prepare_chat, whole
from llmkit.server.engine_client import EngineClient
from llmkit.server.http.body import JsonRoute
from llmkit.server.http.errors import HttpError, JsonResponse, as_http_error, log, refuse
from llmkit.server.http.params import unknown_fields
from llmkit.server.http.streaming import EventStream, answer
from llmkit.server.options import ServerOptions
from llmkit.server.served import Served
from llmkit.server.shelf import AnyShelf


def router(engine: EngineClient, options: ServerOptions, shelf: AnyShelf) -> APIRouter:
    """The routes of /v1/responses. shelf: where they are kept."""
    served, store = Served(engine, options), ResponseStore(shelf)
    routes = APIRouter(route_class=JsonRoute, tags=["responses"], prefix="/v1/responses")

    @routes.post("", summary="Answer text, or a list of items", response_model=None)
    async def create(request: Request, body: ResponseRequest) -> Response:
        headers = unknown_fields(body, (*SAMPLING, *QUIET))
        run = await Run.prepare(served, store, body)
        if body.background:
            return JsonResponse(await run.in_background(), headers=headers)
        if body.stream:
            return EventStream(run.stream(), options.keep_alive_interval, options.request_timeout, run.writer.fail, headers)
        await answer(request, run.whole(), options.request_timeout)
        return JsonResponse(run.response, headers=headers)

    @routes.post("/input_tokens", summary="Count what a response would read", response_model=None)
    async def count(body: ResponseRequest) -> Response:
        run = await Run.prepare(served, store, body)
        return JsonResponse({"object": "response.input_tokens", "input_tokens": len(run.job.prompt.ids)})

    @routes.get("/{response_id}", summary="A stored response", response_model=None)
    async def retrieve(response_id: str) -> Response:
        return JsonResponse((await store.get(response_id, "response_id")).response)

    @routes.delete("/{response_id}", summary="Forget a stored response", response_model=None)
    async def delete(response_id: str) -> Response:
        await store.delete(response_id, "response_id")
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    @routes.post("/{response_id}/cancel", summary="End a response that runs in the background", response_model=None)
    async def cancel(response_id: str) -> Response:
        stored = await store.get(response_id, "response_id")
        if not stored.response["background"]:
            raise refuse("only a response made with background=true can be cancelled", "response_id",
                         "of any other, close the connection")  # fmt: skip
        return JsonResponse((await store.end(response_id, "response_id")).response)

    @routes.get("/{response_id}/input_items", summary="What a stored response read", response_model=None)
    async def list_items(
        response_id: str, limit: Annotated[int, Query(ge=1, le=100)] = 20, order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:  # fmt: skip
        return JsonResponse(_page((await store.get(response_id, "response_id")).items, limit, order, after))

    return routes


@dataclass
class Run:
    """One response on its way. talk: its conversation without instructions, which the next one would not inherit."""

    served: Served
    store: ResponseStore | None
    job: ChatCompletion
    items: list[dict[str, Any]]
    talk: Conversation
    response: dict[str, Any]

    def __post_init__(self) -> None:
        self.writer = ResponseWriter(self.response)
        self.stored = Stored(self.response, self.items, self.talk.messages)

    @classmethod
    async def prepare(cls, served: Served, store: ResponseStore, body: ResponseRequest) -> Run:
        """Everything that can be refused is refused here."""
        model = served.check(body)
        fields, items = chat_fields(body), input_items(body.input)
        talk = Conversation()
        if body.previous_response_id is not None:
            before = _ended(await store.get(body.previous_response_id, "previous_response_id"))
            talk = Conversation([dict(m) for m in before.messages], ["previous_response_id"] * len(before.messages))
        add_items(talk, items)
        if not talk.messages:
            raise refuse("input is empty", "input", "give at least one item")
        job = await _prepare_fitting(served, model, talk, fields, body)
        return cls(served, None if body.store is False else store, job, items, talk, _blank(body, model, job))

    # ---- three ways to get it

    async def whole(self) -> None:
        """Fill the response, and keep it."""
        await self._fill()
        await self._keep()

    async def _fill(self) -> None:
        events, output = await whole(self.job)
        done, job = output.outputs[0], self.job
        logprobs = job.writer.chat(done.token_ids, done.logprobs or [])["content"] if job.body.logprobs else []
        self.writer.take(events, logprobs)
        self._finish(output)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The events. None before the engine's first word, so that its refusal is a status still."""
        job, opening = self.job, self.writer.begin()
        async for events, chunk in pieces(job):
            logprobs = job.writer.chat(chunk.token_ids, chunk.logprobs or [])["content"] if job.body.logprobs else []
            if data := opening + self.writer.take(events, logprobs):
                yield data
            opening = b""
            if chunk.finish_reason and chunk.output is not None:
                last = self._finish(chunk.output())
                await self._keep()
                yield last

    async def in_background(self) -> dict[str, Any]:
        """Begin, and say so."""
        begun = self.response | {"output": []}
        task = asyncio.create_task(self._run_in_background())
        await self._keep(task.cancel)
        return begun

    async def _run_in_background(self) -> None:
        try:
            async with asyncio.timeout(self.served.options.request_timeout):
                await self._fill()
        except asyncio.CancelledError:
            self.writer.cancel()
        except Exception as error:
            if as_http_error(error).status == 500:
                log.error("background response %s failed", self.response["id"], exc_info=error)
            self.writer.fail(error)
        if self.store is not None:
            await self.store.settle(self.stored)

    def _finish(self, output: RequestOutput) -> bytes:
        data = self.writer.finish(output, self._usage(output))
        add_items(self.talk, self.response["output"])  # for the response that continues this one
        return data

    async def _keep(self, end: Callable[[], object] | None = None) -> None:
        if self.store is not None:
            await self.store.put(self.stored, end)

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        thoughts = "".join(p["text"] for i in self.response["output"] if i["type"] == "reasoning" for p in i["content"])
        read, written = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": len(self.served.tokenizer.encode(thoughts, False)) if thoughts else 0},
            "total_tokens": read + written,
        }


async def _prepare_fitting(
    served: Served, model: str, talk: Conversation, fields: Mapping[str, Any], body: ResponseRequest
) -> ChatCompletion:
    """With truncation=auto, the oldest turns are left out until the rest fits."""
    while True:
        try:
            return await prepare_chat(served, model, with_instructions(talk, body.instructions), fields, NAMES)
        except HttpError as error:
            shorter = talk.without_oldest_turn() if body.truncation == "auto" else None
            if error.code != "context_length_exceeded" or shorter is None:
                raise
            talk = shorter


def _ended(stored: Stored) -> Stored:
    if stored.running:
        raise refuse("that response is still in progress", "previous_response_id", "wait until it is completed")
    return stored


def _blank(body: ResponseRequest, model: str, job: ChatCompletion) -> dict[str, Any]:
    """A response before its answer, with what was asked repeated as OpenAI does."""
    extra = body.model_extra or {}
    return {
        "id": new_id("resp"), "object": "response", "created_at": int(time.time()), "completed_at": None, "status": "in_progress",
        "background": bool(body.background), "error": None, "incomplete_details": None, "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens, "max_tool_calls": extra.get("max_tool_calls"), "model": model, "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": body.previous_response_id,
        "prompt_cache_key": extra.get("prompt_cache_key"), "safety_identifier": extra.get("safety_identifier"),
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})}, "service_tier": "default",
        "store": body.store is not False,
        "temperature": job.params.temperature, "text": {"format": {"type": "text"}, **(body.text or {})},
        "tool_choice": body.tool_choice or "auto", "tools": body.tools or [], "top_logprobs": body.top_logprobs or 0,
        "top_p": job.params.top_p, "truncation": body.truncation or "disabled", "usage": None, "user": body.user,
        "metadata": body.metadata or {},
    }  # fmt: skip


def _page(items: list[dict[str, Any]], limit: int, order: str, after: str | None) -> dict[str, Any]:
    """One page of a list, as OpenAI cuts them."""
    listed = items if order == "asc" else items[::-1]
    ids = [i["id"] for i in listed]
    if after is not None and after not in ids:
        raise refuse(f"there is no item {after[:100]!r}", "after")
    start = 0 if after is None else ids.index(after) + 1
    data = listed[start : start + limit]
    return {"object": "list", "data": data, "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None, "has_more": start + limit < len(listed)}  # fmt: skip
