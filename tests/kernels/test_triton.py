"""Each Triton kernel against its plain-torch meaning: on a GPU in bf16, without one in Triton's interpreter in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

import triton
import triton.language as tl
from kernel_cases import DEVICE, DTYPE, attend, cache_of, close, normal, poisoned, rotary, slots_of, unfused
from llmkit_kernels import (
    activation,
    band_gemm,
    decode_attention,
    gemm,
    norm,
    prefill_attention,
    reference,
    rope_cache,
    sampling,
    wide_gemm,
)
from llmkit_kernels.launch import in_float16
from llmkit_kernels.prepared import PreparedWeight
from llmkit_kernels.soft_cap import log2_scores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("rows", "width", "splits"), [(1, 64, 1), (3, 100, 2), (5, 576, 4)])
def test_add_rms_norm_sums_partials_and_updates_the_residual(rows: int, width: int, splits: int) -> None:
    parts, residual, weight = normal(splits, rows, width, dtype=torch.float32), normal(rows, width), normal(width)
    want_residual = parts.sum(0).to(DTYPE) + residual
    want = reference.rms_norm(want_residual, weight, 1e-5)
    got = norm.add_rms_norm(parts, residual, weight, 1e-5, out=poisoned(rows, width))
    close(residual, want_residual)
    close(got, want)
    close(norm.add_rms_norm(residual, None, weight, 1e-5), reference.rms_norm(residual, weight, 1e-5))


@pytest.mark.parametrize("rows", [None, [4, 0, 0, 2]])
def test_embed_rms_norm(rows: list[int] | None) -> None:
    table, tokens, weight = normal(50, 96), torch.tensor([3, 0, 49, 7, 7], device=DEVICE), normal(96)
    index = None if rows is None else torch.tensor(rows, device=DEVICE)
    residual, out = norm.embed_rms_norm(table, tokens, index, weight, 1e-5)
    want = table[tokens if index is None else tokens[index]]
    assert torch.equal(residual, want)
    close(out, reference.rms_norm(want, weight, 1e-5))


@pytest.mark.parametrize("m", [1, 3, 16, 33, 70, 128, 150, 300])
@pytest.mark.parametrize(
    ("n", "k", "tile"),
    [(128, 256, gemm.Tile(64, 64, 4, 3, 2)), (96, 192, None), (200, 96, gemm.Tile(64, 32, 4, 2, 3)), (128, 1024, None)],
)
def test_partial_products_add_up(m: int, n: int, k: int, tile: gemm.Tile | None) -> None:
    x, w = normal(m, k), normal(n, k, scale=k**-0.5)
    tile = tile or gemm.plan(n, k, m)
    got = gemm.partial_products(x, PreparedWeight(w), poisoned(tile.splits, m, n, dtype=torch.float32), tile)
    close(got.sum(0), x.double() @ w.double().T)


@pytest.mark.parametrize("m", [1, 5, 17, 90, 128, 200, 257])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (160, 64), (128, 1024)])
def test_gate_up_silu(m: int, n: int, k: int) -> None:
    x, w = normal(m, k), normal(n, k, scale=k**-0.5)
    gate, up = (x.double() @ w.double().T).unflatten(1, (-1, 2)).unbind(2)
    close(gemm.gate_up_silu(x, PreparedWeight(w), poisoned(m, n // 2)), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("tile", [wide_gemm.WideTile(64, 128, 64, 4, 3), wide_gemm.WideTile(128, 64, 32, 4, 2)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 2, 1), (130, 256, 128), (600, 96, 200), (64, 2000, 96)])
def test_gate_up_silu_of_many(m: int, n: int, k: int, tile: wide_gemm.WideTile) -> None:
    x, w = normal(m, k), normal(n, k, scale=k**-0.5)
    gate, up = (x.double() @ w.double().T).unflatten(1, (-1, 2)).unbind(2)
    close(wide_gemm.gate_up_silu(x, PreparedWeight(w), tile, poisoned(m, n // 2)), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("band", [band_gemm.Band(64, 64, 16, 64, 4, 3), band_gemm.Band(64, 64, 0, 32, 4, 2, 3)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 2, 1), (40, 160, 128), (64, 192, 200), (130, 100, 96)])
def test_bands(m: int, n: int, k: int, band: band_gemm.Band) -> None:
    x, w = normal(m, k), normal(n, k, scale=k**-0.5)
    want = x.double() @ w.double().T
    parts = band_gemm.partial_products(x, PreparedWeight(w), band, poisoned(band.splits, m, n, dtype=torch.float32))
    close(parts.sum(0), want)
    if band.splits == 1:
        gate, up = want.unflatten(1, (-1, 2)).unbind(2)
        got = band_gemm.gate_up_silu(x, PreparedWeight(w), band, poisoned(m, n // 2))
        close(got, torch.nn.functional.silu(gate) * up)


def test_a_planned_band_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(band_gemm, "is_hopper", lambda: True)
    monkeypatch.setattr(band_gemm, "num_sms", lambda: 64)
    taken: list[band_gemm.Band] = []
    launch = band_gemm._launch
    monkeypatch.setattr(band_gemm, "_launch", lambda *args, **kw: (taken.append(args[3]), launch(*args, **kw))[1])
    m, n, k = 33, 16384, 64
    x, w = normal(m, k), normal(n, k, scale=k**-0.5)
    gate, up = (x.double() @ w.double().T).unflatten(1, (-1, 2)).unbind(2)
    close(gemm.gate_up_silu(x, PreparedWeight(w)), torch.nn.functional.silu(gate) * up)
    m, n, k = 17, 2304, 4096
    x, w = normal(m, k), normal(n, k, scale=k**-0.5)
    close(gemm.partial_products(x, PreparedWeight(w)).sum(0), x.double() @ w.double().T)
    assert [(band.rows, band.splits) for band in taken] == [(256, 1), (144, 4)]


@pytest.mark.parametrize("m", [1, 2, 20, 65, 128, 129])
def test_logits(m: int) -> None:
    x, w = normal(m, 128), normal(1000, 128, scale=0.1)
    close(gemm.logits(x, PreparedWeight(w), poisoned(m, 1000, dtype=torch.float32)), x.double() @ w.double().T)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(4, 2, 32, 16), (7, 1, 64, 64), (2, 2, 32, 32)])
@pytest.mark.parametrize("cut", [(1, 64, 1, 2), (4, 64, 1, 3), (2, 64, 4, 2), (3, 64, 2, 2), (8, 64, 1, 3, True)])
@pytest.mark.parametrize("options", ["plain", "bias", "norm", "window", "no rotary", "rows"])
def test_fused_decode(heads: int, kv_heads: int, dim: int, size: int, cut: tuple[int, ...], options: str) -> None:
    """Some sequences have fewer tiles of keys than there may be parts."""
    contexts = [1, 5, 64, 65, 200, 600, 300]
    batch, width = len(contexts), (heads + 2 * kv_heads) * dim
    k_cache, v_cache, tables = cache_of(contexts, kv_heads, dim, size)
    parts = normal(2, batch, width, dtype=torch.float32)
    bias = normal(width) if options == "bias" else None
    norms = (normal(dim), normal(dim), 1e-6) if options == "norm" else None
    tables_rope = None if options == "no rotary" else rotary(600, dim)
    window = 270 if options == "window" else None
    positions = torch.tensor(contexts, device=DEVICE) - 1
    q, k, v = unfused(parts.sum(0), bias, norms, tables_rope, positions, heads, kv_heads, dim)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    want = attend(q, k, v, want_k, want_v, tables, [1] * batch, contexts, dim**-0.5, window)
    rows = None
    if options == "rows":  # sequence i has row rows[i] of larger tables
        rows = torch.randperm(batch + 3, device=DEVICE)[:batch]
        positions = torch.full((batch + 3,), 7, device=DEVICE).index_copy(0, rows, positions)
        tables = torch.zeros(batch + 3, tables.shape[1], dtype=torch.int32, device=DEVICE).index_copy(0, rows, tables)
    scratch = decode_attention.DecodeScratch(batch, heads, kv_heads, dim, DEVICE, decode_attention.Cut(*cut))
    for _ in range(2):  # the second run finds the arrival counters reset, and the same keys
        out = decode_attention.fused_decode(
            parts, bias, norms, tables_rope, k_cache, v_cache, tables, positions, rows, dim**-0.5, window, scratch,
            poisoned(batch, heads * dim),
        )  # fmt: skip
        close(out.view_as(want), want)
    close(k_cache, want_k)
    close(v_cache, want_v)
    assert not scratch.arrivals.any()


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16])
def test_every_batch_has_a_cut_whose_parts_the_kernel_adds_up(kv_heads: int, itemsize: int) -> None:
    cuts = [decode_attention.plan_decode(batch, kv_heads, itemsize) for batch in range(1, 1025)]
    assert {c.splits for c in cuts} <= {1, 2, 3, 4, 8, 16}, "of others there is no power of two to pad them to"
    assert all(c.least >= 1 for c in cuts)
    assert cuts[-1].splits == 1, "many sequences are enough programs as they are"


def test_padding_writes_nothing_into_the_block_that_others_read() -> None:
    """Whatever it computes, even NaN: masked, a NaN is still a NaN."""
    heads, kv_heads, dim, size, batch = 4, 2, 32, 16, 3
    k_cache, v_cache, _ = cache_of([20], kv_heads, dim, size)
    before = k_cache.clone(), v_cache.clone()
    qkv, where = poisoned(batch, (heads + 2 * kv_heads) * dim), torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    scratch = decode_attention.DecodeScratch(batch, heads, kv_heads, dim, DEVICE)
    tables = torch.zeros(batch, 2, dtype=torch.int32, device=DEVICE)
    out = poisoned(batch, heads * dim)
    decode_attention.fused_decode(qkv, None, None, rotary(8, dim), k_cache, v_cache, tables, where, None, dim**-0.5, None,
                                  scratch, out)  # fmt: skip
    assert out.isnan().all(), "nothing is computed for it"
    rope_cache.rope_cache(qkv.view(batch, -1, dim), None, rotary(8, dim), where, where + 5, k_cache, v_cache)
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("alone", [True, False], ids=["decode", "prompt"])
def test_a_value_that_broke_is_kept_as_zero_and_its_key_as_nan(broken: float, alone: bool) -> None:
    """Nothing then reaches through a mask, and whoever attends to it is told. Other tokens are as they were."""
    heads, kv_heads, dim, size = 4, 2, 32, 16
    k_cache, v_cache, tables = cache_of([20, 9], kv_heads, dim, size)
    where = torch.tensor([19, 8], device=DEVICE)
    slots = slots_of(tables, [1, 1], [20, 9], size)
    qkv = normal(2, heads + 2 * kv_heads, dim)
    want = [c.clone() for c in (k_cache, v_cache)]
    rope_cache.rope_cache(qkv.clone(), None, rotary(32, dim), where, slots, *want)
    qkv[0, heads + kv_heads + 1, 7] = broken  # of the second key head
    if alone:
        scratch = decode_attention.DecodeScratch(2, heads, kv_heads, dim, DEVICE)
        out = poisoned(2, heads * dim)
        decode_attention.fused_decode(qkv.view(2, -1), None, None, rotary(32, dim), k_cache, v_cache, tables, where, None,
                                      dim**-0.5, None, scratch, out)  # fmt: skip
        assert not out[0].isfinite().all()
        assert out[1].isfinite().all()
    else:
        rope_cache.rope_cache(qkv, None, rotary(32, dim), where, slots, k_cache, v_cache)
    block, place = int(slots[0]) // size, int(slots[0]) % size
    assert k_cache[block, 1, place].isnan().all()
    assert v_cache[block, 1, place, 7] == 0
    for cache, other in zip((k_cache, v_cache), want):
        cache[block, :, place], other[block, :, place] = 0, 0
        close(cache, other)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(4, 2, 32, 16), (3, 1, 64, 64)])
@pytest.mark.parametrize("options", ["plain", "norm", "window"])
def test_prefill_of_ragged_chunks(heads: int, kv_heads: int, dim: int, size: int, options: str) -> None:
    lens, contexts = [3, 130, 1, 64], [3, 150, 90, 64]
    k_cache, v_cache, tables = cache_of(contexts, kv_heads, dim, size)
    qkv = normal(sum(lens), (heads + 2 * kv_heads) * dim)
    norms = (normal(dim), normal(dim), 1e-6) if options == "norm" else None
    window = 40 if options == "window" else None
    positions = torch.cat([torch.arange(c - n, c) for n, c in zip(lens, contexts)]).to(DEVICE)
    rope = rotary(256, dim)
    q, k, v = unfused(qkv, None, norms, rope, positions, heads, kv_heads, dim)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    want = attend(q, k, v, want_k, want_v, tables, lens, contexts, dim**-0.5, window)
    slots = slots_of(tables, lens, contexts, size)
    got_q = rope_cache.rope_cache(qkv.view(sum(lens), -1, dim), norms, rope, positions, slots, k_cache, v_cache)
    close(got_q, q)
    close(k_cache, want_k)
    close(v_cache, want_v)
    cu = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=DEVICE)
    tiles = torch.from_numpy(prefill_attention.query_tiles(np.array(lens))).to(DEVICE).unbind(0)
    context = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    by_tma = [prefill_attention.cache_descriptor(c) for c in (k_cache, v_cache)]
    for descriptors in [None] if by_tma[0] is None else [None, tuple(by_tma)]:
        out = poisoned(sum(lens), heads, dim)
        prefill_attention.prefill(got_q, k_cache, v_cache, cu, context, tables, tiles, dim**-0.5, window, out, descriptors)
        close(out, want)


@pytest.mark.parametrize("vocab", [100, 5000])
def test_sample_is_greedy_at_zero_and_draws_the_softmax_else(vocab: int) -> None:
    batch, rows = 3, torch.tensor([4, 0, 2], device=DEVICE)
    logits = normal(batch, vocab, scale=3.0, dtype=torch.float32)
    temperatures = torch.zeros(5, device=DEVICE)
    seeds, counters, last = (torch.zeros(5, dtype=torch.int64, device=DEVICE) for _ in range(3))
    scratch, out = sampling.SampleScratch(batch, vocab, DEVICE), torch.full((batch,), -7, device=DEVICE)
    sampling.sample(logits, rows, temperatures, seeds, counters, last, out, scratch, 4)
    assert torch.equal(out, logits.argmax(1))
    assert torch.equal(last[rows[1:]], out[1:])
    assert counters.tolist() == [1, 0, 1, 0, 0]  # row 4 is padding
    assert last[4] == 0


def test_gumbel_noise_is_gumbel_noise() -> None:
    """Against its own distribution function exp(-exp(-x)), the tail that wins large vocabularies included."""
    entries = 4096
    logits, zero = torch.zeros(256, entries, device=DEVICE), torch.zeros(256, dtype=torch.int64, device=DEVICE)
    rows, seeds = torch.arange(256, device=DEVICE), torch.arange(256, device=DEVICE) * 11
    scratch = sampling.SampleScratch(256, entries, DEVICE)
    sampling.sample(logits, rows, torch.ones(256, device=DEVICE), seeds, zero.clone(), zero.clone(), rows.clone(), scratch, 256)
    best = scratch.best.flatten().double().sort().values  # the highest of 4096 draws: exp(-4096 exp(-x))
    cumulative = torch.exp(-entries * torch.exp(-best))
    steps = torch.arange(1, 257, device=DEVICE) / 256
    assert (cumulative - steps).abs().max() < 1.95 / 256**0.5  # Kolmogorov-Smirnov at 0.001


def test_sample_says_when_nothing_can_be_chosen() -> None:
    logits = torch.full((1, 10), float("nan"), device=DEVICE)
    zero, last = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.full((1,), 9, device=DEVICE)
    warm, scratch = torch.ones(1, device=DEVICE), sampling.SampleScratch(1, 10, DEVICE)
    out = sampling.sample(logits, zero, warm, zero, zero.clone(), last, zero.clone(), scratch, 1)
    assert (out.item(), last.item()) == (-1, 0)


def test_sampled_frequencies_fit_and_repeat() -> None:
    draws, probabilities = 200, torch.tensor([0.5, 0.3, 0.15, 0.05], device=DEVICE)
    logits = probabilities.log().repeat(draws, 1)
    rows = torch.arange(draws, device=DEVICE)
    seeds = torch.arange(draws, device=DEVICE) * 7 + 3
    outs = []
    for _ in range(2):
        counters, last = torch.zeros_like(rows), torch.zeros_like(rows)
        warm, scratch = torch.ones(draws, device=DEVICE), sampling.SampleScratch(draws, 4, DEVICE)
        outs.append(sampling.sample(logits, rows, warm, seeds, counters, last, rows.clone(), scratch, draws))
    assert torch.equal(*outs)
    expected = probabilities.cpu() * draws
    chi2 = ((torch.bincount(outs[0].cpu(), minlength=4) - expected) ** 2 / expected).sum()
    assert chi2 < 16.27  # 0.999 quantile of chi-square with 3 degrees of freedom


@pytest.mark.parametrize("width", [64, 1500])
def test_silu_mul_pairs(width: int) -> None:
    x = normal(3, 2 * width)
    gate, up = x.double().unflatten(1, (-1, 2)).unbind(2)
    close(activation.silu_mul_pairs(x), torch.nn.functional.silu(gate) * up)


@triton.jit
def _halves(x, out):
    places = tl.arange(0, 8)
    tl.store(out + places, in_float16(tl.load(x + places)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_beyond_float16_becomes_its_largest(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -1.5, 65280.0, 65536.0, -1e30, inf, -inf, nan], device=DEVICE, dtype=dtype)
    want = torch.tensor([0.0, -1.5, 65280.0, 65504.0, -65504.0, nan, nan, nan], device=DEVICE)
    _halves[(1,)](x, out := poisoned(8, dtype=torch.float16))  # type: ignore[arg-type]
    torch.testing.assert_close(out.float(), want, equal_nan=True)


@triton.jit
def _scores(products, out, CAP: tl.constexpr):
    places = tl.arange(0, 8)
    tl.store(out + places, log2_scores(tl.load(products + places), 0.5, CAP))


@pytest.mark.parametrize("cap", [0.0, 1.0, 50.0])
def test_soft_cap_is_tanh_of_any_number(cap: float) -> None:
    inf, nan = float("inf"), float("nan")
    products = torch.tensor([0.0, 1e-3, -1.0, 7.0, -300.0, 1e30, -inf, nan], device=DEVICE)
    scores = products.double() * 0.5
    want = (cap * torch.tanh(scores / cap) if cap else scores) / np.log(2)
    _scores[(1,)](products, out := poisoned(8, dtype=torch.float32), CAP=cap)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=1e-5, equal_nan=True)
