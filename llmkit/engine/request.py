"""A request, as the engine sees it: token ids in, token ids out."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llmkit.outputs import Logprob, RequestMetrics
from llmkit.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.engine.grammar import Grammar


class Status(enum.Enum):
    """Where a request is. HELD: a fork that waits for its parent's prompt to be computed."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence to be continued. A prompt with n > 1 is n requests; the others are forks of the first.

    prompt: int32 [P]. generated: int32 [G], what was generated before the row was last given up; while the request runs, its
    row holds the truth (see `Rows`). stop_ids: ids that end it, eos among them unless ignored. max_total: longest prompt +
    answer in tokens. blocks: its block table. hashes: chain of hashes of its full blocks.
    read_along: whether somebody reads its tokens as they come, rather than all of them at the end.
    pooling: "last" or "mean" if it wants no tokens but a vector, `embedding` fp32 [hidden]; hidden_sum: of a mean under way.
    """

    id: str
    prompt: np.ndarray
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    bad_words: list[list[int]] = field(default_factory=list)
    grammar: Grammar | None = None
    seed: int = 0
    max_total: int = 0
    priority: int = 0
    arrival: int = 0
    read_along: bool = True
    pooling: str | None = None
    fork_of: Request | None = None
    forks: list[Request] = field(default_factory=list)

    status: Status = Status.WAITING
    row: int = -1
    generated: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    hidden_sum: Tensor | None = None
    embedding: np.ndarray | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival_time=time.monotonic()))

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)  # nothing precedes the first token

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and what was generated, int32; current only while the request is not running."""
        return np.concatenate((self.prompt, self.generated))
