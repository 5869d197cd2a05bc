"""What the HTTP endpoints know of the engine: this protocol, and nothing else.

`server.processes.link` speaks it to an engine in another process; the tests of the endpoints speak it to an `LLM` in their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmkit.outputs import RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams
from llmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineFacts:
    """What does not change while an engine lives. folder: the model's files. defaults: its generation_config.json; may be {}."""

    model: str
    folder: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    hidden_size: int
    dtype: str
    runs_on: str
    kv_cache_dtype: str = "auto"
    defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the engine wants it. text: what it was made from, None when token ids were given."""

    ids: list[int]
    text: str | None = None


class EngineClient(Protocol):
    """One engine, many requests at once. Every method is for one event loop and never blocks it.

    Refusals are InvalidRequestError (`param` names the field); EngineUnavailableError while there is no engine to ask, or when it
    died under the request; QueueFullError when too many wait.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def facts(self) -> EngineFacts: ...

    def stream(
        self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncIterator[StreamChunk]:
        """The pieces of the n answers as they come; each answer's last has a finish_reason, and `chunk.output()` is everything so
        far. Closing the iterator early (`aclose`) aborts the request within a step and frees its blocks."""
        ...

    async def generate(self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0) -> RequestOutput:
        """The whole answer. Cancelling aborts the request."""
        ...

    async def embed(self, prompts: list[TokenPrompt], pooling: str = "last", normalize: bool = True) -> list[list[float]]:
        """One vector of hidden_size numbers for each prompt; pooling: "last" or "mean" of the final hidden states."""
        ...

    def stats(self) -> dict[str, Any]:
        """The engine's counts (`Engine.stats`) as of its last step; {} before the first."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether a request sent now would be served."""
        ...
