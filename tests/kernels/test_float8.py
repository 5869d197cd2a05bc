"""Caches of float8: what is stored is rounded once, and attention reads just that. The oracle is plain torch over such caches.

Triton's interpreter cuts off where a GPU rounds, so without one keys and values are numbers that float8 has.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from kernel_cases import DEVICE, DTYPE, ON_GPU, attend, cache_of, close, normal, poisoned, rotary, slots_of, unfused
from llmkit_kernels import decode_attention, fixed_attention, prefill_attention, reference, rope_cache

FLOAT8 = torch.float8_e4m3fn
HEADS, KV_HEADS, SIZE = 4, 2, 64
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no float8"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def products(tokens: int, dim: int) -> Tensor:
    """fp32 partial products [2, tokens, (H+2G)·D], whose sums float8 has if nothing else does the rounding."""
    parts = normal(2, tokens, (HEADS + 2 * KV_HEADS) * dim, dtype=torch.float32)
    if not ON_GPU:
        parts[0], parts[1] = reference.kept(parts[0], FLOAT8).float(), 0
    return parts


def same_cache(got: Tensor, want: Tensor) -> None:
    """On a GPU but for numbers so near to the middle between two of float8 that they were rounded to the other one."""
    assert got.dtype == want.dtype == FLOAT8
    close(got.float(), want.float(), 4e-3 if ON_GPU else 0)


def test_what_float8_has_no_number_for_becomes_its_largest() -> None:
    x = torch.tensor([500.0, -1e4, 447.0, 0.3, float("nan"), float("inf"), -float("inf")], device=DEVICE)
    assert reference.kept(x, FLOAT8).float().tolist()[:4] == [448.0, -448.0, 448.0, 0.3125]
    assert reference.kept(x, FLOAT8).float()[4:].isnan().all()
    assert torch.equal(reference.kept(x[:4], torch.float16), x[:4].half())


@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("cut", [(1, 64, 1, 2), (4, 64, 1, 3, True), (2, 128, 1, 3)])
def test_decoding(dim: int, cut: tuple[int, ...]) -> None:
    contexts = [1, 64, 65, 300, 200]
    batch = len(contexts)
    k_cache, v_cache, tables = cache_of(contexts, KV_HEADS, dim, SIZE, FLOAT8)
    parts, norms = products(batch, dim), (normal(dim), normal(dim), 1e-6) if ON_GPU else None
    parts[0, 0, -1], parts[1, 0, -1] = 900, 0  # of a value, and more than float8 has
    positions, rope = torch.tensor(contexts, device=DEVICE) - 1, rotary(300, dim) if ON_GPU else None
    q, k, v = unfused(parts.sum(0), None, norms, rope, positions, HEADS, KV_HEADS, dim)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    want = attend(q, k, v, want_k, want_v, tables, [1] * batch, contexts, dim**-0.5, None)
    scratch = decode_attention.DecodeScratch(batch, HEADS, KV_HEADS, dim, DEVICE, decode_attention.Cut(*cut))
    out = decode_attention.fused_decode(
        parts, None, norms, rope, k_cache, v_cache, tables, positions, None, dim**-0.5, None, scratch,
        poisoned(batch, HEADS * dim),
    )  # fmt: skip
    assert want[0].max() == 448
    close(out.view_as(want)[0], want[0])
    close(out.view_as(want)[1:], want[1:])
    same_cache(k_cache, want_k)
    same_cache(v_cache, want_v)


@pytest.mark.parametrize("fixed", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dim", [32, 128])
def test_prompts(dim: int, fixed: bool) -> None:
    lens, contexts = [3, 130, 1, 64], [3, 150, 90, 64]
    k_cache, v_cache, tables = cache_of(contexts, KV_HEADS, dim, SIZE, FLOAT8)
    parts = products(sum(lens), dim).unflatten(-1, (-1, dim))
    positions = torch.cat([torch.arange(c - n, c) for n, c in zip(lens, contexts)]).to(DEVICE)
    rope, slots = rotary(256, dim) if ON_GPU else None, slots_of(tables, lens, contexts, SIZE)
    q, k, v = unfused(parts.sum(0).flatten(1), None, None, rope, positions, HEADS, KV_HEADS, dim)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    want = attend(q, k, v, want_k, want_v, tables, lens, contexts, dim**-0.5, None)
    got_q = rope_cache.rope_cache(parts, None, rope, positions, slots, k_cache, v_cache, dtype=DTYPE)
    assert got_q.dtype == DTYPE
    close(got_q, q)
    same_cache(k_cache, want_k)
    same_cache(v_cache, want_v)
    cu = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=DEVICE)
    tiles = torch.from_numpy(prefill_attention.query_tiles(np.array(lens))).to(DEVICE).unbind(0)
    run = fixed_attention.prefill if fixed else prefill_attention.prefill
    context = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    by_tma = [prefill_attention.cache_descriptor(c) for c in (k_cache, v_cache)]
    for descriptors in [None] if by_tma[0] is None else [None, tuple(by_tma)]:
        out = poisoned(sum(lens), HEADS, dim)
        run(got_q, k_cache, v_cache, cu, context, tables, tiles, dim**-0.5, None, out, descriptors)
        close(out, want)
    if fixed:
        _decoding_is_no_other(got_q, k_cache, v_cache, tables, positions, cu, want)


def test_float8_does_not_say_what_the_queries_are() -> None:
    parts, where = products(1, 32).unflatten(-1, (-1, 32)), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    k_cache, v_cache, _ = cache_of([1], KV_HEADS, 32, SIZE, FLOAT8)
    with pytest.raises(ValueError, match="give dtype="):
        rope_cache.rope_cache(parts, None, None, where, where, k_cache, v_cache)


def _decoding_is_no_other(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, positions: Tensor, cu: Tensor, want: Tensor
) -> None:
    last = cu[1:].long() - 1
    scratch = fixed_attention.Scratch(len(last), HEADS, KV_HEADS, q.shape[-1], 192, DEVICE)
    out = poisoned(len(last), HEADS * q.shape[-1])
    fixed_attention.decode(q[last], k_cache, v_cache, tables, positions[last], None, q.shape[-1] ** -0.5, None, scratch, out)
    close(out.view_as(want[last]), want[last])
