"""Attention of runs of prompt tokens over the paged KV cache.

Shapes as in reference.py: caches [num_blocks, G, block_size, D]; a block table row names a sequence's blocks. An online softmax
(FlashAttention, arXiv:2205.14135) over tiles of keys that are found through the block table (PagedAttention, arXiv:2309.06180).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, descriptor, is_hopper, pdl, shared_memory
from llmkit_kernels.soft_cap import log2_scores

TILE = 64  # keys at a time
QUERY_TILE = 64  # prefill queries at a time
_BESIDE = 5 << 10  # bytes that programs share besides tiles


@triton.jit
def _block_of(table, at, last, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr):
    """The block of each key at..at+KEYS, of which those from `last` on are nobody's; with TMA they share it."""
    if TMA:
        block = tl.load(table + tl.maximum(tl.minimum(at, last - 1), 0) // BLOCK_SIZE).to(tl.int64)
    else:
        key = at + tl.arange(0, KEYS)
        block = tl.load(table + key // BLOCK_SIZE, mask=key < last, other=0).to(tl.int64)
    return block


@triton.jit
def _load_tile(cache, desc, block, g, at, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
               TMA: tl.constexpr):  # fmt: skip
    """[KEYS, D]: keys or values at..at+KEYS of head g, in `block`."""
    if TMA:
        tile = desc.load([((block * G + g) * BLOCK_SIZE + at % BLOCK_SIZE).to(tl.int32), 0])
    else:
        row = ((block * G + g) * BLOCK_SIZE + (at + tl.arange(0, KEYS)) % BLOCK_SIZE) * D
        tile = tl.load(cache + row[:, None] + tl.arange(0, D)[None, :])
    return tile


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q, k_cache, v_cache, k_desc, v_desc, out, block_tables, cu_seqlens, context_lens, tile_sequence, tile_start, q_stride,
    table_stride, scale, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    head, tile = tl.program_id(0), tl.program_id(1)
    g = head // (H // G)
    s = tl.load(tile_sequence + tile)
    first = tl.load(tile_start + tile)  # this tile's first query within its sequence's run
    begin_token, end_token = tl.load(cu_seqlens + s), tl.load(cu_seqlens + s + 1)
    context = tl.load(context_lens + s)
    done = tl.maximum(context - (end_token - begin_token).to(tl.int32), 0)  # a run that is padding has no keys at all
    rows, dims, keys = tl.arange(0, QUERIES), tl.arange(0, D), tl.arange(0, KEYS)
    token = begin_token + first + rows
    live = token < end_token
    position = done + first + rows
    query = tl.load(q + token[:, None].to(tl.int64) * q_stride + head * D + dims[None, :], mask=live[:, None], other=0.0)
    last = tl.minimum(context, done + first + QUERIES)
    begin_key = 0
    if WINDOW:
        begin_key = tl.maximum(0, done + first + 1 - window) // KEYS * KEYS
    full_end = tl.minimum((done + first) // KEYS * KEYS, last)  # tiles before this lie wholly in every query's past
    high = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    table = block_tables + s * table_stride
    # a tile's block is looked up while the tile before it is computed: keys can only be sent for once their block is known
    ahead = _block_of(table, begin_key, context, BLOCK_SIZE, KEYS, TMA)
    for at in range(begin_key, full_end, KEYS):
        block = ahead
        ahead = _block_of(table, at + KEYS, context, BLOCK_SIZE, KEYS, TMA)
        k = _load_tile(k_cache, k_desc, block, g, at, G, D, BLOCK_SIZE, KEYS, TMA)
        scores = log2_scores(tl.dot(query, tl.trans(k.to(query.dtype))), scale, CAP)
        if WINDOW:
            scores = tl.where(at + keys[None, :] > position[:, None] - window, scores, -float("inf"))
        v = _load_tile(v_cache, v_desc, block, g, at, G, D, BLOCK_SIZE, KEYS, TMA)
        acc, total, high = _online(acc, total, high, scores, v.to(query.dtype), WINDOW)
    for at in range(full_end, last, KEYS):
        key = at + keys
        block = ahead
        ahead = _block_of(table, at + KEYS, context, BLOCK_SIZE, KEYS, TMA)
        k = _load_tile(k_cache, k_desc, block, g, at, G, D, BLOCK_SIZE, KEYS, TMA)
        scores = log2_scores(tl.dot(query, tl.trans(k.to(query.dtype))), scale, CAP)
        seen = (key[None, :] <= position[:, None]) & (key < context)[None, :]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        v = _load_tile(v_cache, v_desc, block, g, at, G, D, BLOCK_SIZE, KEYS, TMA)
        acc, total, high = _online(acc, total, high, scores, v.to(query.dtype), True)
    value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + token[:, None].to(tl.int64) * (H * D) + head * D + dims[None, :], value, mask=live[:, None])


@triton.jit
def _online(acc, total, high, scores, v, MASKED: tl.constexpr):
    """One tile of the online softmax. MASKED: a row may have seen no key yet."""
    new_high = tl.maximum(high, tl.max(scores, axis=1))
    safe = new_high
    if MASKED:
        safe = tl.where(new_high == -float("inf"), 0.0, new_high)
    weights = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(high - safe)
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
    out: Tensor | None = None,
    descriptors: tuple[object, object] | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Runs of new tokens over their sequences' cached keys, their own among them (`write_kv` comes first).

    q: [T, H, D], rows of any stride. cu_seqlens: int32 [S+1]. context_lens: int32 [S]. block_tables: int32 [S, blocks].
    tiles: int32 (sequence, first query) of each tile of `QUERY_TILE` queries, from `query_tiles`. descriptors: of the caches,
    from `cache_descriptor`. soft_cap: see `log2_scores`. Returns [T, H, D]. Reference: `reference.paged_attention`.
    """
    tokens, heads, dim = q.shape
    kv_heads, size = k_cache.shape[1:3]
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device) if out is None else out
    k_desc, v_desc = descriptors or (k_cache, v_cache)
    row = dim * q.element_size()
    room = shared_memory() - QUERY_TILE * row - _BESIDE
    keys = TILE if room >= 4 * TILE * row else TILE // 2  # two tiles of keys and two of values
    _prefill[(heads, tiles[0].shape[0])](
        q, k_cache, v_cache, k_desc, v_desc, out, block_tables, cu_seqlens, context_lens, tiles[0], tiles[1], q.stride(0),
        block_tables.stride(0), scale, window or 0, H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, QUERIES=QUERY_TILE, KEYS=keys,
        WINDOW=window is not None, CAP=soft_cap or 0.0, TMA=descriptors is not None and keys == TILE,
        num_warps=4 if dim <= 128 else 8, num_stages=3 if room >= 4 * keys * row else 2, **pdl(),
    )  # fmt: skip
    return out


def cache_descriptor(cache: Tensor) -> object | None:
    """For TMA, which brings a tile of keys in one piece where it lies within a block; None where that cannot be."""
    if not is_hopper() or cache.shape[2] % TILE:
        return None
    return descriptor(cache.view(-1, cache.shape[-1]), TILE, cache.shape[-1])


def query_tiles(query_lens: np.ndarray) -> np.ndarray:
    """Tiles of at most QUERY_TILE queries over runs of `query_lens` int [S] tokens: int32 [2, tiles], sequence and first query,
    longest runs' last tiles (the ones with most keys) not held back to the end."""
    counts = -(-query_lens // QUERY_TILE)
    sequence = np.repeat(np.arange(len(query_lens)), counts)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * QUERY_TILE
    order = np.argsort(-first, kind="stable")
    return np.stack((sequence[order], first[order])).astype(np.int32)
