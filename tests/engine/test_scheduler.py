"""The scheduler, the rows and the engine's loop under random loads, with a fake runner in place of the model.

The fake runner keeps a shadow of the KV cache: for every slot, the whole prefix (tokens up to and including that position) whose
key was written there. A row that reads a slot must find its own prefix in it, whatever was shared, copied, evicted, preempted or
chunked before. The next token is a function of the prefix, so an answer must equal the one the request would get alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.engine.batch import Batch, build_batch
from llmkit.engine.engine import Engine, Flight
from llmkit.engine.kv_cache import NULL_BLOCK
from llmkit.engine.memory import MemoryPlan
from llmkit.engine.request import Request, Status
from llmkit.engine.rows import Rows
from llmkit.engine.runner import StepResult
from llmkit.engine.sampler import SampledTokens
from llmkit.engine.scheduler import Schedule
from llmkit.sampling_params import SamplingParams

VOCAB, EOS = 5, 4


@pytest.fixture(autouse=True, scope="module")
def _short_answers_count_as_long() -> Iterator[None]:
    """For whose sake steps are short."""
    with mock.patch("llmkit.engine.scheduler._LONG", 3):
        yield


def next_token(prefix: bytes) -> int:
    """What the pretended model says after these tokens."""
    return crc32(prefix) % VOCAB


class SaidTokens:
    """Stands for log-probabilities: each names the token that it belongs to."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def row(self, i: int, k: int, decode: object) -> int:
        return self.tokens[i]


class ShadowRunner:
    """Writes and checks prefixes instead of keys and values.

    As on a GPU, those that decode read before the step's prompts are written. Up to `chains` steps may be launched before the
    host knows a step's tokens, so what each row has said is remembered here, on the "device". The next `failures` steps
    of several tokens do not fit its memory, which is found out half-way.
    """

    def __init__(self, rows: Rows, max_tokens: int, chains: int, mixed_tokens: int | None) -> None:
        self.max_tokens, self.chains, self.mixed_tokens = max_tokens, chains, mixed_tokens
        self.cache: dict[int, bytes] = {}
        self.num_chained = self.num_mixed = self.failures = self.num_failed = self.num_copies = 0
        self.attach(rows)

    def attach(self, rows: Rows) -> None:
        self.rows = rows
        self.said: dict[int, bytes] = {}

    def steps_ahead(self, batch: Batch) -> int:
        asked = [self.rows.requests[row] for row in batch.rows[batch.sampled]]
        waits = any(r is not None and r.params.logprobs is not None for r in asked)  # as a GPU for torch's sampler
        return 0 if waits else self.chains

    def run(self, batch: Batch, schedule: Schedule) -> StepResult:
        self.rows.released.clear()
        if self.failures == 2:
            self.fail(batch)
        size = self.rows.block_size
        assert len({target for _, target in schedule.copies}) == len(schedule.copies), "which of two copies remains is chance"
        for source, target in schedule.copies:
            for i in range(size):
                self.cache[target * size + i] = self.cache.get(source * size + i, b"")
        self.num_copies += len(schedule.copies)
        schedule.copies.clear()
        pending = self.rows.num_pending[batch.rows] > 0
        prefixes = [self.said[row] if on_its_way else self.known(row) for row, on_its_way in zip(batch.rows.tolist(), pending)]
        self.num_chained += pending.any()
        self.num_mixed += pending.any() and batch.num_decodes < len(batch.rows)
        for i in np.flatnonzero(pending):
            assert i < batch.num_decodes
            batch.input_ids[i] = prefixes[i][-1]
        last = batch.positions[batch.cu_seqlens[1:] - 1]
        assert (last // size < self.rows.num_blocks[batch.rows]).all(), "no block for a token"
        self.check_layout(batch, prefixes, {r.row for r in schedule.borrowers})
        spans = list(enumerate(self.spans(batch, prefixes)))
        self.write_and_read(batch, spans[: batch.num_decodes])
        self.fail(batch)
        self.write_and_read(batch, spans[batch.num_decodes :])
        tokens = [next_token(prefixes[i]) for i in batch.sampled]
        self.said |= {int(batch.rows[i]): prefixes[i] + bytes([t]) for i, t in zip(batch.sampled, tokens)}
        top: Any = SaidTokens(tokens)
        return StepResult(SampledTokens(torch.tensor(tokens), top) if tokens else None, [])

    def fail(self, batch: Batch) -> None:
        """Once or twice, if that was asked: the first of two before anything was done, the other in the middle."""
        if self.failures and batch.num_tokens > 1:
            self.failures -= 1
            self.num_failed += 1
            raise torch.OutOfMemoryError("out of memory")

    def write_and_read(self, batch: Batch, spans: list[tuple[int, tuple[bytes, int, int, int]]]) -> None:
        size = self.rows.block_size
        for _, (prefix, start, end, low) in spans:
            for position in range(start, end):
                self.cache[int(batch.slot_mapping[low + position - start])] = prefix[: position + 1]
        for i, (prefix, _, end, _) in spans:
            for position in range(end):
                slot = int(self.rows.block_table[batch.rows[i], position // size]) * size + position % size
                assert slot >= size, "a row reads the padding block"
                assert self.cache.get(slot) == prefix[: position + 1], f"row reads another prefix at {position}"

    def known(self, row: int) -> bytes:
        """What the host knows of a row."""
        return self.rows.token_ids[row, : self.rows.num_tokens[row]].astype(np.uint8).tobytes()

    @staticmethod
    def spans(batch: Batch, prefixes: list[bytes]) -> list[tuple[bytes, int, int, int]]:
        """(whole prefix, first and end position computed, where they begin in the batch) of each sequence."""
        ends, low = batch.context_lens.tolist(), batch.cu_seqlens.tolist()
        return [(p, e - n, e, lo) for p, e, n, lo in zip(prefixes, ends, batch.num_new.tolist(), low)]

    def check_layout(self, batch: Batch, prefixes: list[bytes], borrowers: set[int]) -> None:
        assert 0 < batch.num_tokens <= self.max_tokens
        assert len(set(batch.rows.tolist())) == len(batch.rows)
        assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens, "two tokens written to one slot"
        for i, (prefix, start, end, low) in enumerate(self.spans(batch, prefixes)):
            span = slice(low, low + end - start)
            assert batch.positions[span].tolist() == list(range(start, end))
            assert batch.input_ids[span].tolist() == list(prefix[start:end])
            decodes = end - start == 1 and end == len(prefix) and int(batch.rows[i]) not in borrowers
            assert decodes == (i < batch.num_decodes), "those that compute just their last token come first"
        assert (batch.context_lens < self.rows.max_total[batch.rows]).all(), "the last token's key is of no use to anybody"
        assert batch.sampled.tolist() == [i for i, (p, _, e, _) in enumerate(self.spans(batch, prefixes)) if e == len(p)]


@dataclass
class House:
    """An engine with the shadow runner, and everybody who ever came."""

    num_blocks: int
    block_size: int
    num_rows: int
    budget: int
    chunk_limit: int = 0
    caching: bool = True
    by_priority: bool = False
    chains: int = 0
    mixed: int | None = None
    everybody: list[Request] = field(default_factory=list)
    num_borrowers: int = 0
    before: deque[tuple[Request | None, bool]] = field(default_factory=lambda: deque([(None, False)] * 4, 4))

    @property
    def runner(self) -> ShadowRunner:
        assert isinstance(self.engine.runner, ShadowRunner)
        return self.engine.runner

    def __post_init__(self) -> None:
        self.max_len = (self.num_blocks - 1) * self.block_size
        plan = MemoryPlan("cpu", 0, 0, 0, 0, 1, self.block_size, self.num_blocks, self.max_len, self.num_rows)
        shadow = lambda model, rows, num_blocks, max_tokens, *rest: ShadowRunner(rows, max_tokens, self.chains, self.mixed)
        with mock.patch("llmkit.engine.engine.create_runner", shadow):
            self.engine = Engine(mock.Mock(device=torch.device("cpu")), plan, token_budget=self.budget,
                                 chunk_limit=self.chunk_limit, caching=self.caching, by_priority=self.by_priority)  # fmt: skip

    def add(self, prompt: list[int], max_tokens: int, n: int = 1, priority: int = 0, read_along: bool = True) -> list[Request]:
        prompt = prompt[: self.max_len - 1]
        total = min(self.max_len, len(prompt) + max_tokens)
        family: list[Request] = []
        for _ in range(n):
            params = SamplingParams(logprobs=None if len(prompt) % 5 else 1)
            request = Request(f"r{len(self.everybody)}", np.array(prompt, np.int32), params, stop_ids=(EOS,),
                              max_total=total, priority=priority, read_along=read_along,
                              fork_of=family[0] if family else None)  # fmt: skip
            self.engine.add(request)
            family.append(request)
            self.everybody.append(request)
        return family

    def key(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.by_priority else 0, request.arrival)

    def step(self) -> None:
        """One step, with everything that must hold after it."""
        alive = [r for r in self.everybody if not r.finished]
        first = min(alive, key=self.key, default=None)
        first_ran = first is not None and first.status is Status.RUNNING
        roomy = self.engine.scheduler.token_budget == self.budget  # else those that decode may fill a step without the first
        output = self.engine.step()
        assert output is not None or not alive
        assert self.chains or (output is None) == (not alive)
        if output is not None:
            chunk = self.chunk_limit or self.budget
            assert output.batch.num_new.max() <= chunk
            self.num_borrowers += len(output.schedule.borrowers)
            roomy &= self.engine.scheduler.token_budget == self.budget
            # a step that was launched ahead was planned up to `chains` steps before: another may have been the first then, or
            # this one a fork that waited still
            settled = all(then is first and could for then, could in self.before) or not self.chains
            if first_ran and roomy and settled and first is not None:
                assert first not in output.schedule.preempted
                assert first.row in output.batch.rows or first.finished, "the one that came first did not go on"
        self.before.append((first, first_ran and roomy))
        self.check_books()

    def check_books(self) -> None:
        pool, rows, scheduler = self.engine.pool, self.engine.rows, self.engine.scheduler
        running = [r for r in self.everybody if r.status is Status.RUNNING]
        assert set(map(id, scheduler.running)) == set(map(id, running))
        assert [self.key(r) for r in scheduler.running] == sorted(self.key(r) for r in running)
        alive = {id(r) for r in self.everybody if not r.finished}
        assert {id(r) for r in scheduler.unfinished()} == alive, "somebody was forgotten"
        held = Counter(b for r in running for b in r.blocks)
        assert NULL_BLOCK not in held
        assert pool.ref_counts == [1, *(held[b] for b in range(1, pool.num_blocks))]
        assert pool.num_free + len(held) == pool.num_usable
        assert rows.num_free + len(running) == self.num_rows
        for request in self.everybody:
            if request.status is Status.RUNNING:
                assert rows.requests[request.row] is request
                assert rows.block_table[request.row, : rows.num_blocks[request.row]].tolist() == request.blocks
            else:
                assert request.blocks == []
                assert request.row == -1

    def drain(self) -> None:
        """Run to the end: nobody starves, nothing is left behind."""
        alive = [r for r in self.everybody if not r.finished]
        limit = 10 + (len(alive) + 1) * sum(r.max_total for r in alive)  # again for each before it
        while self.engine.has_work:
            self.step()
            limit -= 1
            assert limit > 0, "somebody starves"
        assert all(r.finished for r in self.everybody)
        assert self.engine.pool.num_free == self.engine.pool.num_usable
        assert self.engine.rows.num_free == self.num_rows
        assert self.engine.step() is None

    def check_answers(self, aborted: set[int]) -> None:
        for request in self.everybody:
            said = request.generated.tolist()
            expected = alone(request.prompt.tolist(), request.max_total)
            assert request.logprobs == ([] if request.params.logprobs is None else said)
            if id(request) in aborted:
                assert said == expected[: len(said)]
            else:
                assert said == expected
                assert request.finish_reason == ("stop" if said[-1] == EOS else "length")


def alone(prompt: list[int], max_total: int) -> list[int]:
    """What a request says when nothing else exists."""
    tokens = list(prompt)
    while len(tokens) < max_total:
        tokens.append(next_token(bytes(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@st.composite
def houses(draw: st.DrawFn, **fixed: object) -> House:
    num_rows = draw(st.integers(1, 6))
    options = {
        "num_blocks": draw(st.integers(3, 14)),
        "block_size": draw(st.integers(1, 4)),
        "num_rows": num_rows,
        "budget": num_rows + draw(st.integers(0, 8)),
        "chunk_limit": draw(st.sampled_from([0, 1, 2, 5])),
        "caching": draw(st.booleans()),
        "by_priority": draw(st.booleans()),
        "chains": draw(st.integers(0, 4)),
        "mixed": draw(st.sampled_from([None, 1, 2, 5])),
    }
    return House(**options | fixed)  # type: ignore[arg-type]


# Long prompts of two tokens only: many share a beginning, and answers share theirs.
prompts = st.builds(lambda start, length, tail: ([start] * length) + tail, st.integers(0, 1), st.integers(0, 12),
                    st.lists(st.integers(0, 1), min_size=1, max_size=6))  # fmt: skip
arrivals = st.tuples(st.just("add"), prompts, st.integers(1, 12), st.integers(1, 3), st.integers(0, 2), st.booleans())
actions = st.one_of(arrivals, st.tuples(st.just("step"), st.integers(1, 6)), st.tuples(st.just("abort"), st.integers(0, 40)),
                    st.tuples(st.just("fail"), st.integers(1, 2)))  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(houses(), st.lists(actions, max_size=25))
def test_random_arrivals_aborts_and_preemptions(house, todo):
    aborted: set[int] = set()
    for action, *arguments in todo:
        if action == "add":
            house.add(*arguments)
        elif action == "step":
            for _ in range(arguments[0]):
                house.step()
        elif action == "fail":
            house.runner.failures = arguments[0]
        elif house.everybody:
            request = house.everybody[arguments[0] % len(house.everybody)]
            aborted |= set() if request.finished else {id(request)}
            house.engine.abort([request])
        house.check_books()
    house.drain()
    house.check_answers(aborted)


@settings(max_examples=150, deadline=None)
@given(houses(num_blocks=6, block_size=2, num_rows=4), st.lists(prompts, min_size=3, max_size=6), st.integers(1, 3))
def test_a_tiny_pool_preempts_and_still_answers(house, asked, n):
    for prompt in asked:
        house.add(prompt[:5], 6, n)
    house.drain()
    house.check_answers(set())


def test_such_loads_do_preempt_share_and_copy():
    """The random tests above are only worth something if these things happen in them."""
    house = House(num_blocks=6, block_size=2, num_rows=4, budget=8)
    for prompt in ([0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0]):
        house.add(prompt, 6, n=2)
    house.drain()
    assert house.num_borrowers > 0
    stats = house.engine.stats()
    assert stats["preemptions"] > 0
    assert stats["prefix_cache_hits"] > 0
    assert house.runner.num_copies > 0
    assert any(r.metrics.num_preemptions for r in house.everybody)


def test_prompts_that_come_together_compute_a_common_beginning_once():
    house = House(num_blocks=60, block_size=4, num_rows=8, budget=64)
    head = [0, 1] * 8
    for tail in ([0], [1, 1], [0, 0, 1, 1, 0], [1]):
        house.add(head + tail, 5)
    output = house.engine.step()
    assert output is not None
    assert sorted(output.batch.num_new.tolist()) == [1, 2, 5, 17]
    assert output.batch.num_decodes == 0, "who borrows does not read before the step's prompts are written"
    assert house.engine.stats()["prefix_cache_hits"] == 3 * 16
    house.drain()
    house.check_answers(set())


def test_a_step_that_does_not_fit_promises_nothing():
    """The common beginning was never computed: who borrowed it starts again, behind the one who computes it."""
    house = House(num_blocks=60, block_size=4, num_rows=8, budget=64)
    for tail in ([0], [1, 1], [0, 0, 1, 1, 0]):
        house.add([0, 1] * 8 + tail, 5)
    house.runner.failures = 2
    output = house.engine.step()
    assert output is not None
    assert output.batch.num_new.tolist() == [6]  # a quarter of the step's 24 tokens
    house.drain()
    house.check_answers(set())


def test_what_a_failed_step_promised_is_known_when_it_is_computed():
    house = House(num_blocks=60, block_size=4, num_rows=8, budget=64)
    for tail in ([0], [1, 1]):
        house.add([0, 1] * 8 + tail, 5)
        house.runner.failures = 1
        house.drain()
    assert house.engine.stats()["prefix_cache_hits"] == 16
    house.check_answers(set())


def test_who_leaves_before_room_is_made_is_not_missed():
    """A step launched ahead does not fit, and until those before it have ended, borrowers and forks of it are aborted."""
    house = House(num_blocks=60, block_size=4, num_rows=8, budget=64, chains=2)
    parent, *forks = house.add([0, 1, 1], 9, n=3)
    house.runner.failures = 0
    house.step()  # the forks come with the next
    for tail in ([0], [1, 1], [0, 0, 1, 1, 0]):
        house.add([0, 1] * 8 + tail, 5)
    house.runner.failures = 2
    house.step()
    failed = house.engine._shortage.failed
    assert failed is not None
    assert failed.borrowers
    gone = [failed.borrowers[0], forks[0]]
    house.engine.abort(gone)
    house.add([1, 1, 1, 0, 1], 4, n=3)
    house.drain()
    house.check_answers({id(r) for r in gone})
    assert parent.finish_reason != "abort"


def test_recover_forgets_a_step_that_did_not_fit():
    house = House(num_blocks=60, block_size=4, num_rows=8, budget=64, chains=2)
    house.add([0, 1, 1], 9)
    house.step()
    for tail in ([0], [1, 1]):
        house.add([0, 1] * 8 + tail, 5)
    house.runner.failures = 1
    house.step()
    assert house.engine._shortage.failed is not None
    house.engine.recover()
    house.everybody.clear()
    for tail in ([0], [1, 1]):
        house.add([0, 1] * 8 + tail, 5)
    house.drain()
    house.check_answers(set())
    assert house.engine.scheduler.token_budget == house.budget


def test_a_fork_does_not_copy_what_its_step_is_yet_to_fill():
    """A parent that had begun to answer comes back, and borrows its whole prompt from one that asks the same beside it."""
    house = House(num_blocks=60, block_size=4, num_rows=3, budget=64)
    prompt = [2, 2, 2, 2, 2, 0, 0]  # its answer is long
    before, other, (parent, fork) = house.add([3, 3, 1], 12)[0], house.add(prompt, 12)[0], house.add(prompt, 12, n=2)
    for _ in range(3):
        house.step()
    assert [r.status for r in (before, other, parent, fork)] == [Status.RUNNING] * 3 + [Status.WAITING]
    for request in (parent, other):
        house.engine.scheduler._preempt(request)
    assert len(parent.generated) >= 2
    house.engine.abort([before])
    house.engine.pool.forget_all()
    house.runner.cache.clear()
    house.step()
    assert house.num_borrowers == 3, "the parent twice, the fork once"
    house.drain()
    house.check_answers({id(before)})


def test_a_fork_never_copies_from_a_parent_that_starts_again():
    """A preempted parent comes back with blocks that nothing has been written to yet; its forks come back in the same step."""
    house = House(num_blocks=8, block_size=4, num_rows=4, budget=4, chunk_limit=3, caching=False)
    older = house.add([0, 0], 20)[0]
    parent, fork = house.add([0, 1, 0, 1, 1, 0], 9, n=2)
    house.step()
    assert parent.status is Status.RUNNING
    assert fork.status is Status.HELD
    house.engine.scheduler._preempt(parent)
    assert fork.status is Status.WAITING
    house.drain()
    house.check_answers(set())
    assert older.finished


def test_first_come_first_served_unless_priorities_are_asked_for():
    for by_priority, order in ((False, ["r0", "r1", "r2"]), (True, ["r2", "r0", "r1"])):
        house = House(num_blocks=20, block_size=2, num_rows=1, budget=8, by_priority=by_priority)
        for priority in (1, 1, 0):
            house.add([0, 1], 3, priority=priority)
        ended: list[str] = []
        while house.engine.has_work:
            output = house.engine.step()
            assert output is not None
            ended += [r.id for r in output.finished]
        assert ended == order


def test_decodes_go_on_while_a_long_prompt_is_chunked():
    house = House(num_blocks=40, block_size=4, num_rows=4, budget=8)
    first = house.add([0, 1, 0], 40)[0]
    house.step()
    house.add([1] * 60, 4)
    for _ in range(5):
        before = len(house.engine.rows.generated(first.row))
        output = house.engine.step()
        assert output is not None
        assert (output.batch.num_decodes, output.batch.num_tokens) == (1, 8)
        if first.finished:
            break
        assert len(house.engine.rows.generated(first.row)) == before + 1


def test_steps_are_shorter_while_somebody_decodes():
    house = House(num_blocks=90, block_size=4, num_rows=4, budget=32, mixed=8)
    house.add([1] * 50, 12)
    first = house.engine.step()
    assert first is not None
    assert first.batch.num_tokens == 32, "nobody waits for it"
    house.add([0] * 70, 4)
    sizes = []
    while (output := house.engine.step()) is not None:
        sizes.append((output.batch.num_decodes, output.batch.num_tokens))
    assert sizes[0] == (0, 32), "18 tokens of the first prompt, and 14 of the second"
    assert all(tokens == 8 for decodes, tokens in sizes[1:4] if decodes == 1)
    assert sum(tokens for _, tokens in sizes) == 50 + 70 - 32 + sum(len(r.generated) - 1 for r in house.everybody)


@pytest.mark.parametrize(("max_tokens", "size"), [(6, 8), (3, 32)], ids=["whose answer is long", "who is nearly done"])
def test_steps_are_shorter_for_the_sake_of(max_tokens, size):
    house = House(num_blocks=90, block_size=4, num_rows=4, budget=32, mixed=8)
    house.add([3, 3, 1], max_tokens)
    house.step()
    house.add([0] * 70, 4)
    output = house.engine.step()
    assert output is not None
    assert (output.batch.num_decodes, output.batch.num_tokens) == (1, size)
    house.drain()
    house.check_answers(set())


@pytest.mark.parametrize(
    ("max_tokens", "begun", "read_along", "size"),
    [(5, False, False, 32), (5, True, False, 32), (4, False, False, 8), (4, True, False, 8), (5, False, True, 8),
     (5, True, True, 8)],
    ids=["waits", "has begun", "waits, ends first", "has begun, ends first", "waits, read along", "has begun, read along"],
)
def test_whoever_comes_and_ends_last_is_not_held_up_unless_somebody_reads_along(max_tokens, begun, read_along, size):
    house = House(num_blocks=90, block_size=4, num_rows=4, budget=32, mixed=8)
    house.add([3, 3, 1], 6, read_along=read_along)
    if begun:
        house.add([0] * 70, max_tokens, read_along=False)
    house.step()
    if not begun:
        house.add([0] * 70, max_tokens, read_along=False)
    output = house.engine.step()
    assert output is not None
    assert (output.batch.num_decodes, output.batch.num_tokens) == (1, size)
    house.drain()
    house.check_answers(set())


def test_who_was_preempted_writes_only_what_is_left_of_his_answer():
    house = House(num_blocks=90, block_size=4, num_rows=4, budget=32, mixed=8)
    request = house.add([3, 3, 1], 6)[0]
    for _ in range(2):
        house.step()
    scheduler = house.engine.scheduler
    scheduler._preempt(request)
    assert len(request.generated) == 2
    assert scheduler._newest_answer(np.empty(0, np.int64)) == 4
    house.drain()
    house.check_answers(set())


def test_who_leaves_a_step_under_way_takes_nobody_elses_logprobs_along():
    house = House(num_blocks=60, block_size=4, num_rows=4, budget=16, chains=1)
    leaves = house.add([0, 1, 0], 20)[0]
    house.step()
    stays = house.add([1] * 5, 6)[0]  # with log-probabilities
    house.step()
    assert stays.status is Status.RUNNING
    assert len(stays.logprobs) == 0, "its first step is under way"
    house.engine.abort([leaves])
    house.drain()
    house.check_answers({id(leaves)})


def test_a_chain_of_decodes_leaves_no_prompt_behind():
    """The first prompt's last chunk fills the step; its decodes must not go on alone while the second one waits in a row."""
    house = House(num_blocks=60, block_size=4, num_rows=4, budget=8, chunk_limit=4, chains=1)
    first, second = house.add([0] * 8, 40)[0], house.add([1] * 12, 4)[0]
    for _ in range(6):
        house.step()
    assert second.finished or second.metrics.first_token_time is not None
    assert not first.finished or len(first.generated) < 6


def test_aborting_a_parent_lets_its_forks_go_and_a_fork_leaves_alone():
    house = House(num_blocks=40, block_size=4, num_rows=4, budget=8)
    parent, fork, other = house.add([0, 1, 0], 5, n=3)
    assert fork.status is other.status is Status.HELD
    house.engine.abort([fork])
    house.engine.abort([parent])
    assert other.status is Status.WAITING
    house.check_books()
    house.drain()
    assert [r.finish_reason == "abort" for r in (parent, fork, other)] == [True, True, False]


def test_recover_ends_everybody_and_starts_empty():
    house = House(num_blocks=8, block_size=2, num_rows=2, budget=4)
    asked = [house.add([0, 1, 0], 5, n=3), house.add([1], 3)]
    house.step()
    with mock.patch.object(ShadowRunner, "run", side_effect=RuntimeError("broken")), pytest.raises(RuntimeError):
        house.engine.step()
    house.engine.recover()
    assert all(r.finish_reason == "abort" for family in asked for r in family)
    assert not house.engine.has_work
    house.everybody.clear()
    house.add([0, 1, 0], 5)
    house.drain()
    house.check_answers(set())


def test_a_chained_engine_says_the_same_and_does_chain():
    house = House(num_blocks=12, block_size=4, num_rows=3, budget=8, chains=1)
    for start in range(5):
        house.add([start % 2, 1, start % 3], 9)
    house.drain()
    house.check_answers(set())
    assert house.runner.num_chained > 3
    assert house.runner.num_mixed > 0


def test_two_steps_are_under_way_where_the_runner_allows():
    house = House(num_blocks=60, block_size=4, num_rows=3, budget=16, chains=2)
    for start in range(3):
        house.add([0] * 10 + [start], 12)
    seen = []
    while house.engine.has_work:
        house.step()
        seen.append((len(house.engine._flights), house.engine.rows.num_pending.max()))
    house.check_answers(set())
    assert max(seen) == (2, 2)


def test_each_step_under_way_learns_what_it_began_with():
    """A row's token goes to the first step that computes it, which need not be the next one."""
    house = House(num_blocks=20, block_size=4, num_rows=3, budget=8, chains=1)
    batches = []
    for chosen in ([0, 1], [1, 2]):
        batch = build_batch(house.engine.rows, np.array(chosen), np.ones(2, np.int32), 2)
        batch.input_ids[:] = -1
        house.engine._flights.append(Flight(mock.Mock(), batch, [], mock.Mock(), 1))
        batches.append(batch)
    house.engine._tell(np.array([2, 0, 1]), np.array([52, 50, 51]))
    assert [b.input_ids.tolist() for b in batches] == [[50, 51], [-1, 52]]


@pytest.mark.parametrize(("num_blocks", "sends"), [(200, 1), (17, 8)])
def test_blocks_that_are_needed_soon_come_together_while_there_are_plenty(num_blocks, sends):
    """Eight requests need a second block one after the other. A step sends what has grown before it."""
    house = House(num_blocks=num_blocks, block_size=32, num_rows=8, budget=1000, caching=False, chains=1)
    goes_on = (p for start in range(500) for p in [[start % 4, start // 4 % 4, start // 16 % 4, start // 64]] if EOS not in p)
    for length in (21, 22, 23, 24, 26, 27, 28, 29):  # at others a step waits for log-probabilities
        tails = ([1] * (length - 4) + tail for tail in goes_on)
        house.add(next(p for p in tails if len(alone(p, length + 16)) == 16), 16)
    house.step()
    grown = house.engine.rows.grown
    grown.clear()
    sent = 0
    while house.engine.has_work:
        house.step()
        sent += bool(grown)
        grown.clear()
    house.check_answers(set())
    assert sent == sends
