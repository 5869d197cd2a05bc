"""The layout of small prompt steps, on Triton's interpreter: what a graph would replay is what the reference computes."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from llmkit.attention.reference import ReferenceBackend
from llmkit.attention.triton import TritonBackend
from llmkit.engine.batch import Batch, build_batch
from llmkit.engine.graphs import DeviceRows
from llmkit.engine.prompt_graphs import SEQUENCES, TOKENS, PromptGraphs
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.layers.rotary import RotaryEmbedding
from llmkit.models.config import RopeConfig
from llmkit.sampling_params import SamplingParams

HEADS, KV_HEADS, DIM, SIZE, MAX_LEN, BLOCKS = 4, 2, 32, 16, 160, 50
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, CLOSE = (torch.bfloat16, 2e-2) if DEVICE.type == "cuda" else (torch.float32, 1e-5)


def make(prompts: list[tuple[int, int, int]]) -> tuple[Rows, Batch]:
    """Prompts of (tokens, of these computed, to compute now), in shuffled blocks."""
    rows = Rows(6, MAX_LEN, SIZE)
    free = np.random.default_rng(0).permutation(np.arange(1, BLOCKS)).tolist()
    for total, computed, _ in prompts:
        row = rows.take(Request("r", np.arange(total, dtype=np.int32), SamplingParams(), max_total=MAX_LEN))
        rows.num_computed[row] = computed
        rows.add_blocks(row, [free.pop() for _ in range(-(-total // SIZE))])
    new = np.array([n for _, _, n in prompts], np.int32)
    return rows, build_batch(rows, np.arange(len(prompts)), new, 0)


@pytest.mark.parametrize(
    "prompts",
    [[(20, 0, 20)], [(150, 0, 150)], [(9, 0, 9), (60, 33, 27), (3, 1, 2)], [(80, 0, 40), (30, 0, 30), (5, 0, 5), (7, 0, 7)]],
    ids=["one", "two tiles", "parts are cached", "one unfinished, as many as there may be"],
)
def test_a_padded_step_attends_as_the_reference(prompts, monkeypatch):
    rows, batch = make(prompts)
    state = DeviceRows(6, rows.block_table.shape[1], DEVICE)
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

    def body(ids, step, last, which, work):
        padded = torch.cat((qkv, torch.full((len(ids) - len(qkv), qkv.shape[1]), 3.0, device=DEVICE, dtype=DTYPE)))
        seen.update(ids=ids, last=last, rows=which, out=step.attend(layer, padded))
        return last, last

    graphs = PromptGraphs(body, TritonBackend(cache, rotary, HEADS), state)
    assert graphs.fits(batch)
    size = next(t for t in TOKENS if t >= batch.num_tokens)
    wide, narrow = graphs._lay_out(batch, size)
    graphs._wide[: len(wide)].copy_(torch.from_numpy(wide))
    graphs._narrow[: len(narrow)].copy_(torch.from_numpy(narrow))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **options: empty(*a, **options).fill_(float("nan")))
    graphs._compute(size, 0)
    monkeypatch.undo()

    torch.testing.assert_close(seen["out"][: batch.num_tokens], expected, rtol=2e-2, atol=CLOSE)
    torch.testing.assert_close(cache[:, :, 1:], plain[:, :, 1:], rtol=2e-2, atol=CLOSE)  # all but the padding block
    assert seen["out"].isfinite().all(), "the padding, too: its keys are written to a block that others read"
    assert torch.equal(seen["ids"][: batch.num_tokens].cpu(), torch.from_numpy(batch.input_ids))
    assert torch.equal(seen["last"][: len(prompts)].cpu(), torch.from_numpy(batch.cu_seqlens[1:] - 1))
    finished = [total == computed + new for total, computed, new in prompts]
    assert seen["rows"].tolist() == [i if done else 6 for i, done in enumerate(finished)] + [6] * (SEQUENCES - len(prompts))
    assert state.position[:6].tolist() == [p[0] - 1 if i < len(prompts) and finished[i] else 0 for i, p in
                                           enumerate(prompts + [(0, 0, 0)] * (6 - len(prompts)))]  # fmt: skip


def test_long_steps_and_decodes_do_not_fit():
    assert not PromptGraphs.fits(make([(150, 0, 150)] * 4)[1])  # 600 tokens
    assert not PromptGraphs.fits(make([(5, 0, 5)] * (SEQUENCES + 1))[1])
    rows, _ = make([(5, 4, 1)])
    assert not PromptGraphs.fits(build_batch(rows, np.arange(1), np.ones(1, np.int32), 1))
