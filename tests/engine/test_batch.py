"""One step's arrays, checked against a walk over sequences and tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.engine.batch import build_batch
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.sampling_params import SamplingParams

MAX_LEN = 40


def request_of(tokens: list[int], num_prompt: int, **params: int) -> Request:
    request = Request("r", np.array(tokens[:num_prompt], np.int32), SamplingParams(**params), max_total=MAX_LEN)  # type: ignore[arg-type]
    request.generated = np.array(tokens[num_prompt:], np.int32)
    return request


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_token_knows_its_sequence_position_and_slot(data):
    size = data.draw(st.integers(1, 7))
    lengths = data.draw(st.lists(st.integers(1, MAX_LEN), min_size=1, max_size=5))
    rows, next_block = Rows(8, MAX_LEN, size), 1
    for length in lengths:
        row = rows.take(request_of(data.draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)), 1))
        rows.num_computed[row] = data.draw(st.integers(0, length - 1))
        count = -(-length // size)
        rows.add_blocks(row, list(range(next_block, next_block + count)))
        next_block += count
    held = [r for r, request in enumerate(rows.requests) if request is not None]
    chosen = np.array(data.draw(st.permutations(held))[: data.draw(st.integers(1, len(held)))], np.int64)
    left = rows.num_tokens[chosen] - rows.num_computed[chosen]
    num_new = np.array([data.draw(st.integers(1, int(n))) for n in left], np.int32)
    batch = build_batch(rows, chosen, num_new, 0)

    token = 0
    for i, row in enumerate(chosen):
        assert batch.cu_seqlens[i] == token
        for position in range(rows.num_computed[row], rows.num_computed[row] + num_new[i]):
            assert batch.input_ids[token] == rows.token_ids[row, position]
            assert batch.positions[token] == position
            assert batch.slot_mapping[token] == rows.block_table[row, position // size] * size + position % size
            token += 1
        assert batch.context_lens[i] == rows.num_computed[row] + num_new[i]
        count = -(-int(batch.context_lens[i]) // size)
        assert batch.block_tables[i, :count].tolist() == rows.block_table[row, :count].tolist()
    assert batch.num_tokens == batch.cu_seqlens[-1] == token
    assert batch.sampled.tolist() == [i for i in range(len(chosen)) if num_new[i] == left[i]]
    assert batch.last_tokens.tolist() == [int(batch.cu_seqlens[i + 1]) - 1 for i in batch.sampled]
    for array in (batch.input_ids, batch.positions, batch.slot_mapping, batch.cu_seqlens, batch.sampled):
        assert array.dtype == np.int64


def test_a_row_that_was_given_back_keeps_nothing_of_its_request():
    rows = Rows(1, MAX_LEN, 4)
    first = request_of([1, 2, 3, 4, 5], 3, min_tokens=2, max_tokens=9)
    first.stop_ids = (1, 2, 3, 4, 5, 6)
    row = rows.take(first)
    rows.add_blocks(row, [7, 8])
    rows.append(np.array([row]), np.array([9]))
    rows.give_back(first)
    assert first.generated.tolist() == [4, 5, 9]
    assert (first.row, rows.num_free, rows.released) == (-1, 1, [row])
    second = request_of([2], 1)
    second.stop_ids = (8,)
    assert rows.take(second) == row
    assert (rows.num_blocks[row], rows.num_computed[row], rows.num_hashed[row], rows.num_tokens[row]) == (0, 0, 0, 1)
    rows.append(np.array([row]), np.array([5]))
    assert rows.ended(np.array([row]))[0].tolist() == [False]  # 5 was a stop id of the first request only
    rows.append(np.array([row]), np.array([8]))
    assert rows.ended(np.array([row]))[0].tolist() == [True]


@pytest.mark.parametrize(("min_tokens", "ends_at"), [(0, 1), (1, 2), (3, 4)])
def test_a_stop_id_counts_only_after_min_tokens(min_tokens, ends_at):
    rows = Rows(1, MAX_LEN, 4)
    request = request_of([1, 2], 2, min_tokens=min_tokens, max_tokens=9)
    request.stop_ids = (5,)
    request.max_total = 2 + 4
    row = np.array([rows.take(request)])
    seen = []
    for _ in range(4):
        rows.append(row, np.array([5]))
        stopped, full = rows.ended(row)
        seen.append((bool(stopped[0]), bool(full[0])))
    assert [stopped for stopped, _ in seen] == [i + 1 >= ends_at for i in range(4)]
    assert [full for _, full in seen] == [False, False, False, True]
