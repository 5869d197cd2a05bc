"""One prompt on its way to a vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmkit.errors import EngineError, InvalidRequestError, LlmkitError
from llmkit.outputs import EmbeddingOutput

if TYPE_CHECKING:
    from llmkit.engine.request import Request

POOLINGS = ("last", "mean")


class EmbeddingJob:
    """What `Job` is for an answer: one request in the engine, and who waits for it. It never gets a token.

    notify: called once, when it has ended. error: why it was ended from outside, for its reader to raise.
    """

    def __init__(self, prompt: str | None, request: Request, normalize: bool) -> None:
        self.prompt, self.requests, self.normalize = prompt, [request], normalize
        self.notify: Callable[[], None] | None = None
        self.error: LlmkitError | None = None

    @property
    def finished(self) -> bool:
        return self.requests[0].finished

    def take(self, request: Request, token: int) -> bool:
        raise TypeError(f"an embedding takes no tokens, and got {token}")

    def close(self, request: Request) -> None:
        """The request has ended."""
        if request.finish_reason == "error":
            what = f"{len(request.prompt)} token ids" if self.prompt is None else repr(self.prompt[:60])
            self.error = self.error or EngineError(
                f"there is no embedding of {what}: the model's numbers broke (NaN or infinite)",
                "take a dtype with a wider range, bfloat16 or float32, or a model whose weights are whole",
            )
        if self.notify is not None:
            self.notify()

    def output(self) -> EmbeddingOutput:
        """The vector; of length 1 if it is to be normalised."""
        import numpy as np

        request = self.requests[0]
        vector = request.embedding
        if vector is None:
            raise LookupError(f"{request.id} has no embedding: it ended by {request.finish_reason}")
        if self.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return EmbeddingOutput(request.id, self.prompt, request.prompt.tolist(), vector, request.num_cached, request.metrics)


def check_pooling(pooling: object) -> None:
    """Refuse what is not the name of a pooling."""
    if pooling not in POOLINGS:
        what = f"pooling must be 'last' (of a model that was trained so) or 'mean'; got {pooling!r}"
        raise InvalidRequestError(what, param="pooling")
