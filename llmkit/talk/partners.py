"""Who answers: a model in this process, or any OpenAI server."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmkit.client.openai import OpenAIClient, in_sync
from llmkit.errors import ConfigError, did_you_mean
from llmkit.talk.conversation import Message

if TYPE_CHECKING:
    from llmkit.llm import LLM
    from llmkit.sampling_params import SamplingParams


class Piece(NamedTuple):
    """A piece of an answer. thought: of the reasoning, not of the answer. tokens: how many it is made of, or, in a piece without
    text, how many the whole answer had; 0 where nobody says."""

    text: str
    thought: bool = False
    tokens: int = 0


class Partner(Protocol):
    """name: of the model. Interrupting or leaving `say` ends the answer, there too."""

    name: str

    def say(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """Answer the conversation, piece by piece."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Local:
    """An `LLM`."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self.llm, self.params, self.name = llm, params, str(llm.config.model)

    def say(self, messages: list[Message]) -> Generator[Piece, None, None]:
        with closing(self.llm.stream(messages, self.params)) as chunks:  # type: ignore  # it is a generator
            for chunk in chunks:
                yield Piece(chunk.text, tokens=len(chunk.token_ids))

    def close(self) -> None:
        self.llm.close()


class Remote:
    """A server. model: as it calls it; None takes its first. options: of every request."""

    def __init__(self, url: str, api_key: str | None, model: str | None, options: dict[str, Any]) -> None:
        self._runner, self._client, self._options = asyncio.Runner(), OpenAIClient(url, api_key), options
        try:
            known = self._runner.run(self._client.models())
            self.name = model or next(iter(known), "")
            if self.name not in known and known:
                near = did_you_mean(self.name, known)
                hint = f"did you mean {near}?" if near else f"it has {', '.join(known)}"
                raise ConfigError(f"the server has no model {self.name!r}", hint)
        except BaseException:
            self.close()
            raise

    def say(self, messages: list[Message]) -> Generator[Piece, None, None]:
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        with closing(in_sync(self._client.events("/v1/chat/completions", body | self._options), self._runner)) as events:
            for event in events:
                yield from _pieces(event)

    def close(self) -> None:
        self._client.close()
        self._runner.close()


def _pieces(event: dict[str, Any]) -> Iterator[Piece]:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            yield Piece(thought, thought=True)
        if text := delta.get("content"):
            yield Piece(text)
    if usage := event.get("usage"):
        yield Piece("", tokens=usage.get("completion_tokens") or 0)


def request_options(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters as fields of a request; those that OpenAI does not know are spelled as vLLM does."""
    options = dict(sampling)
    if (structured := options.get("structured_outputs")) is not None:
        options["structured_outputs"] = {k: v for k, v in dataclasses.asdict(structured).items() if v not in (None, False)}
    return options
