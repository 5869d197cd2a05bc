"""What a request gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


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


@dataclass(repr=False)
class CompletionOutput:
    """One answer. finish_reason: "stop", "length", "abort", "error" (nothing could follow: the model said NaN, or the masks left
    no token), or None while it runs. stop_reason: the stop string or token id that ended it, None for eos. logprobs: for each
    token the likeliest ones and itself."""

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

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={_shortened(self.text, 400)!r}, token_ids={_few(self.token_ids)}, "
            f"finish_reason={self.finish_reason!r}, stop_reason={self.stop_reason!r})"
        )

    def _repr_html_(self) -> str:
        how = escape(f"{len(self.token_ids):,} tokens, {self.finish_reason or 'unfinished'}")
        return f'<div style="white-space: pre-wrap">{escape(self.text)}</div><small>{how}</small>'


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        answers = ", ".join(map(repr, self.outputs))
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={_shortened(self.prompt, 200)!r}, "
            f"prompt_token_ids={_few(self.prompt_token_ids)}, outputs=[{answers}], finished={self.finished})"
        )

    def _repr_html_(self) -> str:
        return _table([self])


@dataclass(repr=False)
class EmbeddingOutput:
    """A prompt and its vector. embedding: float32 [hidden size]."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    embedding: np.ndarray
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None

    @property
    def outputs(self) -> EmbeddingOutput:
        """vLLM's spelling: `output.outputs.embedding`."""
        return self

    def __repr__(self) -> str:
        few = ", ".join(f"{x:.4f}" for x in self.embedding[:4])
        return (
            f"EmbeddingOutput(request_id={self.request_id!r}, prompt={_shortened(self.prompt, 200)!r}, "
            f"embedding=[{few}, ... {len(self.embedding):,} in all])"
        )


class RequestOutputs(list[RequestOutput]):
    """What `generate` returns: a list, which a notebook shows as a table of prompts and answers."""

    def __repr__(self) -> str:
        return "[" + ",\n ".join(map(repr, self)) + "]"

    def _repr_html_(self) -> str:
        return _table(self)


def _few(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:6]))}, ... {len(ids):,} in all]"


def _shortened(text: str | None, limit: int) -> str | None:
    return text if text is None or len(text) <= limit else f"{text[: limit - 20]}... {len(text):,} characters"


def _table(requests: Sequence[RequestOutput], limit: int = 100) -> str:
    rows = [
        f'<tr><td style="text-align: left; vertical-align: top; white-space: pre-wrap">{escape(prompt)}</td>'
        f'<td style="text-align: left">{"<hr>".join(a._repr_html_() for a in r.outputs)}</td></tr>'
        for r in requests[:limit]
        for prompt in [_shortened(r.prompt, 600) or f"token ids {_few(r.prompt_token_ids)}"]
    ]
    more = f"<caption>the first {limit} of {len(requests):,}</caption>" if len(requests) > limit else ""
    return f"<table>{more}<thead><tr><th>prompt</th><th>answer</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"


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
