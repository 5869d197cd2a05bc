"""Back ends that call other people's kernels: what they hand over must mean the same as our reference.

Where the real function needs a GPU, a plain one with its signature stands in, which reads pages by the block table as the real
one's documentation says.
"""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np
import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.attention import flash, varlen
from llmkit.attention.choice import flash_attention, paged_varlen
from llmkit.attention.reference import ReferenceBackend
from llmkit.engine.batch import Batch, build_batch
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.layers.rotary import RotaryEmbedding
from llmkit.models.config import RopeConfig

SIZE, HEADS, KV_HEADS, DIM, MAX_LEN = 4, 4, 2, 8, 64
CPU = torch.device("cpu")


def ragged_attention(q, pages, values, starts, lengths, tables, window, scale) -> torch.Tensor:
    """q [T, H, D]; pages, values [blocks, size, G, D]; starts [S+1]; lengths [S] keys; the last query sees all of them."""
    out = torch.empty(q.shape)
    for s in range(len(starts) - 1):
        mine, n = q[starts[s] : starts[s + 1]], int(lengths[s])
        keys, vals = (x[tables[s].long()].reshape(-1, *x.shape[2:])[:n].repeat_interleave(q.shape[1] // x.shape[2], 1)
                      for x in (pages, values))  # fmt: skip
        scores = torch.einsum("qhd,khd->hqk", mine, keys) * scale
        behind = torch.arange(n - len(mine), n)[:, None] - torch.arange(n)
        left, right = window
        hidden = (behind < -right) | ((behind > left) if left >= 0 else False)
        out[starts[s] : starts[s + 1]] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), vals)
    return out


def torchs(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table):
    """torch.nn.attention.varlen.varlen_attn."""
    assert cu_seq_k is None
    assert enable_gqa
    assert {x.dtype for x in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(seqused_k.max()))
    return ragged_attention(query, key, value, cu_seq_q, seqused_k, block_table, window_size, scale)


def flashs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *, softmax_scale, causal, window_size, block_table):
    """flash_attn.flash_attn_varlen_func."""
    assert causal
    assert {x.dtype for x in (cu_seqlens_q, cu_seqlens_k, block_table)} == {torch.int32}
    lengths = cu_seqlens_k.diff()
    assert (max_q, max_k) == (int(cu_seqlens_q.diff().max()), int(lengths.max()))
    return ragged_attention(q, k, v, cu_seqlens_q, lengths, block_table, window_size, softmax_scale)


@pytest.fixture
def step() -> tuple[Batch, torch.Tensor, RotaryEmbedding, torch.Tensor]:
    """Two sequences that decode, a new prompt and the rest of a cut one, in shuffled blocks; cache and q/k/v are random."""
    generator = torch.Generator().manual_seed(0)
    rows = Rows(4, MAX_LEN, SIZE)
    free = torch.randperm(40, generator=generator).add(1).tolist()
    for total, computed in ((9, 8), (1, 0), (23, 0), (30, 13)):
        row = rows.take(Request("r", np.arange(total, dtype=np.int32), SamplingParams(), max_total=MAX_LEN))
        rows.num_computed[row] = computed
        rows.add_blocks(row, [free.pop() for _ in range(-(-total // SIZE))])
    batch = build_batch(rows, np.arange(4), np.array([1, 1, 23, 17], np.int32), 2)
    cache = torch.randn(1, 2, 41, KV_HEADS, SIZE, DIM, generator=generator)
    rotary = RotaryEmbedding(RopeConfig(1e4, DIM, "default", {}, MAX_LEN), MAX_LEN, torch.float32, CPU)
    return batch, cache, rotary, torch.randn(batch.num_tokens, (HEADS + 2 * KV_HEADS) * DIM, generator=generator)


def layer(window: int | None) -> Any:
    return types.SimpleNamespace(layer=0, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, q_norm=None, k_norm=None,
                                 norms=None, window=window, rotary=True)  # fmt: skip


def prepared(backend: Any, batch: Batch) -> Any:
    return backend.prepare(batch, torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping))


@pytest.mark.parametrize("window", [None, 6])
def test_varlen_attn_gets_what_the_reference_computes(step, window, monkeypatch):
    batch, cache, rotary, qkv = step
    monkeypatch.setattr(varlen, "paged_varlen", lambda: torchs)
    ours, theirs = cache.clone(), cache.clone()
    expected = prepared(ReferenceBackend(ours, rotary, {window}), batch).attend(layer(window), qkv)
    got = prepared(varlen.VarlenBackend(theirs, rotary, {window}), batch).attend(layer(window), qkv)
    torch.testing.assert_close(got, expected)
    assert torch.equal(ours, theirs)  # keys and values are stored at the same places


@pytest.mark.parametrize("window", [None, 6])
def test_flash_attn_gets_what_the_reference_computes(step, window, monkeypatch):
    """Only the prompts' tokens: the others are our kernels' business, and these need a GPU."""
    batch, cache, rotary, qkv = step
    monkeypatch.setattr(flash, "flash_attention", lambda: flashs)
    expected = prepared(ReferenceBackend(cache, rotary, {window}), batch).attend(layer(window), qkv)  # fills the cache
    made = prepared(flash.FlashBackend(cache, rotary, HEADS), batch)
    q = qkv.view(-1, HEADS + 2 * KV_HEADS, DIM)[:, :HEADS]
    rotated = flash_reference_rotate(q, rotary, batch)
    got = torch.empty_like(rotated[2:])
    made._attend_runs(layer(window), rotated[2:], *cache[0].unbind(0), got)
    torch.testing.assert_close(got.reshape(-1, HEADS * DIM), expected[2:])


def flash_reference_rotate(q: torch.Tensor, rotary: RotaryEmbedding, batch: Batch) -> torch.Tensor:
    from llmkit_kernels import reference

    return reference.rotate(q, *rotary.at(torch.from_numpy(batch.positions)))


def test_flash_attn_leaves_a_step_of_decodes_alone(step, monkeypatch):
    _, cache, rotary, _ = step
    monkeypatch.setattr(flash, "flash_attention", lambda: flashs)
    rows = Rows(1, MAX_LEN, SIZE)
    rows.num_computed[rows.take(Request("r", np.arange(9, dtype=np.int32), SamplingParams(), max_total=MAX_LEN))] = 8
    rows.add_blocks(0, [1, 2, 3])
    batch = build_batch(rows, np.arange(1), np.ones(1, np.int32), 1)
    assert type(prepared(flash.FlashBackend(cache, rotary, HEADS), batch)).__name__ == "TritonStep"


def has_flash() -> bool:
    try:
        return flash_attention() is not None
    except ImportError:
        return False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param({"attention_backend": "torch", "block_size": 16}, id="torch, gathered"),
        pytest.param({"attention_backend": "torch"}, id="torch varlen_attn",
                     marks=pytest.mark.skipif(not paged_varlen(), reason="this torch's varlen_attn reads no block tables")),
        pytest.param({"attention_backend": "flash_attn"}, id="flash_attn",
                     marks=pytest.mark.skipif(not has_flash(), reason="flash_attn is not installed")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [None, 48])
def test_on_a_gpu_they_say_what_our_kernels_say(tmp_path, backend, window):
    import json

    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 5000, "max_position_embeddings": 4096,
              "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
              "use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = [torch.randint(5000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 130, 300, 1, 700)]
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    answers = {}
    for name, options in {"ours": {"attention_backend": "triton"}, "theirs": backend}.items():
        common = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 1024, "gpu_memory_utilization": 0.3}
        with LLM(tmp_path, long_prefill_token_threshold=200, **common, **options) as llm:
            answers[name] = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy, use_tqdm=False)]
            assert options["attention_backend"] in llm.startup_report().facts["attention"]
    same = sum(a == b for x, y in zip(answers["ours"], answers["theirs"]) for a, b in zip(x, y))
    assert same >= 0.75 * 16 * len(prompts)  # in bfloat16 two nearly tied tokens may change places
    assert [a[0] for a in answers["ours"]] == [a[0] for a in answers["theirs"]]
