"""Attention whose every row has the same bits whatever stands beside it: whatever the batch, whether its query is the one new
token of a sequence or stands within a chunk of prompt tokens, and however its keys are shared out among programs. It is for
`deterministic=True`.

Shapes as in reference.py. Keys lie in tiles of 64, and those in chunks of 512, at absolute multiples of either. A chunk is an
online softmax (FlashAttention, arXiv:2205.14135) of its own that begins empty; chunks are merged strictly from left to right.
What a row cannot see leaves its numbers as they are, bit by bit: weights of exactly 0, a factor of exactly 1. So a row depends on
its keys alone, if each operation does. Products do: a tensor core adds along K in one order, whatever the tile. What a compiler
may do one way here and another way there is kept out: sums across threads are products with ones, a·b + c is always `fma`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, cdiv, is_hopper, next_power_of_2, num_sms, pdl, shared_memory
from llmkit_kernels.prefill_attention import _BESIDE, QUERY_TILE, TILE, _block_of, _load_tile

CHUNK = 512  # keys whose softmax begins empty
_KEYS, _CHUNK = tl.constexpr(TILE), tl.constexpr(CHUNK)
_LOG2E = 1.4426950408889634
_GROUP = tl.constexpr(4)  # chunks' results that are read at once


@triton.jit
def _empty(ROWS: tl.constexpr, D: tl.constexpr):
    """The softmax of no keys: sums of weighted values [ROWS, D], of weights [ROWS], the highest product [ROWS]; all fp32."""
    return tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS], tl.float32), tl.full([ROWS], -float("inf"), tl.float32)


@triton.jit
def _finite(high):
    """What highs may be subtracted from: a row that has seen no key has none, and then anything will do."""
    return tl.where(high == -float("inf"), 0.0, high)


@triton.jit
def _merge(acc, total, high, later, later_total, later_high, c):
    """The softmax of a chunk's keys joins that of all keys before. c: log2(e) · scale; a key's weight is exp2(c · product)."""
    new = tl.maximum(high, later_high)
    safe = _finite(new)
    fade, later_fade = tl.exp2((high - safe) * c), tl.exp2((later_high - safe) * c)
    acc = tl.fma(acc, fade[:, None], later * later_fade[:, None])
    return acc, tl.fma(total, fade, later_total * later_fade), new


@triton.jit
def _value(acc, total):
    return tl.div_rn(acc, tl.broadcast_to(tl.where(total == 0.0, 1.0, total)[:, None], acc.shape))


@triton.jit
def _tiles(
    acc, totals, high, ahead, query, position, first, last, paged, c, window,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The online softmax goes on with the tiles first..last. MASKED: they may hold keys that a row does not see."""
    table, context, g, k_cache, v_cache, k_desc, v_desc = paged
    DTYPE: tl.constexpr = query.dtype
    ones = tl.full([_KEYS, totals.shape[1]], 1.0, DTYPE)
    for at in range(first, last, _KEYS):
        block = ahead
        ahead = _block_of(table, at + _KEYS, context, BLOCK_SIZE, _KEYS, BLOCK_SIZE % 64 == 0)
        k = _load_tile(k_cache, k_desc, block, g, at, G, D, BLOCK_SIZE, _KEYS, TMA)
        products = tl.dot(query, tl.trans(k.to(DTYPE)))
        if MASKED:
            key = (at + tl.arange(0, _KEYS))[None, :]
            seen = key <= position[:, None]
            if WINDOW:
                seen = seen & (key > position[:, None] - window)
            products = tl.where(seen, products, -float("inf"))
        new_high = tl.maximum(high, tl.max(products, axis=1))
        safe = _finite(new_high) if MASKED else new_high
        weights = tl.exp2(tl.fma(products, c, -(safe * c)[:, None])).to(DTYPE)
        fade = tl.exp2((high - safe) * c)[:, None]
        v = _load_tile(v_cache, v_desc, block, g, at, G, D, BLOCK_SIZE, _KEYS, TMA)
        acc = tl.dot(weights, v.to(DTYPE), acc * fade)
        totals = tl.dot(weights, ones, totals * fade)  # every column is the sum along the row
        high = new_high
    return acc, totals, high, ahead


@triton.jit
def _chunk(
    ahead, query, position, first, past, last, paged, c, window, ROWS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAST: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The softmax of the keys first..last of one chunk, and of them alone; `first` is a multiple of a tile.

    query: [ROWS, D]. position: [ROWS]. PAST: every row sees all tiles before `past`, which need no mask. paged: the block table,
    keys of the sequence, key head, caches, their descriptors. ahead: the block of the tile at `first`. Returns the three results
    and `ahead` for the tile after: a block is looked up while the tile before it is computed, as keys can only be sent for once
    their block is known.
    """
    SUMS: tl.constexpr = 16 if ROWS >= 64 else 2 * ROWS  # Triton hands columns, not rows, out to warps where they are more
    acc, _, high = _empty(ROWS, D)
    totals = tl.zeros([ROWS, SUMS], tl.float32)
    if PAST:
        middle = tl.maximum(tl.minimum(past, last), first)
        acc, totals, high, ahead = _tiles(
            acc, totals, high, ahead, query, position, first, middle, paged, c, window, G, D, BLOCK_SIZE, False, WINDOW, TMA
        )
        first = middle
    acc, totals, high, ahead = _tiles(
        acc, totals, high, ahead, query, position, first, last, paged, c, window, G, D, BLOCK_SIZE, True, WINDOW, TMA
    )
    return acc, tl.max(totals, axis=1), high, ahead


@triton.jit(do_not_specialize=["table_stride"])
def _fixed_prefill(
    q, k_cache, v_cache, k_desc, v_desc, out, block_tables, cu_seqlens, context_lens, tile_sequence, tile_start, q_stride,
    table_stride, c, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr,
    TILE_PARTS: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head, QUERIES of a tile's queries."""
    begin(PDL)
    head, tile = tl.program_id(0), tl.program_id(1) // TILE_PARTS
    g = head // (H // G)
    s = tl.load(tile_sequence + tile)
    first = tl.load(tile_start + tile) + tl.program_id(1) % TILE_PARTS * QUERIES  # query within its sequence's run
    begin_token, end_token = tl.load(cu_seqlens + s), tl.load(cu_seqlens + s + 1)
    context = tl.load(context_lens + s)
    done = tl.maximum(context - (end_token - begin_token).to(tl.int32), 0)  # a run that is padding has no keys at all
    rows, dims = tl.arange(0, QUERIES), tl.arange(0, D)
    token = begin_token + first + rows
    live = token < end_token
    position = done + first + rows
    query = tl.load(q + token[:, None].to(tl.int64) * q_stride + head * D + dims[None, :], mask=live[:, None], other=0.0)
    last = tl.minimum(context, done + first + QUERIES)
    past = (done + first + 1) // _KEYS * _KEYS
    start = first * 0
    if WINDOW:
        start = tl.maximum(0, done + first + 1 - window) // _KEYS * _KEYS
    table = block_tables + s * table_stride
    paged = table, context, g, k_cache, v_cache, k_desc, v_desc
    ahead = _block_of(table, start, context, BLOCK_SIZE, _KEYS, BLOCK_SIZE % 64 == 0)
    acc, total, high = _empty(QUERIES, D)
    for chunk in range(start // _CHUNK, tl.cdiv(last, _CHUNK)):
        later, later_total, later_high, ahead = _chunk(
            ahead, query, position, tl.maximum(chunk * _CHUNK, start), past, tl.minimum(chunk * _CHUNK + _CHUNK, last), paged, c,
            window, QUERIES, G, D, BLOCK_SIZE, not WINDOW, WINDOW, TMA)  # fmt: skip
        acc, total, high = _merge(acc, total, high, later, later_total, later_high, c)
    tl.store(out + token[:, None].to(tl.int64) * (H * D) + head * D + dims[None, :], _value(acc, total), mask=live[:, None])


@triton.jit(do_not_specialize=["table_stride", "max_chunks"])
def _fixed_decode(
    q, k_cache, v_cache, k_desc, v_desc, out, block_tables, positions, rows_of, chunk_acc, chunk_total, chunk_high, arrivals,
    q_stride, table_stride, max_chunks, c, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, INDEXED: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One of the SPLITS parts of a sequence's chunks, for the query heads of one key head."""
    SHARE: tl.constexpr = H // G
    g, slot = tl.program_id(0) % G, tl.program_id(0) // G
    b, part = slot // SPLITS, slot % SPLITS
    row_of = b.to(tl.int64)
    if INDEXED:
        row_of = tl.load(rows_of + b)
    newest = tl.load(positions + row_of).to(tl.int32)
    table, context = block_tables + row_of * table_stride, newest + 1
    start = newest * 0
    if WINDOW:
        start = tl.maximum(0, context - window) // _KEYS * _KEYS
    first_chunk, end_chunk = start // _CHUNK, tl.cdiv(context, _CHUNK)
    per_part = tl.cdiv(end_chunk - first_chunk, SPLITS)
    num_parts = tl.cdiv(end_chunk - first_chunk, per_part)
    lo = first_chunk + part * per_part
    ahead = _block_of(table, tl.maximum(lo * _CHUNK, start), context, BLOCK_SIZE, _KEYS, BLOCK_SIZE % 64 == 0)
    begin(PDL)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, D)
    mine, head = rows < SHARE, g * SHARE + rows
    query = tl.load(q + b.to(tl.int64) * q_stride + head[:, None] * D + dims[None, :], mask=mine[:, None], other=0.0)
    position = tl.zeros([ROWS], tl.int32) + newest
    paged = table, context, g, k_cache, v_cache, k_desc, v_desc
    shared = (num_parts > 1) & (SPLITS > 1)
    places = (b.to(tl.int64) * max_chunks - first_chunk) * H + head  # of chunk 0's results; the scratch begins with first_chunk's
    acc, total, high = _empty(ROWS, D)
    for chunk in range(lo, tl.minimum(lo + per_part, end_chunk)):
        later, later_total, later_high, ahead = _chunk(
            ahead, query, position, tl.maximum(chunk * _CHUNK, start), start, tl.minimum(chunk * _CHUNK + _CHUNK, context), paged,
            c, window, ROWS, G, D, BLOCK_SIZE, False, WINDOW, TMA)  # fmt: skip
        if shared:
            place = places + chunk * H
            tl.store(chunk_acc + place[:, None] * D + dims[None, :], later, mask=mine[:, None])
            tl.store(chunk_total + place, later_total, mask=mine)
            tl.store(chunk_high + place, later_high, mask=mine)
        acc, total, high = _merge(acc, total, high, later, later_total, later_high, c)
    whole = part < num_parts
    if shared & whole:
        tl.debug_barrier()
        whole = tl.atomic_add(arrivals + b * G + g, 1, sem="acq_rel") == num_parts - 1
        if whole:
            tl.debug_barrier()
            tl.store(arrivals + b * G + g, 0)
            acc, total = _merge_all(chunk_acc, chunk_total, chunk_high, places, mine, first_chunk, end_chunk, c, H, D, ROWS)
    if whole:
        tl.store(out + (b.to(tl.int64) * H + head)[:, None] * D + dims[None, :], _value(acc, total), mask=mine[:, None])


@triton.jit
def _merge_all(
    chunk_acc, chunk_total, chunk_high, places, mine, first_chunk, end_chunk, c,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a program alone would have, from the chunks' results; a chunk that is not there changes nothing."""
    acc, total, high = _empty(ROWS, D)
    dims = tl.arange(0, D)[None, :]
    for first in range(first_chunk, end_chunk, _GROUP):
        for i in tl.static_range(_GROUP):
            place = places + (first + i) * H
            real = mine & (place < places + end_chunk * H)
            later = tl.load(chunk_acc + place[:, None] * D + dims, mask=real[:, None], other=0.0, cache_modifier=".cg")
            later_total = tl.load(chunk_total + place, mask=real, other=0.0, cache_modifier=".cg")
            later_high = tl.load(chunk_high + place, mask=real, other=-float("inf"), cache_modifier=".cg")
            acc, total, high = _merge(acc, total, high, later, later_total, later_high, c)
    return acc, total


def _stages(row: int, queries: int) -> int:
    """Of the pipeline: 3 where two tiles of keys and two of values find room, three and three on a Hopper, whose products read
    them there. row: bytes of D numbers."""
    room = shared_memory() - queries * row - _BESIDE
    return 3 if room >= (6 if is_hopper() else 4) * TILE * row else 2 if room >= 2 * TILE * row else 1


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
    out: Tensor | None = None,
    descriptors: tuple[object, object] | None = None,
) -> Tensor:
    """Runs of new tokens over their sequences' cached keys, their own among them (`write_kv` comes first).

    q: [T, H, D], rows of any stride, rotated. cu_seqlens: int32 [S+1]. context_lens: int32 [S]. block_tables: int32 [S, blocks].
    tiles: int32 (sequence, first query) of each tile of queries, from `prefill_attention.query_tiles`. descriptors: of the
    caches, from `prefill_attention.cache_descriptor`. Returns [T, H, D]. Reference: `reference.paged_attention`.
    """
    tokens, heads, dim = q.shape
    kv_heads, size = k_cache.shape[1:3]
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device) if out is None else out
    k_desc, v_desc = descriptors or (k_cache, v_cache)
    row = dim * q.element_size()
    parts = 1 if dim <= 128 or is_hopper() else 2  # fewer queries at a time leave room for keys, and registers
    queries = QUERY_TILE // parts
    _fixed_prefill[(heads, tiles[0].shape[0] * parts)](
        q, k_cache, v_cache, k_desc, v_desc, out, block_tables, cu_seqlens, context_lens, tiles[0], tiles[1], q.stride(0),
        block_tables.stride(0), scale * _LOG2E, window or 0, H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, QUERIES=queries,
        WINDOW=window is not None, TILE_PARTS=parts, TMA=descriptors is not None, num_warps=4 if dim <= 128 else 8,
        num_stages=_stages(row, queries), **pdl(),
    )  # fmt: skip
    return out


def plan(batch: int, kv_heads: int, max_chunks: int) -> int:
    """Parts that a sequence's chunks are cut into, so that programs about fill the GPU; results are the same for any."""
    return min(max_chunks, next_power_of_2(cdiv(2 * num_sms(), batch * kv_heads)))


class Scratch:
    """Where parts leave their chunks' results: fp32 [batch·chunks, H, D], with their sums and maxima; `arrivals` counts parts
    that are done and resets itself. max_context: keys of a sequence at most, its new one among them. splits: as `plan` has it."""

    def __init__(
        self, batch: int, heads: int, kv_heads: int, dim: int, max_context: int, device: torch.device, splits: int | None = None
    ) -> None:
        self.max_chunks = cdiv(max_context, CHUNK)
        self.splits = splits or plan(batch, kv_heads, self.max_chunks)
        rows = batch * self.max_chunks * heads if self.splits > 1 else 0  # a program that is alone keeps them to itself
        self.out = torch.empty(rows, dim, dtype=torch.float32, device=device)
        self.high, self.total = torch.empty(2, rows, dtype=torch.float32, device=device).unbind(0)
        self.arrivals = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)


def scratch_bytes(most: int, heads: int, kv_heads: int, dim: int, max_context: int) -> int:
    """Of the largest `Scratch` of up to `most` sequences: one more, and each has its chunks to itself."""
    chunks = cdiv(max_context, CHUNK)
    batch = min(most, cdiv(2 * num_sms(), kv_heads) - 1) if chunks > 1 else 0
    return batch * chunks * heads * (dim + 2) * 4


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int | None,
    scratch: Scratch,
    out: Tensor,
    descriptors: tuple[object, object] | None = None,
) -> Tensor:
    """One new token a sequence over its cached keys, its own among them.

    q: [M, H, D], rows of any stride, rotated. rows: int64 [M], which row of block_tables int32 [R, blocks] and positions int64
    [R] a sequence has; None: sequence i has row i. None of the three may be written by the kernel just before. positions: where
    the new token stands, below the scratch's max_context. descriptors: as `prefill` takes them. out: [M, H·D]. Reference:
    `reference.paged_attention`.
    """
    batch, heads, dim = q.shape
    kv_heads, size = k_cache.shape[1:3]
    k_desc, v_desc = descriptors or (k_cache, v_cache)
    share = max(16, next_power_of_2(heads // kv_heads))
    _fixed_decode[(batch * kv_heads * scratch.splits,)](
        q, k_cache, v_cache, k_desc, v_desc, out, block_tables, positions, positions if rows is None else rows, scratch.out,
        scratch.total, scratch.high, scratch.arrivals, q.stride(0), block_tables.stride(0), scratch.max_chunks, scale * _LOG2E,
        window or 0, H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, ROWS=share, SPLITS=scratch.splits, WINDOW=window is not None,
        INDEXED=rows is not None, TMA=descriptors is not None, num_warps=4, num_stages=_stages(dim * q.element_size(), share),
        **pdl(),
    )  # fmt: skip
    return out
