"""An engine that says what it is told, in the pieces it is told: what the endpoints make of any answer, without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from llmkit.outputs import CompletionOutput, RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams
from llmkit.server.engine_client import EngineFacts, TokenPrompt


class StubEngine:
    """Answers every request with `pieces`; `asked` keeps what it was asked. error: raised after so many pieces."""

    facts = EngineFacts("stub", "", 4096, 8, 50_000, 8, "float32", "nowhere")

    def __init__(self, tokenizer: Any, pieces: Sequence[str] = ("a", "b"), delay: float = 0.0, error: Exception | None = None,
                 error_after: int = 1) -> None:  # fmt: skip
        self.tokenizer, self.pieces, self.delay = tokenizer, list(pieces), delay
        self.error, self.error_after = error, error_after
        self.healthy, self.stage = True, None
        self.asked: list[tuple[TokenPrompt, SamplingParams]] = []

    async def stream(
        self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncGenerator[StreamChunk, None]:
        """See EngineClient."""
        self.asked.append((prompt, params))
        for i, piece in enumerate([*self.pieces, ""]):
            if self.error and i == self.error_after:
                raise self.error
            await asyncio.sleep(self.delay)
            reason = "stop" if i == len(self.pieces) else None
            yield StreamChunk(piece, [i + 1], finish_reason=reason, output=self._output(prompt, i + 1, reason))

    async def generate(self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0) -> RequestOutput:
        """See EngineClient."""
        chunks = [chunk async for chunk in self.stream(prompt, params, request_id=request_id)]
        assert chunks[-1].output is not None
        return chunks[-1].output()

    async def embed(self, prompts: list[TokenPrompt], pooling: str = "last", normalize: bool = True) -> list[list[float]]:
        """See EngineClient."""
        return [[0.0] * self.facts.hidden_size for _ in prompts]

    def stats(self) -> dict[str, Any]:
        """See EngineClient."""
        return {}

    def _output(self, prompt: TokenPrompt, count: int, reason: str | None) -> Callable[[], RequestOutput]:
        answer = CompletionOutput(0, "".join(self.pieces[:count]), list(range(1, count + 1)), finish_reason=reason)
        return lambda: RequestOutput("r", prompt.text, prompt.ids, [answer], reason is not None)
