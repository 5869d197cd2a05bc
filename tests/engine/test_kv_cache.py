"""The block pool under any sequence of calls: no block is lost, held twice by mistake, or reused while somebody needs it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmkit.engine.kv_cache import NULL_BLOCK, BlockPool, hash_blocks

NUM_BLOCKS = 9


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share and give back blocks; `refs`, `known` and `freed_at` are what the pool should think."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, 4)
        self.holders: list[list[int]] = []
        self.refs = dict.fromkeys(range(1, NUM_BLOCKS), 0)
        self.known: dict[bytes, int] = {}
        self.freed_at: dict[int, int] = {}
        self.clock = 0

    def hashed(self) -> dict[int, bytes]:
        return {block: chain for chain, block in self.known.items()}

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        count = min(count, self.pool.num_free)
        free = [b for b in self.refs if not self.refs[b]]
        cached = sorted((b for b in free if b in self.hashed()), key=self.freed_at.__getitem__)
        evicted = cached[: max(0, count - (len(free) - len(cached)))]  # empty ones go first, then the least recent
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= set(free)
        assert set(blocks) & set(cached) == set(evicted)
        for block in blocks:
            self.refs[block] = 1
        self.known = {c: b for c, b in self.known.items() if b not in evicted}
        self.holders.append(blocks)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def share_known(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.known.values())), unique=True))
        free_before, taken = self.pool.num_free, sum(self.refs[b] == 0 for b in blocks)
        assert self.pool.num_held(blocks) == len(blocks) - taken
        self.pool.share(blocks)
        assert self.pool.num_free == free_before - taken
        for block in blocks:
            self.refs[block] += 1
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(blocks)
        for block in reversed(blocks):  # the end of a sequence is older than its beginning
            self.clock += 1
            self.refs[block] -= 1
            if not self.refs[block]:
                self.freed_at[block] = self.clock

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), chain=st.sampled_from([bytes([i]) for i in range(12)]))
    def remember(self, data: st.DataObject, chain: bytes) -> None:
        block = data.draw(st.sampled_from(sorted({b for h in self.holders for b in h})))
        assert self.pool.remember(block, chain) == (chain not in self.known)
        if chain not in self.known:
            self.known = {c: b for c, b in self.known.items() if b != block} | {chain: block}

    @rule(blocks=st.sets(st.integers(1, NUM_BLOCKS - 1)))
    def forget(self, blocks: set[int]) -> None:
        self.pool.forget(blocks)
        self.known = {c: b for c, b in self.known.items() if b not in blocks}

    @rule(chains=st.lists(st.sampled_from([bytes([i]) for i in range(12)]), unique=True))
    def find(self, chains: list[bytes]) -> None:
        expected = []
        for chain in chains:
            if chain not in self.known:
                break
            expected.append(self.known[chain])
        assert self.pool.find(chains) == expected

    @invariant()
    def books_balance(self) -> None:
        held = {b for h in self.holders for b in h}
        assert self.pool.num_free + len(held) == self.pool.num_usable == NUM_BLOCKS - 1
        assert NULL_BLOCK not in held
        assert self.pool.ref_counts == [1, *(self.refs[b] for b in range(1, NUM_BLOCKS))]
        assert held == {b for b, count in self.refs.items() if count}
        assert self.pool.num_cached == len(self.known)
        assert all(self.pool.find([c]) == [b] for c, b in self.known.items())

    def teardown(self) -> None:
        for blocks in self.holders:
            self.pool.free(blocks)
        assert self.pool.num_free == self.pool.num_usable
        assert sorted(self.pool.allocate(self.pool.num_usable)) == list(range(1, NUM_BLOCKS))  # each exactly once
        assert self.pool.num_cached == 0


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_forget_all_keeps_references_and_finds_nothing():
    pool = BlockPool(5, 4)
    held, given_back = pool.allocate(1), pool.allocate(1)
    pool.remember(held[0], b"a")
    pool.remember(given_back[0], b"b")
    pool.free(given_back)
    pool.forget_all()
    assert pool.find([b"a"]) == pool.find([b"b"]) == []
    assert (pool.num_cached, pool.num_free, pool.ref_counts[held[0]]) == (0, 3, 1)
    assert sorted(pool.allocate(3) + held) == [1, 2, 3, 4]


def test_without_caching_nothing_is_remembered():
    pool = BlockPool(3, 4, caching=False)
    pool.remember(pool.allocate(1)[0], b"a")
    assert pool.find([b"a"]) == []
    assert pool.num_cached == 0


def test_handing_out_more_than_there_is_fails_loudly():
    with pytest.raises(KeyError):
        BlockPool(3, 4).allocate(3)


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5))
def test_hashes_are_equal_exactly_where_the_whole_prefix_is(a, b, size):
    first, second = (hash_blocks(np.array(t, np.int32), size, []) for t in (a, b))
    assert (len(first), len(second)) == (len(a) // size, len(b) // size)
    for i, (x, y) in enumerate(zip(first, second)):
        assert (x == y) == (a[: (i + 1) * size] == b[: (i + 1) * size])


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 5), st.integers(0, 40))
def test_a_chain_can_be_continued(tokens, size, cut):
    whole = hash_blocks(np.array(tokens, np.int32), size, [])
    chain = hash_blocks(np.array(tokens[:cut], np.int64), size, [])  # the integer type does not matter
    assert chain + hash_blocks(np.array(tokens, np.int32), size, chain) == whole
