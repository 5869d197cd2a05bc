"""What a request gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One candidate token at one position. `rank` is 1 for the most likely token of the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class RequestMetrics:
    """Times of one request, in seconds of `time.monotonic()`. Units of the properties: seconds."""

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class CompletionOutput:
    """One answer. `finish_reason`: "stop", "length", "abort", or None while it runs; `stop_reason`: the stop string or token
    id that ended it, None for eos."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and its answers, `outputs[0].text` being the first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.outputs[0].text


@dataclass
class StreamChunk:
    """A piece of a streamed answer. `print(chunk, end="")` prints its new text.

    text: what is new since the last chunk. token_ids: the new tokens. index: which of the n answers. finish_reason: set in the
    last chunk of an answer. logprobs: of the new tokens, when asked for. output(): the whole request so far.
    """

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    output: Callable[[], RequestOutput] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text
