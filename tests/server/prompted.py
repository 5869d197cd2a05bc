"""An engine without a model, whose answer depends on the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from llmkit.detokenizer import Detokenizer
from llmkit.outputs import CompletionOutput, RequestOutput, StreamChunk
from llmkit.server.engine_client import EngineFacts
from llmkit.tokenizer import Tokenizer

Script = str | Exception | tuple[str, "str | Exception"]


class PromptedEngine:
    """Says what `script` makes of a prompt's text, a token a chunk, or raises it. Of a tuple the second is what happens in place
    of the last token: an exception, or a reason to finish. prompts, params: what it was asked. running: requests under way."""

    healthy = True

    def __init__(self, folder: Path, script: Callable[[str], Script], delay: float = 0.0) -> None:
        self.tokenizer, self.script, self.delay = Tokenizer.from_folder(folder), script, delay
        self.facts = EngineFacts("scripted", str(folder), 4096, 8, self.tokenizer.vocab_size, 64, "float32", "paper")
        self.prompts: list[str] = []
        self.params: list[Any] = []
        self.running = 0

    async def stream(self, prompt: Any, params: Any, *, request_id: str, priority: int = 0) -> AsyncIterator[StreamChunk]:
        self.prompts.append(prompt.text)
        self.params.append(params)
        said = self.script(prompt.text)
        if isinstance(said, Exception):
            raise said
        text, end = said if isinstance(said, tuple) else (said, None)
        self.running += 1
        try:
            async for chunk in self._say(self.tokenizer.encode(text, False), end, prompt, params):
                yield chunk
        finally:
            self.running -= 1

    async def _say(self, ids: list[int], end: Any, prompt: Any, params: Any) -> AsyncIterator[StreamChunk]:
        text, limit = Detokenizer(self.tokenizer, params), params.max_tokens or 4000
        for i, token in enumerate(ids[:limit] or [None]):
            await asyncio.sleep(self.delay)
            last = i + 1 >= len(ids)
            if last and isinstance(end, Exception):
                raise end
            piece = "" if token is None else text.push([token])
            reason = "stop" if text.stop_reason else (end or "stop") if last else "length" if i + 1 == limit else None
            piece += text.flush() if reason else ""
            answer = CompletionOutput(0, text.text, ids[: i + 1], finish_reason=reason, stop_reason=text.stop_reason)
            whole = RequestOutput("r", prompt.text, prompt.ids, [answer], bool(reason), num_cached_tokens=3)
            yield StreamChunk(piece, [] if token is None else [token], finish_reason=reason, output=lambda w=whole: w)
            if reason:
                return

    async def generate(self, prompt: Any, params: Any, *, request_id: str, priority: int = 0) -> Any:
        chunks = [c async for c in self.stream(prompt, params, request_id=request_id)]
        return chunks[-1].output()  # type: ignore[misc]

    def stats(self) -> dict[str, Any]:
        return {}
