"""Attention over the paged KV cache: one query per sequence (decode), and runs of prompt tokens (prefill).

Shapes as in reference.py: caches [num_blocks, G, block_size, D]; a block table row names a sequence's blocks. Both are
online-softmax kernels (FlashAttention, arXiv:2205.14135) over tiles of keys that are found through the block table
(PagedAttention, arXiv:2309.06180). Query heads that share a key head are rows of one tile, so a key is read once for all of
them.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, cdiv, next_power_of_2, num_sms, pdl

TILE = 64  # keys at a time
QUERY_TILE = 128  # prefill queries at a time
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sum_partials(base, offsets, mask, stride, SPLITS: tl.constexpr):
    total = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(base + split * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _head_pair(
    qkv, bias, norm, cos, sin, first, rows, halves, mask, stride, eps, D: tl.constexpr,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows of heads from the qkv product, finished: summed, biased, normed, rotated. Returns the two halves [rows, D/2] fp32,
    rounded to DTYPE after each step as the unfused layers round."""
    low = first + rows[:, None] * D + halves[None, :]
    a = _sum_partials(qkv, low, mask[:, None], stride, SPLITS)
    b = _sum_partials(qkv, low + D // 2, mask[:, None], stride, SPLITS)
    if BIAS:
        column = rows[:, None] * D + halves[None, :]
        a += tl.load(bias + column, mask=mask[:, None], other=0.0).to(tl.float32)
        b += tl.load(bias + column + D // 2, mask=mask[:, None], other=0.0).to(tl.float32)
    a, b = a.to(DTYPE).to(tl.float32), b.to(DTYPE).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        a = (a * scale * tl.load(norm + halves).to(tl.float32)[None, :]).to(DTYPE).to(tl.float32)
        b = (b * scale * tl.load(norm + D // 2 + halves).to(tl.float32)[None, :]).to(DTYPE).to(tl.float32)
    if ROTARY:
        c, s = cos[None, :], sin[None, :]
        a, b = a * c - b * s, b * c + a * s
    return a.to(DTYPE), b.to(DTYPE)


@triton.jit(do_not_specialize=["M", "stride", "table_stride"])
def _decode(
    qkv, bias, q_norm, k_norm, cos_table, sin_table, k_cache, v_cache, block_tables, positions, out,
    part_out, part_max, part_sum, arrivals,
    M, table_stride, stride, scale, eps, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    IN_SPLITS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, WINDOW: tl.constexpr,
    KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    DTYPE: tl.constexpr = k_cache.dtype.element_ty
    SHARE: tl.constexpr = H // G
    rows, halves, dims, keys = tl.arange(0, ROWS), tl.arange(0, D // 2), tl.arange(0, D), tl.arange(0, KEYS)
    mine = rows < SHARE
    position = tl.load(positions + b)
    cos = tl.load(cos_table + position * D + halves).to(tl.float32)
    sin = tl.load(sin_table + position * D + D // 2 + halves).to(tl.float32)  # the second half of the table is not negated
    begin(PDL)
    token = b.to(tl.int64) * (H + 2 * G) * D
    qa, qb = _head_pair(
        qkv, bias + g * SHARE * D, q_norm, cos, sin, token + g * SHARE * D, rows, halves, mine, stride, eps, D,
        IN_SPLITS, BIAS, NORM, ROTARY, DTYPE)  # fmt: skip

    start = 0
    if WINDOW:
        start = tl.maximum(0, position + 1 - window)
    first_tile = start // KEYS
    tiles = tl.cdiv(position + 1, KEYS) - first_tile
    per_split = tl.cdiv(tiles, SPLITS)
    lo = (first_tile + split * per_split) * KEYS
    hi = tl.minimum(lo + per_split * KEYS, position)  # cached keys; the new one is taken from registers
    high = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for tile in range(lo, hi, KEYS):
        key = tile + keys
        seen = key < hi
        if WINDOW:
            seen = seen & (key >= start)
        block = tl.load(block_tables + b * table_stride + key // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        row = ((block * G + g) * BLOCK_SIZE + key % BLOCK_SIZE) * D
        ka = tl.load(k_cache + row[:, None] + halves[None, :])
        kb = tl.load(k_cache + row[:, None] + D // 2 + halves[None, :])
        scores = tl.dot(qa, tl.trans(ka))
        scores = tl.dot(qb, tl.trans(kb), scores) * (scale * _LOG2E)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_high = tl.maximum(high, tl.max(scores, axis=1))
        safe = tl.where(new_high == -float("inf"), 0.0, new_high)
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(high - safe)
        v = tl.load(v_cache + row[:, None] + dims[None, :])
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(DTYPE), v, acc)
        total = total * fade + tl.sum(weights, axis=1)
        high = new_high

    if (lo <= position) & (position < lo + per_split * KEYS):
        one = tl.arange(0, 1)
        only = one == 0
        k_first = token + (H + g) * D
        ka1, kb1 = _head_pair(
            qkv, bias + (H + g) * D, k_norm, cos, sin, k_first, one, halves, only, stride, eps, D,
            IN_SPLITS, BIAS, NORM, ROTARY, DTYPE)  # fmt: skip
        v1 = _sum_partials(qkv, token + (H + G + g) * D + dims, dims < D, stride, IN_SPLITS)
        if BIAS:
            v1 += tl.load(bias + (H + G + g) * D + dims).to(tl.float32)
        v1 = v1.to(DTYPE)
        block = tl.load(block_tables + b * table_stride + position // BLOCK_SIZE).to(tl.int64)
        row = ((block * G + g) * BLOCK_SIZE + position % BLOCK_SIZE) * D
        tl.store(k_cache + row + halves[None, :], ka1)
        tl.store(k_cache + row + D // 2 + halves[None, :], kb1)
        tl.store(v_cache + row + dims, v1)
        score = tl.sum(qa.to(tl.float32) * ka1.to(tl.float32), axis=1) + tl.sum(qb.to(tl.float32) * kb1.to(tl.float32), axis=1)
        score = score * (scale * _LOG2E)
        new_high = tl.maximum(high, score)
        weight, fade = tl.exp2(score - new_high), tl.exp2(high - new_high)
        acc = acc * fade[:, None] + weight[:, None] * v1.to(tl.float32)[None, :]
        total = total * fade + weight
        high = new_high

    head = b * H + g * SHARE + rows
    if SPLITS == 1:
        tl.store(out + head[:, None] * D + dims[None, :], acc / total[:, None], mask=mine[:, None])
    else:
        place = (head * SPLITS + split).to(tl.int64)
        tl.store(part_out + place[:, None] * D + dims[None, :], acc, mask=mine[:, None])
        tl.store(part_max + place, high, mask=mine)
        tl.store(part_sum + place, total, mask=mine)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + b * G + g, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            tl.store(arrivals + b * G + g, 0)
            _combine(part_out, part_max, part_sum, out, head, dims, mine, D, SPLITS, ROWS)


@triton.jit
def _combine(part_out, part_max, part_sum, out, head, dims, mine, D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """The last split to arrive adds all of them up, always in the same order."""
    splits = tl.arange(0, SPLITS)
    at = head[:, None].to(tl.int64) * SPLITS + splits[None, :]
    highs = tl.load(part_max + at, mask=mine[:, None], other=0.0, cache_modifier=".cg")
    sums = tl.load(part_sum + at, mask=mine[:, None], other=1.0, cache_modifier=".cg")
    high = tl.max(highs, axis=1)
    total = tl.sum(sums * tl.exp2(highs - high[:, None]), axis=1)
    acc = tl.zeros([ROWS, D], tl.float32)
    for split in range(SPLITS):
        place = head.to(tl.int64) * SPLITS + split
        fade = tl.exp2(tl.load(part_max + place, mask=mine, other=0.0, cache_modifier=".cg") - high)
        part = tl.load(part_out + place[:, None] * D + dims[None, :], mask=mine[:, None], other=0.0, cache_modifier=".cg")
        acc += part * fade[:, None]
    tl.store(out + head[:, None] * D + dims[None, :], acc / total[:, None], mask=mine[:, None])


def decode_splits(batch: int, kv_heads: int) -> int:
    """Programs along one sequence's keys. Fixed by the batch size alone, so that results repeat: enough to fill the GPU."""
    return max(1, min(32, next_power_of_2(cdiv(3 * num_sms(), batch * kv_heads)) // 2))


class DecodeScratch:
    """Where splits leave their partial results: fp32 [batch·H·splits, D] and its maxima and sums; `arrivals` resets itself."""

    def __init__(self, batch: int, heads: int, kv_heads: int, dim: int, splits: int, device: torch.device) -> None:
        self.splits = splits
        self.out = torch.empty(batch * heads * splits, dim, dtype=torch.float32, device=device)
        self.high, self.total = torch.empty(2, batch * heads * splits, dtype=torch.float32, device=device).unbind(0)
        self.arrivals = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)


def fused_decode(
    qkv: Tensor,
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor, float] | None,
    tables: tuple[Tensor, Tensor] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    scratch: DecodeScratch,
    out: Tensor,
) -> Tensor:
    """All of attention for one new token a sequence, between the qkv product and the output product, in one kernel.

    qkv: fp32 partial products [S, M, (H+2G)·D], or [M, (H+2G)·D]. bias: [(H+2G)·D]. norms: q and k norm weights [D], eps.
    tables: cos and sin [positions, D], sin's first half negated as in `RotaryEmbedding`; None: no rotation. block_tables: int32
    [M, blocks]. positions: int64 [M], where the new token stands; its key and value are written to the cache here.
    out: [M, H·D]. Reference: sum, add, `rms_norm`, `rotate`, `write_kv`, `paged_attention`.
    """
    in_splits = qkv.shape[0] if qkv.dim() == 3 else 1
    rows = qkv.shape[-2]
    kv_heads, size, dim = k_cache.shape[1:]
    heads = qkv.shape[-1] // dim - 2 * kv_heads
    cos, sin = tables or (qkv, qkv)
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    _decode[(rows, kv_heads, scratch.splits)](
        qkv, bias if bias is not None else qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, block_tables, positions, out,
        scratch.out, scratch.high, scratch.total, scratch.arrivals,
        rows, block_tables.stride(0), rows * qkv.shape[-1], scale, eps, window or 0,
        H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, ROWS=max(16, next_power_of_2(heads // kv_heads)), SPLITS=scratch.splits,
        IN_SPLITS=in_splits, BIAS=bias is not None, NORM=norms is not None, ROTARY=tables is not None, WINDOW=window is not None,
        KEYS=TILE, num_warps=4, num_stages=3, **pdl(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q, k_cache, v_cache, out, block_tables, cu_seqlens, context_lens, tile_sequence, tile_start, q_stride,
    table_stride, scale, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    g = head // (H // G)
    s = tl.load(tile_sequence + tile)
    first = tl.load(tile_start + tile)  # this tile's first query within its sequence's run
    begin_token, end_token = tl.load(cu_seqlens + s), tl.load(cu_seqlens + s + 1)
    context = tl.load(context_lens + s)
    done = context - (end_token - begin_token).to(tl.int32)
    rows, dims, keys = tl.arange(0, QUERIES), tl.arange(0, D), tl.arange(0, KEYS)
    token = begin_token + first + rows
    live = token < end_token
    position = done + first + rows
    query = tl.load(q + token[:, None].to(tl.int64) * q_stride + head * D + dims[None, :], mask=live[:, None], other=0.0)
    last = tl.minimum(context, done + first + QUERIES)
    begin_key = 0
    if WINDOW:
        begin_key = tl.maximum(0, done + first + 1 - window) // KEYS * KEYS
    full_end = (done + first) // KEYS * KEYS  # tiles before this lie wholly in every query's past
    high = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    table = block_tables + s * table_stride
    for at in range(begin_key, full_end, KEYS):
        key = at + keys
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
        row = ((block * G + g) * BLOCK_SIZE + key % BLOCK_SIZE) * D
        k = tl.load(k_cache + row[None, :] + dims[:, None])
        scores = tl.dot(query, k) * (scale * _LOG2E)
        if WINDOW:
            scores = tl.where(key[None, :] > position[:, None] - window, scores, -float("inf"))
        acc, total, high = _online(acc, total, high, scores, v_cache, row, dims)
    for at in range(full_end, last, KEYS):
        key = at + keys
        inside = key < context
        block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        row = ((block * G + g) * BLOCK_SIZE + key % BLOCK_SIZE) * D
        k = tl.load(k_cache + row[None, :] + dims[:, None])
        scores = tl.dot(query, k) * (scale * _LOG2E)
        seen = (key[None, :] <= position[:, None]) & inside[None, :]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        acc, total, high = _online(acc, total, high, scores, v_cache, row, dims)
    value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + token[:, None].to(tl.int64) * (H * D) + head * D + dims[None, :], value, mask=live[:, None])


@triton.jit
def _online(acc, total, high, scores, v_cache, row, dims):
    """One tile of the online softmax."""
    new_high = tl.maximum(high, tl.max(scores, axis=1))
    safe = tl.where(new_high == -float("inf"), 0.0, new_high)
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(high - safe)
    v = tl.load(v_cache + row[:, None] + dims[None, :])
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
    return acc, total * fade + tl.sum(weights, axis=1), new_high


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    tiles: tuple[Tensor, Tensor],
    scale: float,
    window: int | None,
) -> Tensor:
    """Runs of new tokens over their sequences' cached keys, their own among them (`write_kv` comes first).

    q: [T, H, D], rows of any stride. cu_seqlens: int32 [S+1]. context_lens: int32 [S]. block_tables: int32 [S, blocks].
    tiles: int32 (sequence, first query) of each tile of `QUERY_TILE` queries, from `query_tiles`. Returns [T, H, D].
    Reference: `reference.paged_attention`.
    """
    tokens, heads, dim = q.shape
    kv_heads, size = k_cache.shape[1:3]
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    _prefill[(heads, tiles[0].shape[0])](
        q, k_cache, v_cache, out, block_tables, cu_seqlens, context_lens, tiles[0], tiles[1], q.stride(0),
        block_tables.stride(0), scale, window or 0, H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, QUERIES=QUERY_TILE, KEYS=TILE,
        WINDOW=window is not None, num_warps=4 if dim <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return out



def query_tiles(query_lens: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tiles of at most QUERY_TILE queries over runs of `query_lens` int [S] tokens: int32 (sequence, first query) of each,
    longest runs' last tiles (the ones with most keys) not held back to the end."""
    counts = -(-query_lens // QUERY_TILE)
    sequence = np.repeat(np.arange(len(query_lens)), counts)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * QUERY_TILE
    order = np.argsort(-first, kind="stable")
    both = torch.from_numpy(np.stack((sequence[order], first[order])).astype(np.int32)).to(device)
    return both[0], both[1]
