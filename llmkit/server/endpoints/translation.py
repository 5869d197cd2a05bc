"""Requests of other APIs as chat requests, so that templates, tools and reasoning are read in one place."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from pydantic import ValidationError

from llmkit.errors import EngineUnavailableError, InvalidRequestError
from llmkit.outputs import RequestOutput, StreamChunk
from llmkit.server.endpoints.chat_completions import ChatCompletion, prepare
from llmkit.server.http.errors import HttpError, as_http_error, refuse
from llmkit.server.http.protocol import ChatRequest
from llmkit.server.http.streaming import merged
from llmkit.server.message import Event
from llmkit.server.served import Served

_MESSAGE = re.compile(r"messages\[(\d+)\]")


@dataclass
class Conversation:
    """Chat messages, and where in the request each came from: complaints name that place."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)

    def add(self, origin: str, role: str, **fields: Any) -> dict[str, Any]:
        message = {"role": role, **fields}
        self.messages.append(message)
        self.origins.append(origin)
        return message

    def place(self, text: str) -> str:
        """`text` with messages[i] written as the request has it."""

        def origin(found: re.Match[str]) -> str:
            i = int(found[1])
            return self.origins[i] if i < len(self.origins) else found[0]

        return _MESSAGE.sub(origin, text)

    def without_oldest_turn(self) -> Conversation | None:
        """Less all from the first user message to the next; None when there is no next."""
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if len(users) < 2:
            return None
        first, second = users[:2]
        return Conversation(self.messages[:first] + self.messages[second:], self.origins[:first] + self.origins[second:])


async def prepare_chat(
    served: Served, model: str, talk: Conversation, fields: Mapping[str, Any], names: Mapping[str, str]
) -> ChatCompletion:
    """The chat request of these messages and fields, ready to run. names: what fields are called where this comes from."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        body = ChatRequest.model_validate({"model": model, "messages": talk.messages, **given})
        return await prepare(served, model, body)
    except ValidationError as e:
        first = e.errors()[0]
        param = ".".join(map(str, first["loc"]))
        raise refuse(f"{_renamed(param, names)}: {first['msg']}", _renamed(param, names)) from e
    except (HttpError, InvalidRequestError) as e:
        seen = as_http_error(e)
        param = None if seen.param is None else _renamed(talk.place(seen.param), names)
        raise HttpError(seen.status, talk.place(seen.message), seen.hint, param, seen.code) from e


def _renamed(param: str, names: Mapping[str, str]) -> str:
    """`param`, or the longest beginning of it that has another name there."""
    for ours in sorted(names, key=len, reverse=True):
        if param == ours or param.startswith((f"{ours}.", f"{ours}[")):
            return names[ours] + param[len(ours) :]
    return param.replace(".function.", ".")  # tools[0].function.name is tools[0].name in the other APIs


async def whole(job: ChatCompletion) -> tuple[list[Event], RequestOutput]:
    """The one answer's events, and what the engine says of it."""
    output = await job.served.engine.generate(job.prompt, job.params, request_id=job.id, priority=job.body.priority or 0)
    if output.outputs[0].finish_reason == "abort":
        raise _cut_off()
    reader = job.reader()
    return [*reader.push(output.outputs[0].text), *reader.finish()], output


async def pieces(job: ChatCompletion) -> AsyncGenerator[tuple[list[Event], StreamChunk], None]:
    """The one answer's events as they come, with the chunk that brought them."""
    reader = job.reader()
    chunks = job.served.engine.stream(job.prompt, job.params, request_id=job.id, priority=job.body.priority or 0)
    async with aclosing(merged([chunks])) as stream:
        async for _, chunk in stream:
            events = reader.push(chunk.text)
            if chunk.finish_reason == "abort":
                yield [*events, *reader.finish()], replace(chunk, finish_reason=None)
                raise _cut_off()
            yield [*events, *(reader.finish() if chunk.finish_reason else [])], chunk


def _cut_off() -> EngineUnavailableError:
    """These APIs have no word for an answer that the server ended."""
    return EngineUnavailableError("the server ended this answer before it was complete, for it stops", "ask again in a moment")


def new_id(kind: str) -> str:
    """A name that nobody can guess."""
    return f"{kind}_{uuid.uuid4().hex}"


def named_frame(event: Mapping[str, Any]) -> bytes:
    """A server-sent event with its type as its name."""
    return b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
