"""Attention for one new token a sequence: everything between the qkv product and the output product, in one kernel.

Shapes as in reference.py: caches [num_blocks, G, block_size, D]; a block table row names a sequence's blocks. An online softmax
(FlashAttention, arXiv:2205.14135) over tiles of keys that are found through the block table (PagedAttention, arXiv:2309.06180).
Query heads that share a key head are rows of one tile, so a key is read once for all of them. A sequence's keys are cut into
parts, so that few sequences fill the GPU (Flash-Decoding); whoever finishes the last part of a head adds them up, always in the
same order. Programs start in the order of the batch: with the longest sequences first, none keeps the GPU waiting at the end.
Caches may be float8, half the bytes; what is read from them is multiplied in float16, by queries of bfloat16, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import cdiv, finite, in_float16, kept, next_power_of_2, num_sms, pdl, shared_memory
from llmkit_kernels.soft_cap import log2_scores

_GROUP = tl.constexpr(4)  # partial results that are read at once
_BESIDE = 16 << 10  # bytes that a program shares besides tiles of keys and values


@triton.jit
def _sum_partials(base, offsets, mask, stride, SPLITS: tl.constexpr):
    total = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(base + split * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _load_pair(qkv, bias, first, rows, halves, mask, stride, D: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr):
    """Rows of heads from the qkv product, summed and biased: their two halves [rows, D/2] fp32."""
    column = rows[:, None] * D + halves[None, :]
    a = _sum_partials(qkv + first, column, mask[:, None], stride, SPLITS)
    b = _sum_partials(qkv + first, column + D // 2, mask[:, None], stride, SPLITS)
    if BIAS:
        a += tl.load(bias + column, mask=mask[:, None], other=0.0).to(tl.float32)
        b += tl.load(bias + column + D // 2, mask=mask[:, None], other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _finish_pair(
    a, b, low, high, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The halves normed, by weights low and high [D/2], and rotated; rounded to DTYPE after each step as the unfused layers
    round."""
    a, b = a.to(DTYPE).to(tl.float32), b.to(DTYPE).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        a = (a * scale * low.to(tl.float32)[None, :]).to(DTYPE).to(tl.float32)
        b = (b * scale * high.to(tl.float32)[None, :]).to(DTYPE).to(tl.float32)
    if ROTARY:
        c, s = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
        a, b = a * c - b * s, b * c + a * s
    return a.to(DTYPE), b.to(DTYPE)


@triton.jit
def _prefetch(pointers):
    """Have these addresses' lines brought to the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _cut(position, window, splits, least, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """How the keys 0..position are cut: (first key seen, first tile, tiles of a part, number of parts)."""
    start = position * 0
    if WINDOW:
        start = tl.maximum(start, position + 1 - window)
    first_tile = start // KEYS
    tiles = tl.cdiv(position + 1, KEYS) - first_tile
    per_part = tl.maximum(tl.cdiv(tiles, splits), least)
    return start, first_tile, per_part, tl.cdiv(tiles, per_part)


@triton.jit(do_not_specialize=["stride", "table_stride", "least"])
def _decode(
    qkv, bias, q_norm, k_norm, cos_table, sin_table, k_cache, v_cache, block_tables, positions, rows_of, out,
    part_out, part_max, part_sum, arrivals,
    table_stride, stride, scale, eps, window, least,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    IN_SPLITS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, WINDOW: tl.constexpr,
    INDEXED: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr, CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    g, slot = tl.program_id(0) % G, tl.program_id(0) // G
    b, part = slot // SPLITS, slot % SPLITS
    row_of = b.to(tl.int64)
    if INDEXED:
        row_of = tl.load(rows_of + b)
    position = tl.load(positions + row_of)
    table = block_tables + row_of * table_stride
    owned = tl.load(table) > 0
    start, first_tile, per_part, num_parts = _cut(position, window, SPLITS, least, KEYS, WINDOW)
    lo = (first_tile + part * per_part) * KEYS
    if (part < num_parts) & owned:  # who has nothing to do waits for nobody
        _decode_part(
            qkv, bias, q_norm, k_norm, cos_table, sin_table, k_cache, v_cache, table, out, part_out, part_max, part_sum,
            arrivals, b, g, part, slot, num_parts, position, start, lo, per_part, stride, scale, eps,
            H, G, D, BLOCK_SIZE, ROWS, SPLITS, IN_SPLITS, BIAS, NORM, ROTARY, WINDOW, KEYS, AHEAD, CAP, PDL)  # fmt: skip


@triton.jit
def _wait(
    k_cache, v_cache, table, g, lo, position, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr
):
    """While the kernel before still runs: have the first tile brought near. Cached keys don't depend on that kernel."""
    LINE: tl.constexpr = 1024 // k_cache.dtype.element_ty.primitive_bitwidth  # numbers that 128 bytes hold
    LINES: tl.constexpr = D // LINE if D > LINE else 1  # of a key
    i = tl.arange(0, KEYS * LINES)
    key = lo + i // LINES
    near = tl.load(table + key // BLOCK_SIZE, mask=key < position, other=0).to(tl.int64)
    line = ((near * G + g) * BLOCK_SIZE + key % BLOCK_SIZE) * D + i % LINES * LINE
    _prefetch(k_cache + line)
    _prefetch(v_cache + line)
    tl.extra.cuda.gdc_wait()


@triton.jit
def _decode_part(
    qkv, bias, q_norm, k_norm, cos_table, sin_table, k_cache, v_cache, table, out, part_out, part_max, part_sum, arrivals,
    b, g, part, slot, num_parts, position, start, lo, per_part, stride, scale, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    IN_SPLITS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, WINDOW: tl.constexpr,
    KEYS: tl.constexpr, AHEAD: tl.constexpr, CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    CACHE: tl.constexpr = k_cache.dtype.element_ty
    # of products: float8 is one instruction from float16, which has all its numbers, and several from bfloat16
    WIDE: tl.constexpr = tl.float16 if tl.float8e4nv == CACHE and tl.bfloat16 == DTYPE else DTYPE
    SHARE: tl.constexpr = H // G
    rows, halves, dims, keys = tl.arange(0, ROWS), tl.arange(0, D // 2), tl.arange(0, D), tl.arange(0, KEYS)
    mine = rows < SHARE
    # all is sent for before any of it is used; what the kernel before does not change, while that still runs
    cos = tl.load(cos_table + position * D + halves)
    sin = tl.load(sin_table + position * D + D // 2 + halves)  # the second half of the table is not negated
    q_low, q_high, k_low, k_high = cos, cos, cos, cos
    if NORM:
        q_low, q_high = tl.load(q_norm + halves), tl.load(q_norm + D // 2 + halves)
        k_low, k_high = tl.load(k_norm + halves), tl.load(k_norm + D // 2 + halves)
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    if PDL:
        _wait(k_cache, v_cache, table, g, lo, position, G, D, BLOCK_SIZE, KEYS)
    token = b.to(tl.int64) * (H + 2 * G) * D
    one = tl.arange(0, 1)
    qa, qb = _load_pair(qkv, bias + g * SHARE * D, token + g * SHARE * D, rows, halves, mine, stride, D, IN_SPLITS, BIAS)
    ka1, kb1 = _load_pair(qkv, bias + (H + g) * D, token + (H + g) * D, one, halves, one == 0, stride, D, IN_SPLITS, BIAS)
    v1 = _sum_partials(qkv + token, (H + G + g) * D + dims, dims < D, stride, IN_SPLITS)
    if BIAS:
        v1 += tl.load(bias + (H + G + g) * D + dims).to(tl.float32)
    qa, qb = _finish_pair(qa, qb, q_low, q_high, cos, sin, eps, D, NORM, ROTARY, DTYPE)
    ka1, kb1 = _finish_pair(ka1, kb1, k_low, k_high, cos, sin, eps, D, NORM, ROTARY, DTYPE)
    v1 = v1.to(DTYPE)
    if CACHE != DTYPE:  # as they will be read
        ka1, kb1 = kept(ka1, CACHE).to(DTYPE), kept(kb1, CACHE).to(DTYPE)
        v1 = kept(v1, CACHE).to(DTYPE)

    # the new token, taken from registers, begins the sum of the last part, for there it stands
    last = part == num_parts - 1
    score = tl.sum(qa.to(tl.float32) * ka1.to(tl.float32), axis=1) + tl.sum(qb.to(tl.float32) * kb1.to(tl.float32), axis=1)
    high = tl.where(last, log2_scores(score, scale, CAP), -float("inf"))
    total = tl.where(last, tl.full([ROWS], 1.0, tl.float32), 0.0)
    acc = tl.where(last, tl.zeros([ROWS, D], tl.float32) + v1.to(tl.float32)[None, :], 0.0)
    if last:  # a value that broke is kept as in `_rope_cache`
        row1 = ((block * G + g) * BLOCK_SIZE + position % BLOCK_SIZE) * D
        broken = tl.min(finite(v1).to(tl.int32), axis=0) == 0
        tl.store(k_cache + row1 + halves[None, :], tl.where(broken, float("nan"), ka1).to(CACHE))
        tl.store(k_cache + row1 + D // 2 + halves[None, :], tl.where(broken, float("nan"), kb1).to(CACHE))
        tl.store(v_cache + row1 + dims, tl.where(finite(v1), v1, 0.0).to(CACHE))

    if WIDE != DTYPE:
        qa, qb = in_float16(qa), in_float16(qb)
    hi = tl.minimum(lo + per_part * KEYS, position)
    if AHEAD:  # a tile's block is looked up while the tile before it is computed, so that its keys can be sent for early
        near = tl.load(table + lo // BLOCK_SIZE)
    for tile in range(lo, hi, KEYS):
        key = tile + keys
        seen = key < hi
        if WINDOW:
            seen = seen & (key >= start)
        if AHEAD:
            row = ((near.to(tl.int64) * G + g) * BLOCK_SIZE + tile % BLOCK_SIZE + keys) * D
            near = tl.load(table + tl.minimum(tile + KEYS, position) // BLOCK_SIZE)
        elif BLOCK_SIZE % KEYS == 0:
            there = tl.load(table + tile // BLOCK_SIZE).to(tl.int64)
            row = (keys + tile % BLOCK_SIZE) * D + (there * G + g) * (BLOCK_SIZE * D)
        else:
            there = tl.load(table + key // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            row = ((there * G + g) * BLOCK_SIZE + key % BLOCK_SIZE) * D
        # with masks, for half a tile of each sequence, on average, is nobody's
        ka = tl.load(k_cache + row[:, None] + halves[None, :], mask=seen[:, None], other=0.0).to(WIDE)
        kb = tl.load(k_cache + row[:, None] + D // 2 + halves[None, :], mask=seen[:, None], other=0.0).to(WIDE)
        scores = tl.dot(qa, tl.trans(ka))
        scores = log2_scores(tl.dot(qb, tl.trans(kb), scores), scale, CAP)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_high = tl.maximum(high, tl.max(scores, axis=1))
        safe = tl.where(new_high == -float("inf"), 0.0, new_high)
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(high - safe)
        v = tl.load(v_cache + row[:, None] + dims[None, :], mask=seen[:, None], other=0.0).to(WIDE)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(WIDE), v, acc)
        total = total * fade + tl.sum(weights, axis=1)
        high = new_high

    head = b * H + g * SHARE + rows
    if num_parts == 1:
        tl.store(out + head[:, None] * D + dims[None, :], acc / total[:, None], mask=mine[:, None])
    else:
        place = (slot * H + g * SHARE + rows).to(tl.int64)
        tl.store(part_out + place[:, None] * D + dims[None, :], acc, mask=mine[:, None])
        tl.store(part_max + place, high, mask=mine)
        tl.store(part_sum + place, total, mask=mine)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + b * G + g, 1, sem="acq_rel") == num_parts - 1:
            tl.debug_barrier()
            tl.store(arrivals + b * G + g, 0)
            place = ((slot - part) * H + g * SHARE + rows).to(tl.int64)
            _combine(part_out, part_max, part_sum, out, place, head, dims, mine, num_parts, H, D, SPLITS, ROWS)


@triton.jit
def _combine(
    part_out, part_max, part_sum, out, place, head, dims, mine, num_parts,
    H: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The last part to arrive adds all of them up, always in the same order. place: rows [ROWS] of the first part."""
    PADDED: tl.constexpr = 4 if SPLITS == 3 else SPLITS  # a power of two
    parts = tl.arange(0, PADDED)
    at = place[:, None] + parts[None, :] * H
    there = mine[:, None] & (parts[None, :] < num_parts)
    highs = tl.load(part_max + at, mask=there, other=-float("inf"), cache_modifier=".cg")
    sums = tl.load(part_sum + at, mask=there, other=0.0, cache_modifier=".cg")
    high = tl.where(mine, tl.max(highs, axis=1), 0.0)
    total = tl.sum(sums * tl.exp2(highs - high[:, None]), axis=1)
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(0, num_parts, _GROUP):
        for i in tl.static_range(_GROUP):
            row = place + (first + i) * H
            real = mine & (row < place + num_parts * H)
            fade = tl.exp2(tl.load(part_max + row, mask=real, other=-float("inf"), cache_modifier=".cg") - high)
            piece = tl.load(part_out + row[:, None] * D + dims[None, :], mask=real[:, None], other=0.0, cache_modifier=".cg")
            acc += piece * fade[:, None]
    tl.store(out + head[:, None] * D + dims[None, :], acc / total[:, None], mask=mine[:, None])


@dataclass(frozen=True)
class Cut:
    """How a batch's keys are cut: parts of a sequence at most, keys of a tile, tiles of a part at least, stages of the pipeline,
    whether a tile's block is looked up one tile ahead.

    Fixed by the size of the batch and the cache's dtype, so that results repeat. Measured on an H100: few sequences want a
    program on each multiprocessor, with much under way; many sequences want four there, each with a tile under way (the
    registers allow no more, and five were slower).
    """

    splits: int
    tile: int
    least: int
    stages: int
    ahead: bool = False


# (Sequences times key heads up to which, parts of a sequence at most, tiles of a part at least), measured on an H100 with
# Qwen3-0.6B, eight key heads, and sequences of mixed lengths. 528 programs run there at once: heads that are a little more than
# one or two rounds of them (640, 1152, 1280) gain 1 to 3 % by being cut, those that nearly fill two (896, 1024) lose as much.
_PARTS = ((319, 4, 4), (320, 3, 8), (384, 4, 4), (512, 2, 8), (640, 3, 1), (1024, 1, 1), (1152, 2, 12), (1280, 2, 18))


def plan_decode(batch: int, kv_heads: int, itemsize: int = 2) -> Cut:
    """The cut for `batch` sequences of `kv_heads` heads each, whose keys have numbers of `itemsize` bytes: of 128 of a byte a
    tile is as large as of 64 of two."""
    heads = batch * kv_heads
    if itemsize == 1 and heads >= 128:  # an H200 read Qwen2-7B's keys at 128 x 2,048 in 104 µs, by tiles of 64 in 133
        # in between, a sequence much longer than the others does not leave the GPU to one program
        return Cut(2, 128, 1, 3) if heads < 192 else Cut(2, 128, 16, 2) if heads < 528 else Cut(1, 128, 1, 2)
    if heads < 64:
        return Cut(min(16, next_power_of_2(cdiv(3 * num_sms(), 4 * heads))), 64, 1, 3, ahead=True)
    if heads < 192:
        return Cut(2, 64, 1, 4, ahead=True) if heads >= 128 else Cut(8, 64, 3, 3, ahead=True)
    if batch >= 128 and kv_heads < 8:  # a step of Qwen2-7B, four key heads, at 128 x 300 tokens: 6.83 ms, in two parts 6.93
        return Cut(1, 64, 1, 2)
    splits, least = next(((splits, least) for most, splits, least in _PARTS if heads <= most), (1, 1))
    return Cut(splits, 64, least, 2)


class DecodeScratch:
    """Where parts leave their results: fp32 [batch·splits, H, D], with its maxima and sums; `arrivals` counts parts that are
    done and resets itself."""

    def __init__(self, batch: int, heads: int, kv_heads: int, dim: int, device: torch.device, cut: Cut | None = None) -> None:
        self.cut = cut or plan_decode(batch, kv_heads)
        splits = self.cut.splits
        self.out = torch.empty(batch * splits * heads, dim, dtype=torch.float32, device=device)
        self.high, self.total = torch.empty(2, batch * splits * heads, dtype=torch.float32, device=device).unbind(0)
        self.arrivals = torch.zeros(batch * kv_heads if splits > 1 else 0, dtype=torch.int32, device=device)


def fused_decode(
    qkv: Tensor,
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor, float] | None,
    tables: tuple[Tensor, Tensor] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int | None,
    scratch: DecodeScratch,
    out: Tensor,
    soft_cap: float | None = None,
) -> Tensor:
    """All of attention for one new token a sequence, between the qkv product and the output product.

    qkv: fp32 partial products [S, M, (H+2G)·D], or [M, (H+2G)·D]. bias: [(H+2G)·D]. norms: q and k norm weights [D], eps.
    tables: cos and sin [positions, D], sin's first half negated as in `RotaryEmbedding`; None: no rotation. rows: int64 [M],
    which row of block_tables int32 [R, blocks] and positions int64 [R] a sequence has; None: sequence i has row i. positions:
    where the new token stands; its key and value are written to the cache here. A row whose first block is 0 is padding: it
    costs nothing, and its part of `out` stays as it is. out: [M, H·D]. soft_cap: see `log2_scores`.
    Reference: sum, add, `rms_norm`, `rotate`, `write_kv`, `paged_attention`.
    """
    in_splits = qkv.shape[0] if qkv.dim() == 3 else 1
    batch = qkv.shape[-2]
    kv_heads, size, dim = k_cache.shape[1:]
    heads = qkv.shape[-1] // dim - 2 * kv_heads
    cos, sin = tables or (qkv, qkv)
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    cut = scratch.cut
    under_way = 2 * (cut.stages - 1) * cut.tile * dim * k_cache.element_size()  # bytes of keys and values
    ahead = cut.ahead and size % cut.tile == 0 and under_way + _BESIDE <= shared_memory()
    _decode[(batch * kv_heads * cut.splits,)](
        qkv, bias if bias is not None else qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, block_tables, positions,
        positions if rows is None else rows, out, scratch.out, scratch.high, scratch.total, scratch.arrivals,
        block_tables.stride(0), batch * qkv.shape[-1], scale, eps, window or 0, cut.least,
        H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, ROWS=max(16, next_power_of_2(heads // kv_heads)), SPLITS=cut.splits,
        IN_SPLITS=in_splits, BIAS=bias is not None, NORM=norms is not None, ROTARY=tables is not None, WINDOW=window is not None,
        INDEXED=rows is not None, KEYS=cut.tile, AHEAD=ahead, CAP=soft_cap or 0.0,
        num_warps=4, num_stages=cut.stages, **pdl(),
    )  # fmt: skip
    return out
