"""The layout of padded steps with prompts, on Triton's interpreter: what a graph would replay is what the reference computes."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from llmkit.attention.fixed import FixedBackend
from llmkit.attention.reference import ReferenceBackend
from llmkit.attention.triton import TritonBackend
from llmkit.engine.batch import Batch, build_batch
from llmkit.engine.graphs import DeviceRows
from llmkit.engine.memory import graph_tokens
from llmkit.engine.prompt_graphs import DECODES, PROMPTS, TOKENS, PromptGraphs, size_of
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.layers.rotary import RotaryEmbedding
from llmkit.models.config import RopeConfig
from llmkit.sampling_params import SamplingParams

HEADS, KV_HEADS, DIM, SIZE, MAX_LEN, BLOCKS = 4, 2, 32, 16, 160, 90
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, CLOSE = (torch.bfloat16, 2e-2) if DEVICE.type == "cuda" else (torch.float32, 1e-5)


def make(sequences: list[tuple[int, int, int]], decodes: int) -> tuple[Rows, Batch]:
    """Sequences of (tokens, of these computed, to compute now), the first ones decoding, in shuffled blocks and rows."""
    rows = Rows(12, MAX_LEN, SIZE)
    free = np.random.default_rng(0).permutation(np.arange(1, BLOCKS)).tolist()
    own: list[int] = []
    for total, computed, _ in sequences:
        row = rows.take(Request("r", np.arange(total, dtype=np.int32), SamplingParams(), max_total=MAX_LEN))
        rows.num_computed[row] = computed
        rows.add_blocks(row, [free.pop() for _ in range(-(-total // SIZE))])
        own.append(row)
    new = np.array([n for _, _, n in sequences], np.int32)
    return rows, build_batch(rows, np.array(own), new, decodes)


def device_rows(rows: Rows) -> DeviceRows:
    """As after the steps before: tables are there, and the newest tokens."""
    state = DeviceRows(12, rows.block_table.shape[1], DEVICE)
    state.update_tables(np.arange(12), rows.block_table)
    state.last_token[:] = 5000 + torch.arange(13)
    return state


@pytest.mark.parametrize("backend", [TritonBackend, FixedBackend])
@pytest.mark.parametrize(
    ("sequences", "decodes"),
    [
        ([(20, 0, 20)], 0),
        ([(150, 0, 150)], 0),
        ([(9, 0, 9), (60, 33, 27), (3, 1, 2)], 0),
        ([(80, 0, 40), (30, 0, 30), (5, 0, 5), (7, 0, 7)], 0),
        ([(n, 0, n) for n in (9, 20, 3, 40, 5)], 0),
        ([(100, 99, 1), (1, 0, 1), (17, 16, 1), (30, 10, 20), (64, 0, 64)], 3),
        ([(40, 39, 1)] * 9 + [(5, 0, 5)], 9),
    ],
    ids=["one", "two tiles", "parts are cached", "one unfinished", "more than four", "decodes among them", "nearly only decodes"],
)
def test_a_padded_step_attends_as_the_reference(sequences, decodes, backend, monkeypatch):
    rows, batch = make(sequences, decodes)
    state = device_rows(rows)
    cache = torch.randn(1, 2, BLOCKS, KV_HEADS, SIZE, DIM, device=DEVICE).to(DTYPE)
    rotary = RotaryEmbedding(RopeConfig(1e4, DIM, "default", {}, MAX_LEN), MAX_LEN, DTYPE, DEVICE)
    layer: Any = types.SimpleNamespace(layer=0, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, q_norm=None, k_norm=None,
                                       norms=None, window=None, rotary=True)  # fmt: skip
    qkv = torch.randn(batch.num_tokens, (HEADS + 2 * KV_HEADS) * DIM, device=DEVICE).to(DTYPE)
    plain = cache.clone()
    step = ReferenceBackend(plain, rotary, {None}).prepare(
        batch, torch.from_numpy(batch.positions).to(DEVICE), torch.from_numpy(batch.slot_mapping).to(DEVICE)
    )
    expected = step.attend(layer, qkv.clone())

    seen: dict[str, Any] = {}

    def body(ids, step):
        padded = torch.cat((qkv, torch.full((len(ids) - len(qkv), qkv.shape[1]), 3.0, device=DEVICE, dtype=DTYPE)))
        out = torch.empty(len(ids), HEADS * DIM, device=DEVICE, dtype=DTYPE)
        fixed = backend is FixedBackend
        seen.update(ids=ids, out=step.attend_all(layer, padded.float()[None], out, None) if fixed else step.attend(layer, padded))
        return seen["out"]

    graphs = PromptGraphs(body, backend(cache, rotary, HEADS), state, None)
    size = size_of(batch)
    assert size is not None
    assert size.decodes >= decodes
    assert size.tokens >= batch.num_tokens
    before = state.last_token.clone(), state.position.clone(), state.block_table.clone()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **options: empty(*a, **options).fill_(float("nan")))
    graphs.load(batch, size)
    hidden = graphs.run(size)[: batch.num_tokens]
    monkeypatch.undo()

    torch.testing.assert_close(hidden, expected, rtol=2e-2, atol=CLOSE)
    torch.testing.assert_close(cache, plain, rtol=2e-2, atol=CLOSE)
    assert torch.equal(cache[:, :, 0], plain[:, :, 0]), "the padding block, which others read, stays as it was"
    assert seen["out"].isfinite().all(), "the padding, too"
    ids = seen["ids"][: batch.num_tokens].cpu()
    assert ids[:decodes].tolist() == [5000 + int(row) for row in batch.rows[:decodes]], "newest tokens, known on the device alone"
    assert torch.equal(ids[decodes:], torch.from_numpy(batch.input_ids[decodes:]))
    assert all(torch.equal(a, b) for a, b in zip(before, (state.last_token, state.position, state.block_table)))


def test_decodes_alone_and_too_many_have_no_size():
    assert size_of(make([(5, 4, 1)], 1)[1]) is None
    assert size_of(dataclasses.replace(make([(5, 0, 5)], 0)[1], input_ids=np.zeros(TOKENS[-1] + 1))) is None
    assert size_of(make([(150, 0, 150)], 0)[1], most=128) is None
    assert graph_tokens(14 << 30) < graph_tokens(1 << 30) == TOKENS[-1], "long steps of big models are not padded"
    many = dataclasses.replace(make([(5, 0, 5)] * 2, 0)[1], rows=np.arange(PROMPTS[-1] + 1))
    assert size_of(many) is None


@given(st.integers(0, 600), st.integers(1, 40), st.integers(1, 2300))
def test_a_size_has_room_and_is_the_smallest(decodes, prompts, prompt_tokens):
    one, _ = make([(5, 0, 5)], 0)
    batch = dataclasses.replace(
        build_batch(one, np.zeros(1, np.int64), np.ones(1, np.int32), 0), rows=np.zeros(decodes + prompts),
        input_ids=np.zeros(decodes + max(prompts, prompt_tokens)), num_decodes=decodes,
    )  # fmt: skip
    size = size_of(batch)
    if size is None:
        assert batch.num_tokens > TOKENS[-1] or decodes > DECODES[-1] or prompts > PROMPTS[-1]
        return
    assert size.tokens >= max(size.decodes, batch.num_tokens)
    assert size.decodes >= decodes
    assert size.prompts >= prompts
    smaller = [t for t in TOKENS if t < size.tokens]
    assert not smaller or smaller[-1] < max(size.decodes, batch.num_tokens)
