"""Who runs in the next step, with how many tokens and which blocks.

ONE budget of tokens a step, spent first on requests that decode (one token each), then on running prompts, then on waiting
ones; a prompt may be cut into chunks, so prefill and decode share steps (continuous batching: Orca; chunked prefill: Sarathi).
Where it is told a smaller budget for such steps, those who decode wait less, and more of their tokens cost no step of their own:
that pays where an answer goes on for long, and unless those who come write for longest, whom it only delays.
When blocks run out, the request that came last gives its blocks back and is computed again later (preemption by recompute).
The one that came first is never preempted for a later one, so it always ends: nobody starves.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from dataclasses import dataclass, field

import numpy as np

from llmkit.engine.kv_cache import BlockPool, hash_blocks
from llmkit.engine.request import Request, Status
from llmkit.engine.rows import Rows

_GROUPS = 32  # when all rows are taken, newcomers are let in by groups of this part of the rows
_PATIENCE = 16  # or after so many steps
_LONG = 128  # tokens that are still to come of an answer
_SOON = 16  # tokens until a block is needed, at most, when it is given early


@dataclass
class Schedule:
    """One step: rows int64 [S], the `num_decodes` that compute just their last token first; num_new int32 [S], how many tokens of
    each to compute; owners: the requests; ends: int32 [S], how many of their tokens the KV cache holds afterwards. copies: (from,
    to) blocks still to be copied before the step (a fork's last, partly filled block). filled: blocks that prompts fill in this
    step and others may share at once; borrowers: those that do. fresh: blocks with new owners, still holding what others left."""

    rows: np.ndarray
    num_new: np.ndarray
    num_decodes: int = 0
    fresh: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    filled: set[int] = field(default_factory=set)
    borrowers: list[Request] = field(default_factory=list)
    owners: list[Request] = field(default_factory=list)
    ends: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_tokens(self) -> int:
        return int(self.num_new.sum())


class Scheduler:
    """The queue of waiting requests, the running ones, and the one decision a step."""

    def __init__(
        self, rows: Rows, pool: BlockPool, token_budget: int, chunk_limit: int = 0, by_priority: bool = False,
        mixed_budget: int | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.pool = rows, pool
        self.mixed_budget = mixed_budget or token_budget
        self.token_budget = self._full_budget = token_budget
        self.chunk_limit = chunk_limit or token_budget
        self.by_priority = by_priority
        self.running: list[Request] = []  # in the order of `_key`
        self._forgotten: dict[int, Request] = {}  # by row: who ran when a step did not fit, and has not been in a step since
        self._copies: dict[Request, tuple[int, int]] = {}  # of that step, those that it did not get to
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # a heap; finished requests are skipped when met
        self._arrivals = 0
        self._group = len(rows.requests) // _GROUPS
        self._held = 0  # steps since a free row was first kept for a group
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # prompt tokens looked up in the prefix cache, and found there
        self.num_hit_tokens = 0

    def _key(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.by_priority else 0, request.arrival)

    @property
    def num_waiting(self) -> int:
        return sum(not r.finished for _, r in self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self._peek() is not None

    def add(self, request: Request) -> None:
        """Queue a new request; a fork waits for its parent's prompt."""
        request.arrival = self._arrivals
        self._arrivals += 1
        parent = request.fork_of
        if parent is not None and not parent.finished:
            request.status = Status.HELD
            parent.forks.append(request)
        else:
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        request.status = Status.WAITING
        heapq.heappush(self._waiting, (self._key(request), request))

    def _peek(self) -> Request | None:
        while self._waiting and self._waiting[0][1].finished:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def unfinished(self) -> list[Request]:
        """Every request that is running, waiting, or held as a fork."""
        known = [*self.running, *(r for _, r in self._waiting if not r.finished)]
        return known + [f for r in known for f in r.forks if not f.finished]

    # ---- one step

    def schedule(self, ahead: bool = False) -> Schedule | None:
        """Decide the next step; None when nobody can run. ahead: one is under way whose tokens are not known. Then who surely
        takes another token goes on, and None means, too, that somebody would have to be preempted."""
        result = Schedule(np.empty(0, np.int64), np.empty(0, np.int32))
        running = self._schedule_running(result, ahead)
        if running is None:
            return None
        rows, new = running
        if not result.preempted:  # who was just sent away must not be followed by somebody later
            self._promise(result, rows, new)
            admitted = self._admit(result, self._budget(rows, new == 1) - int(new.sum()))
            if admitted:
                rows = np.concatenate((rows, [r.row for r in result.admitted])).astype(np.int64)
                new = np.concatenate((new, admitted)).astype(np.int32)
        if not rows.size:
            return None
        ends = self.rows.num_computed[rows] + new
        decoding = (new == 1) & (ends == self.rows.num_coming(rows)) & ~self.rows.pooled[rows]
        if result.borrowers:  # decodes attend before the step's prompts are written
            decoding &= ~np.isin(rows, [r.row for r in result.borrowers])
        # the longest sequences first: their attention takes longest, and what is begun last should be short
        order = np.argsort(np.where(decoding, -self.rows.num_computed[rows], 1), kind="stable")
        result.rows, result.num_new, result.num_decodes = rows[order], new[order], int(decoding.sum())
        result.owners = [r for row in result.rows if (r := self.rows.requests[row]) is not None]  # all: they are running
        result.ends = ends[order]
        result.fresh, self.pool.fresh = self.pool.fresh, []
        if self._forgotten:
            self._introduce(result)
        return result

    def _budget(self, rows: np.ndarray, decoding: np.ndarray) -> int:
        """Tokens of a step of these rows, of which some decode; however many they are, there is room for some prompt tokens."""
        to_come = self.rows.max_total[rows] - self.rows.num_tokens[rows]
        longest, newest = to_come[decoding].max(initial=0), self._newest_answer(to_come[~decoding])
        if longest < _LONG or (newest >= longest and not any(r.read_along for r in self.running)):
            return self.token_budget
        return min(self.token_budget, max(self.mixed_budget, int(decoding.sum()) + max(1, self.mixed_budget // 2)))

    def _newest_answer(self, begun: np.ndarray) -> int:
        """Tokens of the longest answer among those whose prompts have begun, and of who waits first."""
        request = self._peek()
        waiting = request.max_total - len(request.prompt) - len(request.generated) if request else 0
        return max(waiting, int(begun.max(initial=0)))

    def _schedule_running(self, result: Schedule, ahead: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Give running requests their tokens, those that decode first: (rows, new tokens of each). None as `schedule`."""
        if not self.running:
            return result.rows, result.num_new
        requests = list(self.running)
        rows = np.fromiter((r.row for r in requests), np.int64, len(requests))
        coming = self.rows.num_coming(rows)
        ends_now = (self.rows.num_pending[rows] > 0) & (coming >= self.rows.max_total[rows])  # with the token that is pending
        left = np.where(ends_now, 0, coming - self.rows.num_computed[rows])
        order = np.argsort(left > 1, kind="stable")
        want = np.minimum(left, self.chunk_limit)[order]
        new = np.clip(self._budget(rows, left == 1) - (np.cumsum(want) - want), 0, want)
        missing = self.rows.missing_blocks(rows[order], new)
        if ahead and missing.clip(0).sum() > self.pool.num_free:
            return None
        grow = np.flatnonzero((missing > 0) & (new > 0))
        for i in grow:
            self._make_room(requests[order[i]], int(missing[i]), result)
        if ahead and grow.size:
            self._grow_early(requests, rows)
        keep = new > 0
        if result.preempted:
            keep &= np.fromiter((requests[i].status is Status.RUNNING for i in order), bool, len(order))
        return rows[order][keep], new[keep].astype(np.int32)

    def _grow_early(self, requests: list[Request], rows: np.ndarray) -> None:
        """Give these, too, the block that they need soon, while there are plenty: sending block tables costs the device 12 µs
        (an H100), and of a hundred requests one would need a block before most steps."""
        soon = np.minimum(self.rows.num_coming(rows) + _SOON, self.rows.max_total[rows] - 1) - self.rows.num_computed[rows]
        for i in np.flatnonzero(self.rows.missing_blocks(rows, soon) == 1):
            if self.pool.num_free > len(requests):
                self._hold(requests[i], self.pool.allocate(1))

    def _make_room(self, request: Request, missing: int, result: Schedule) -> None:
        """Get a running request its missing blocks, preempting the last to come, which may be itself."""
        while request.status is Status.RUNNING and missing > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            result.preempted.append(victim)
        if request.status is Status.RUNNING:
            self._hold(request, self.pool.allocate(missing))

    def _hold(self, request: Request, blocks: list[int]) -> None:
        request.blocks += blocks
        self.rows.add_blocks(request.row, blocks)

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._enqueue(request)
        self._release_forks(request)  # they must not wait for a request that waits itself
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1

    def _admit(self, result: Schedule, budget: int) -> list[int]:
        """Start waiting requests while rows, blocks and budget last, strictly in order; the new tokens of each."""
        new: list[int] = []
        if not self._admission_due():
            return new
        while budget > 0 and self.rows.num_free and (request := self._peek()) is not None:
            start = self._place(request, result)
            if start is None:
                break
            heapq.heappop(self._waiting)
            new.append(min(int(self.rows.num_tokens[request.row]) - start, self.chunk_limit, budget))
            budget -= new[-1]
            result.admitted.append(request)
            self._promise(result, np.array([request.row]), np.array(new[-1:]))
        if new:
            self._held = 0
        return new

    def _admission_due(self) -> bool:
        """Whether somebody waits and there is a row for him. A prompt makes its step long for all who decode, and one of many
        tokens costs less than many of few: so where all rows were taken, those that get free are kept for a group."""
        if not self.rows.num_free or self._peek() is None:
            return False
        self._held += 1
        return self.rows.num_free >= self._group or self._held > _PATIENCE

    def _place(self, request: Request, result: Schedule) -> int | None:
        """Give a waiting request a row and blocks for all it has so far, sharing what is cached; None if they don't fit.

        Returns how many of its tokens need not be computed.
        """
        tokens = request.tokens
        shared, tail = self._find_shared(request, tokens, result.filled)
        total = -(-len(tokens) // self.pool.block_size)
        needed = total - len(shared)
        if needed > self.pool.num_free - (len(shared) - self.pool.num_held(shared)):
            return None
        self.pool.share(shared)
        fresh = self.pool.allocate(needed)
        start = len(shared) * self.pool.block_size
        if not result.filled.isdisjoint(shared):
            result.borrowers.append(request)
        if tail is not None:
            result.copies.append((tail, fresh[0]))
            start = len(request.prompt) - 1
        self._enter(request, shared + fresh, start)
        self.rows.num_hashed[request.row] = len(shared)
        if not len(request.generated):
            request.num_cached = start
            self.num_queried_tokens += len(tokens)
            self.num_hit_tokens += start
        return start

    def _find_shared(self, request: Request, tokens: np.ndarray, filled: set[int]) -> tuple[list[int], int | None]:
        """Blocks whose contents this request needs and somebody has computed: (full blocks, a partly filled one to copy).

        The last token is always computed anew: its logits are wanted. Nothing is shared when those of the whole prompt are,
        or its hidden states. filled: by this step, so that they can be shared but not copied before it.
        """
        if request.pooling == "mean":
            return [], None
        if request.params.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt):
            return [], None
        size, parent = self.pool.block_size, request.fork_of
        if parent is not None and self._has_computed(parent, len(request.prompt) - 1) and not len(request.generated):
            full, rest = divmod(len(request.prompt) - 1, size)
            tail = parent.blocks[full] if rest else None
            if tail not in filled:
                return parent.blocks[:full], tail
        if not self.pool.caching:
            return [], None
        request.hashes += hash_blocks(tokens, size, request.hashes)
        return self.pool.find(request.hashes[: (len(tokens) - 1) // size]), None

    def _promise(self, result: Schedule, rows: np.ndarray, new: np.ndarray) -> None:
        """Make the blocks that these rows fill in this step known before it runs: a layer stores all keys before any prompt reads
        them, so prompts that come together and begin alike compute the beginning once."""
        if self.pool.caching:
            end = self.rows.num_computed[rows] + new
            for i in np.flatnonzero((new > 1) & (end // self.pool.block_size > self.rows.num_hashed[rows])):
                result.filled.update(self._remember(int(rows[i]), int(end[i])))

    def _has_computed(self, request: Request, count: int) -> bool:
        """Whether a request's first `count` tokens are in the KV cache now; one that was preempted starts again from nothing."""
        return request.status is Status.RUNNING and int(self.rows.num_computed[request.row]) >= count

    def _enter(self, request: Request, blocks: list[int], num_computed: int) -> None:
        row = self.rows.take(request)
        request.blocks = []
        self._hold(request, blocks)
        self.rows.num_computed[row] = num_computed
        request.status = Status.RUNNING
        request.metrics.scheduled_time = request.metrics.scheduled_time or time.monotonic()
        insort(self.running, request, key=self._key)

    # ---- after a step

    def give_way(self, failed: Schedule) -> None:
        """A step did not fit the device's memory: the next ones take half as many tokens at most, and slowly more again. What it
        promised is unknown again, and who relied on that waits again. The runner will know nobody then: who runs is introduced to
        it once more."""
        self.pool.forget(failed.filled)
        self.pool.fresh += failed.fresh
        rows, size = self.rows, self.pool.block_size
        rows.num_hashed[failed.rows] = np.minimum(rows.num_hashed[failed.rows], rows.num_computed[failed.rows] // size)
        for request in failed.borrowers:
            if request.status is Status.RUNNING:  # and was not aborted since
                self._leave(request)
                self._enqueue(request)
        self.token_budget = max(1, min(self.token_budget, failed.num_tokens // 2))
        self._forgotten = {r.row: r for r in self.running}
        self._copies = {r: copy for r in self.running for copy in failed.copies if copy[1] in r.blocks}
        self.rows.grown.update(self._forgotten)

    def _introduce(self, result: Schedule) -> None:
        """Admit those of a step once more whom the runner has forgotten, and repeat copies that were not made."""
        coming = [self._forgotten.pop(row) for row in result.rows.tolist() if row in self._forgotten]
        result.admitted = coming + [r for r in result.admitted if r not in coming]
        result.copies, self._copies = [*self._copies.values(), *result.copies], {}

    def launched(self, schedule: Schedule, sampled: np.ndarray) -> None:
        """A step is under way, and what is launched after it finds its work done: forks of finished prompts may go. sampled: the
        rows that get a token, int64 [R]."""
        rows, prompt = schedule.rows, self.rows.num_prompt[schedule.rows]
        for i in np.flatnonzero((schedule.ends - schedule.num_new < prompt) & (schedule.ends >= prompt)):
            self._release_forks(schedule.owners[i])
        self.rows.num_computed[rows] = schedule.ends
        self.rows.num_pending[sampled] += 1

    def computed(self, schedule: Schedule) -> None:
        """A step's inputs are known, too: remember the blocks that it filled. A row may have another owner by now."""
        self.token_budget = min(self._full_budget, self.token_budget + 1 + self.token_budget // 1024)
        if not self.pool.caching:
            return
        for i in np.flatnonzero(schedule.ends // self.pool.block_size > self.rows.num_hashed[schedule.rows]):
            row = int(schedule.rows[i])
            if self.rows.requests[row] is schedule.owners[i]:
                self._remember(row, int(schedule.ends[i]))

    def _remember(self, row: int, end: int) -> list[int]:
        """Make the full blocks of a row's first `end` tokens known; those that were not."""
        request, size = self.rows.requests[row], self.pool.block_size
        if request is None:
            return []
        request.hashes += hash_blocks(self.rows.token_ids[row, :end], size, request.hashes)
        full = range(int(self.rows.num_hashed[row]), end // size)
        self.rows.num_hashed[row] = end // size
        return [request.blocks[i] for i in full if self.pool.remember(request.blocks[i], request.hashes[i])]

    def _release_forks(self, request: Request) -> None:
        for fork in request.forks:
            if not fork.finished:
                self._enqueue(fork)
        request.forks = []

    def finish(self, request: Request, reason: str) -> None:
        """End a request wherever it is: its blocks and its row are free when this returns."""
        if request.status is Status.RUNNING:
            self._leave(request)
        request.status, request.finish_reason = Status.FINISHED, reason
        request.metrics.finished_time = time.monotonic()
        self._release_forks(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._forgotten.pop(request.row, None)
        self._copies.pop(request, None)
        self.pool.free(request.blocks)
        request.blocks = []
        self.rows.give_back(request)
        request.status = Status.WAITING
