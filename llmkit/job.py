"""One prompt on its way: its requests in the engine, their text on this side."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from llmkit.detokenizer import CONTEXT, Detokenizer
from llmkit.engine.request import Request
from llmkit.errors import LlmkitError
from llmkit.outputs import CompletionOutput, RequestOutput, StreamChunk
from llmkit.sampling_params import SamplingParams
from llmkit.tokenizer import Tokenizer


@dataclass(eq=False)
class Answer:
    """One of the n answers: a request, its tokens as they came, and its text.

    live: text is made token by token, because somebody reads along or a stop string must be found; otherwise once, at the end.
    token_ids: int32, no list: the garbage collector would look at every number of it, 10 ms and more for 256 long answers.
    new_text: what has not been sent to a reader yet. num_sent: tokens that have.
    """

    request: Request
    index: int
    detokenizer: Detokenizer
    live: bool
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    new_text: str = ""
    num_spelled: int = 0
    num_sent: int = 0
    num_sent_logprobs: int = 0

    def take(self, token: int) -> None:
        """One more token."""
        self.token_ids.append(token)
        if self.live and not self.request.finished:
            self._spell(len(self.token_ids))

    def close(self) -> None:
        """Make the rest of the text, once the request has ended. The token that ended it is not part of the text."""
        request, tokens = self.request, self.token_ids
        if not request.params.detokenize:
            return
        by_token = request.finish_reason == "stop" and self.stop_string is None and tokens and tokens[-1] in request.stop_ids
        hidden = 1 if by_token and not request.params.include_stop_str_in_output else 0
        self._spell(len(tokens) - hidden)
        self.new_text += self.detokenizer.flush()

    def _spell(self, end: int) -> None:
        self.new_text += self.detokenizer.push(self.token_ids[self.num_spelled : end])
        self.num_spelled = end

    @property
    def stop_string(self) -> str | None:
        return self.detokenizer.stop_reason

    def output(self) -> CompletionOutput:
        """Everything so far."""
        request = self.request
        logprobs = request.logprobs[: len(self.token_ids)] if request.params.logprobs is not None else None
        total = None if logprobs is None else sum(entry[t].logprob for entry, t in zip(logprobs, self.token_ids))
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text,
            token_ids=self.token_ids.tolist(),
            cumulative_logprob=total,
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=self.stop_string or request.stop_reason,
        )


class Job:
    """A prompt and its n answers.

    notify: called with every new piece when `streaming`, else once an answer, at its end; None when nobody listens.
    error: why it was ended from outside, for its reader to raise.
    """

    def __init__(
        self,
        prompt: str | None,
        requests: list[Request],
        tokenizer: Tokenizer,
        streaming: bool = False,
    ) -> None:
        self.prompt, self.requests, self.streaming = prompt, requests, streaming
        self.notify: Callable[[StreamChunk], None] | None = None
        self.error: LlmkitError | None = None
        params = requests[0].params
        live = params.detokenize and (streaming or bool(params.stop))
        ids = requests[0].prompt[-CONTEXT:].tolist()
        self.answers = {r: Answer(r, i, Detokenizer(tokenizer, r.params, ids), live) for i, r in enumerate(requests)}
        self._num_open = len(requests)
        self._whole: RequestOutput | None = None

    @property
    def params(self) -> SamplingParams:
        return self.requests[0].params

    @property
    def finished(self) -> bool:
        return all(r.finished for r in self.requests)

    def take(self, request: Request, token: int) -> bool:
        """One new token of a request; True when a stop string now ends it, which the caller tells the engine."""
        answer = self.answers[request]
        answer.take(token)
        if request.finished or answer.stop_string is not None:
            return not request.finished
        if self.streaming:
            self._send(answer)
        return False

    def close(self, request: Request) -> None:
        """The request has ended: make the rest of its text and send the last piece.

        Who waits for the whole gets it made here, while others go on: 256 of them at the end would take 15 ms.
        """
        answer = self.answers[request]
        answer.close()
        self._num_open -= 1
        if not self._num_open and not self.streaming:
            self._whole = self._output()
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        if self.notify is not None:
            self.notify(self.piece(answer))

    def piece(self, answer: Answer) -> StreamChunk:
        """What has not been sent of this answer yet."""
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = answer.request.logprobs[answer.num_sent_logprobs :]
            answer.num_sent_logprobs = len(answer.request.logprobs)
        tokens = answer.token_ids[answer.num_sent :].tolist()
        chunk = StreamChunk(answer.new_text, tokens, answer.index, answer.request.finish_reason, logprobs, self.output)
        answer.new_text, answer.num_sent = "", len(answer.token_ids)
        return chunk

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._whole or self._output()

    def _output(self) -> RequestOutput:
        first = self.requests[0]
        return RequestOutput(
            request_id=first.id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt.tolist(),
            outputs=[a.output() for a in self.answers.values()],
            finished=self.finished,
            prompt_logprobs=first.prompt_logprobs if first.params.prompt_logprobs is not None else None,
            num_cached_tokens=first.num_cached,
            metrics=first.metrics,
        )
