"""The engine: requests in, tokens out. `step()` is schedule, run, process; there is no second loop anywhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmkit.engine.batch import Batch, build_batch
from llmkit.engine.kv_cache import BlockPool
from llmkit.engine.memory import MemoryPlan
from llmkit.engine.pooling import Pooled
from llmkit.engine.request import Request, Status
from llmkit.engine.rows import Rows
from llmkit.engine.runner import StepResult, create_runner
from llmkit.engine.sampler import NO_TOKEN
from llmkit.engine.scheduler import Schedule, Scheduler
from llmkit.engine.shortage import Shortage
from llmkit.models.decoder import Decoder


@dataclass
class StepOutput:
    """What one step did. requests got one token each, token_ids int64 [R] in the same order; finished are those that ended.
    pooled: those among them that got an embedding, and the rows they had."""

    schedule: Schedule
    batch: Batch
    requests: list[Request]
    token_ids: np.ndarray
    finished: list[Request] = field(default_factory=list)
    pooled: Pooled | None = None


@dataclass
class Flight:
    """A step that was launched: requests are those that get a token, in the order of batch.sampled. ahead: how many may be
    launched after it before its tokens are known."""

    schedule: Schedule
    batch: Batch
    requests: list[Request]
    result: StepResult
    ahead: int


class Engine:
    """Owns the model, the KV cache and the requests. Not thread-safe: its owner holds a lock around every call.

    token_budget: tokens of a step at most. short_mixed: fewer where prompts and decodes mix, if the runner says so. token_text:
    how log-probabilities name their tokens.
    """

    def __init__(
        self,
        model: Decoder,
        plan: MemoryPlan,
        *,
        token_budget: int,
        short_mixed: bool = True,
        chunk_limit: int = 0,
        caching: bool = True,
        by_priority: bool = False,
        enforce_eager: bool = False,
        token_text: Callable[[int], str] = str,
    ) -> None:
        self.model, self.plan, self.token_text = model, plan, token_text
        self._new_rows = lambda: Rows(plan.max_num_seqs, plan.max_model_len, plan.block_size)
        self._new_pool = lambda: BlockPool(plan.num_blocks, plan.block_size, caching)
        self.rows, self.pool = self._new_rows(), self._new_pool()
        self.runner = create_runner(model, self.rows, plan.num_blocks, token_budget, enforce_eager)
        mixed = self.runner.mixed_tokens if short_mixed else None
        self._new_scheduler = lambda: Scheduler(self.rows, self.pool, token_budget, chunk_limit, by_priority, mixed)
        self.scheduler = self._new_scheduler()
        self._flights: deque[Flight] = deque()  # launched, in order
        self._shortage = Shortage()
        self.num_steps = self.num_prompt_tokens = self.num_generated_tokens = self.num_step_tokens = 0
        self.steps_by_size = [0] * 32  # [i]: steps of at most 2^i tokens and more than half of that

    # ---- requests

    def add(self, request: Request) -> None:
        """Queue a request (validated by its owner)."""
        self.scheduler.add(request)

    def abort(self, requests: Iterable[Request]) -> None:
        """End these requests now; their blocks are free when this returns. Finished ones are left alone."""
        for request in list(requests):
            if not request.finished:
                self.scheduler.finish(request, "abort")

    def stop(self, request: Request, reason: str = "stop") -> None:
        """End a request because its owner found a stop string."""
        if not request.finished:
            self.scheduler.finish(request, reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._flights)

    # ---- the loop

    def step(self) -> StepOutput | None:
        """Finish one batch; None when there is nothing to do.

        Where the device chooses tokens by itself, batches after it are launched before this one's tokens are read, so that the
        host's work costs no time. A request that turns out to have ended computes a token or two for nothing.
        """
        if not self._flights:
            flight = self._launch()
            if flight is None:
                return None
            self._flights.append(flight)
        self._launch_ahead()
        output = self._process(self._flights.popleft())
        if not self._flights:
            self._shortage.relieve(self)
        return output

    def _launch_ahead(self) -> None:
        """As many steps as the runner allows after each that is under way."""
        while len(self._flights) <= min(i + f.ahead for i, f in enumerate(self._flights)) and not self._shortage.failed:
            flight = self._launch(ahead=True)
            if flight is None:
                return
            self._flights.append(flight)

    def _launch(self, ahead: bool = False) -> Flight | None:
        """Schedule and run, without waiting for the tokens. ahead: nor for those of the step before."""
        schedule = self.scheduler.schedule(ahead)
        if schedule is None:
            return None
        batch = build_batch(self.rows, schedule.rows, schedule.num_new, schedule.num_decodes)
        result = self._shortage.run(self, batch, schedule)
        if result is None and ahead:
            return None  # room is made when nothing is under way
        if result is None:
            self._shortage.relieve(self)
            return self._launch()
        self.scheduler.launched(schedule, batch.rows[batch.sampled])
        owners = [schedule.owners[i] for i in batch.sampled]
        return Flight(schedule, batch, owners, result, self.runner.steps_ahead(batch))

    def _process(self, flight: Flight) -> StepOutput:
        """Append the new tokens, remember full blocks, end what has ended."""
        schedule, batch, result = flight.schedule, flight.batch, flight.result
        self.num_steps += 1
        self.num_prompt_tokens += batch.num_tokens - batch.num_decodes
        self.num_step_tokens += batch.num_tokens
        self.steps_by_size[(batch.num_tokens - 1).bit_length()] += 1
        self.scheduler.computed(schedule)
        for request, top in result.prompt_logprobs:
            k = request.params.prompt_logprobs or 0
            request.prompt_logprobs += [top.row(i, k, self.token_text) for i in range(len(top.ranks))]
        embedded = self._keep_embeddings(result)
        if result.sampled is None:
            return StepOutput(schedule, batch, [], np.empty(0, np.int64), embedded, result.pooled)
        rows, token_ids, requests = batch.rows[batch.sampled], result.sampled.to_host(), flight.requests
        # not those that were aborted, or ended by the token before, while this step was under way
        alive = np.flatnonzero([not r.finished for r in requests])
        rows, token_ids, requests = rows[alive], token_ids[alive], [requests[i] for i in alive]
        self._tell(rows, token_ids)
        output = StepOutput(schedule, batch, requests, token_ids, embedded, result.pooled)
        self._keep_logprobs(output, result, alive)
        self._append(rows, token_ids, output)
        return output

    def _tell(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """Whoever was launched ahead learns what it began with: each token the first step that computes it."""
        for flight in self._flights:
            flight.batch.learn(rows, token_ids)
            if flight is not self._flights[-1]:
                left = ~np.isin(rows, flight.batch.rows)
                rows, token_ids = rows[left], token_ids[left]

    def _keep_embeddings(self, result: StepResult) -> list[Request]:
        """The requests that end with their vector."""
        if result.pooled is None:
            return []
        result.pooled.keep()
        done = [r for r in result.pooled.requests if not r.finished]
        for request in done:
            whole = request.embedding is not None and bool(np.isfinite(request.embedding).all())
            if not whole:
                self._forget(request)
            self.scheduler.finish(request, "stop" if whole else "error")
        return done

    def _keep_logprobs(self, output: StepOutput, result: StepResult, alive: np.ndarray) -> None:
        """alive: where among the step's sampled sequences the output's requests are, int64 [R]."""
        top = result.sampled.logprobs if result.sampled else None
        if top is None:
            return
        for i, request, token in zip(alive.tolist(), output.requests, output.token_ids.tolist()):
            if request.params.logprobs is not None and token != NO_TOKEN:
                request.logprobs.append(top.row(i, request.params.logprobs, self.token_text))

    def _append(self, rows: np.ndarray, token_ids: np.ndarray, output: StepOutput) -> None:
        now = time.monotonic()
        self.num_generated_tokens += len(rows)
        self.rows.append(rows, token_ids)
        stopped, full = self.rows.ended(rows)
        stopped |= self._grammars_ended(output.requests, token_ids)
        failed = token_ids == NO_TOKEN
        for i in np.flatnonzero(self.rows.num_tokens[rows] == self.rows.num_prompt[rows] + 1):
            output.requests[i].metrics.first_token_time = now
        for i in np.flatnonzero(stopped | full | failed):
            request, token = output.requests[i], int(token_ids[i])
            if stopped[i] and token in (request.params.stop_token_ids or []):
                request.stop_reason = token
            if failed[i]:
                self._forget(request)
            self.scheduler.finish(request, "error" if failed[i] else "stop" if stopped[i] else "length")
            output.finished.append(request)

    def _forget(self, request: Request) -> None:
        """What a request computed whose numbers broke (NaN) shall not be found in the prefix cache."""
        self.pool.forget([b for b in request.blocks if self.pool.ref_counts[b] == 1])

    def _grammars_ended(self, requests: list[Request], token_ids: np.ndarray) -> np.ndarray:
        ended = np.zeros(len(requests), bool)
        for i, request in enumerate(requests):
            if request.grammar is not None:
                ended[i] = not request.grammar.accept(int(token_ids[i])) or request.grammar.finished
        return ended

    # ---- looking inside

    def stats(self) -> dict[str, Any]:
        """Counts of now and since the start."""
        s = self.scheduler
        return {
            "running": len(s.running),
            "waiting": s.num_waiting,
            "kv_block_size": self.pool.block_size,
            "kv_blocks_total": self.pool.num_usable,
            "kv_blocks_free": self.pool.num_free,
            "kv_blocks_cached": self.pool.num_cached,
            "steps": self.num_steps,
            "steps_by_size": list(self.steps_by_size),
            "step_tokens": self.num_step_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "generated_tokens": self.num_generated_tokens,
            "preemptions": s.num_preemptions,
            "prefix_cache_queries": s.num_queried_tokens,
            "prefix_cache_hits": s.num_hit_tokens,
        }

    def recover(self) -> None:
        """After a step broke in the middle: end everything and start from an empty cache, so that the next call works."""
        for request in self.scheduler.unfinished():
            request.status, request.finish_reason = Status.FINISHED, "abort"
        self._flights.clear()
        self._shortage = Shortage()
        self.rows, self.pool = self._new_rows(), self._new_pool()
        self.scheduler = self._new_scheduler()
        self.runner.attach(self.rows)
