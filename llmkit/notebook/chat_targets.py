"""Whom `%%llmkit chat` talks to: a server, ours or any other, or an `LLM` of this notebook. Both stream the same pieces."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.errors import EngineUnavailableError, LlmkitError, ServerError
from llmkit.server.handle.server import Server, find
from llmkit.talk.conversation import Message

if TYPE_CHECKING:
    from llmkit.llm import LLM

_USAGE = {"include_usage": True, "continuous_usage_stats": True}  # the second is vLLM's: counts even if the answer is cut short


@dataclass(frozen=True)
class Piece:
    """What came next. usage: prompt and completion tokens, once they are known."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None


class Target(Protocol):
    """Answers conversations."""

    @property
    def name(self) -> str:
        """What the model is called."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it is worth asking again."""
        ...

    def stream(self, messages: list[Message], options: Mapping[str, Any]) -> Iterator[Piece]:
        """The pieces of the answer. options: sampling parameters. Closing it early ends the request."""
        ...


class Served:
    """A model behind OpenAI's protocol. server: where it is known."""

    def __init__(self, url: str, model: str = "", api_key: str = "", server: Server | None = None) -> None:
        self.url, self.model, self.api_key, self.server = url, model, api_key, server

    @classmethod
    def by(cls, server: Server) -> Served:
        """Waits until it is ready."""
        return cls(server.url, server.model, server.api_key, server)

    @property
    def name(self) -> str:
        return self.model or self.url

    @property
    def alive(self) -> bool:
        return self.server is None or self.server.state == "ready"

    def stream(self, messages: list[Message], options: Mapping[str, Any]) -> Iterator[Piece]:
        from llmkit.notebook.in_thread import in_thread

        return in_thread(self._pieces(messages, options))

    async def _pieces(self, messages: list[Message], options: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        from llmkit.client.openai import OpenAIClient
        from llmkit.talk.partners import request_options

        client = OpenAIClient(self.url, self.api_key)
        try:
            self.model = self.model or await _first_model(client)
            body = {"model": self.model, "messages": messages, "stream": True, "stream_options": _USAGE}
            ended = False
            async for event in client.events("/v1/chat/completions", body | request_options(dict(options))):
                piece = _piece(event)
                ended = ended or piece.finish_reason is not None
                yield piece
            if not ended:
                raise ServerError("the answer broke off in the middle", "%llmkit status, %llmkit logs")
        finally:
            client.close()


async def _first_model(client: Any) -> str:
    models = await client.models()
    if not models:
        raise ServerError(f"{client.url} serves no model", "give it a model, or name another server: --model URL")
    return models[0]


def _piece(event: dict[str, Any]) -> Piece:
    usage = event.get("usage")
    counts = (usage["prompt_tokens"], usage.get("completion_tokens", 0)) if usage else None
    choice = next(iter(event.get("choices") or ()), {})
    delta = choice.get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return Piece(delta.get("content") or "", reasoning, choice.get("finish_reason"), counts)


class Local:
    """An `LLM` in this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @property
    def name(self) -> str:
        return self.llm.config.model

    @property
    def alive(self) -> bool:
        return not self.llm._driver.closed

    def stream(self, messages: list[Message], options: Mapping[str, Any]) -> Iterator[Piece]:
        params = self.llm.get_default_sampling_params().clone(**options)
        prompt = done = 0
        for chunk in self.llm.stream(messages, params):
            if chunk.output is not None and not prompt:
                prompt = len(chunk.output().prompt_token_ids)
            done += len(chunk.token_ids)
            yield Piece(chunk.text, "", chunk.finish_reason, (prompt, done))


def choose(which: str | None, names: Mapping[str, Any], last: Target | None, api_key: str | None = None) -> Target:
    """Whom to ask. which: a variable that holds a server or an LLM, a URL (its key is api_key), or a running server's model, port
    or pid; None: whom the conversation was with, else this notebook's newest server, its LLM, any server on this machine."""
    if which is not None:
        return _named(which, names, api_key)
    if last is not None and last.alive:
        return last
    try:
        server = find()
    except EngineUnavailableError:
        server = None
    if server is not None and server.started_here:
        return Served.by(server)
    if llms := _llms(names):
        return Local(llms[-1])
    if server is None:
        hint = "%llmkit serve starts a server; an LLM of this notebook will do, too"
        raise EngineUnavailableError("there is nobody to talk to", hint)
    return Served.by(server)


def _named(which: str, names: Mapping[str, Any], api_key: str | None) -> Target:
    thing = names.get(which)
    if isinstance(thing, Server):
        return Served.by(thing)
    if thing is not None and thing in _llms(names):
        return Local(thing)
    if "://" in which:
        return Served(which, api_key=api_key or "")
    try:
        return Served.by(find(which))
    except EngineUnavailableError as e:
        here = [n for n, v in names.items() if isinstance(v, Server) or any(v is llm for llm in _llms(names))]
        hint = f"variables that will do: {', '.join(here)}" if here else e.hint
        what = "neither a running server, nor a URL, nor a variable that holds a server or an LLM"
        raise LlmkitError(f"--model {which}: {what}", hint) from e


def _llms(names: Mapping[str, Any]) -> list[Any]:
    """The living LLMs among the values of a notebook. Whoever has one has imported the class."""
    module = sys.modules.get("llmkit.llm")
    return [v for v in names.values() if module and isinstance(v, module.LLM) and not v._driver.closed]
