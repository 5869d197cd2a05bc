"""The plain-torch meaning of every op: the oracle of the kernel tests, and the backend wherever there is no Triton.

Nothing here loops over heads or tokens. A step's attention is described once by an `AttentionPlan` (host arrays in, index
tensors out) and then run by every layer, so that masks and gather indices cost nothing per layer.

Shapes: T tokens in the step, S sequences, H query heads, G key/value heads, D head size. A KV cache is
[num_blocks, block_size, G, D]; a block table names, in order, the blocks of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up for x = [gate | up], [T, 2·I] -> [T, I] (SwiGLU, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) in the half-split layout of Llama.

    x: [T, heads, D]. cos, sin: [T, 1, R] with R <= D; sin's first half is already negated. The last D-R channels pass.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    swapped = torch.cat((x[..., width // 2 :], x[..., : width // 2]), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store k, v [T, G, D] at cache slots `slot_mapping` int64 [T]; a slot is block · block_size + offset."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


@dataclass(slots=True)
class _DecodeGroup:
    """Sequences with one query token each and contexts of similar length.

    tokens: int64 [B], their places among the step's T tokens, or None when they are simply the first B. blocks: int64
    [B·n], the cache blocks that each reads, padded with block 0. mask: bool [B, 1, 1, n·block_size], True where a key counts.
    """

    size: int
    tokens: Tensor | None
    blocks: Tensor
    mask: Tensor


@dataclass(slots=True)
class _Chunk:
    """A run of prompt tokens start..end of one sequence. blocks: int64 [n]. `mask` is None for plain causal attention over
    the chunk itself, else bool [end-start, n·block_size - skip - rest]: which of the cached keys each query sees."""

    start: int
    end: int
    blocks: Tensor | None
    keys: int
    mask: Tensor | None


@dataclass(slots=True)
class AttentionPlan:
    """How one step's tokens attend, for one window size; see `plan_attention`."""

    groups: list[_DecodeGroup]
    chunks: list[_Chunk]


def plan_attention(
    cu_seqlens: np.ndarray,
    context_lens: np.ndarray,
    block_tables: np.ndarray,
    block_size: int,
    window: int | None,
    device: torch.device,
) -> AttentionPlan:
    """Plan a step over ragged sequences.

    cu_seqlens: int [S+1], where each sequence's tokens begin. context_lens: int [S], keys it has, its new tokens included.
    block_tables: int [S, max_blocks]. window: each query sees this many last keys, itself among them; None sees all.
    """
    query_lens = np.diff(cu_seqlens)
    single = np.flatnonzero(query_lens == 1)
    groups = [
        _plan_group(rows, cu_seqlens, context_lens, block_tables, block_size, window, device)
        for rows in _similar(single, context_lens, block_size)
    ]
    chunks = [
        _plan_chunk(int(cu_seqlens[s]), int(cu_seqlens[s + 1]), int(context_lens[s]), block_tables[s], block_size, window, device)
        for s in np.flatnonzero(query_lens > 1)
    ]
    return AttentionPlan(groups, chunks)


def _similar(rows: np.ndarray, context_lens: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Split rows so that padding a group to its longest context at most doubles what is read: O(log longest) groups."""
    if rows.size == 0:
        return []
    blocks = -(-context_lens[rows] // block_size)
    if blocks.max() * rows.size <= 1.25 * blocks.sum() + 8:
        return [rows]
    octave = np.ceil(np.log2(blocks)).astype(np.int64)
    return [rows[octave == o] for o in np.unique(octave)]


def _plan_group(
    rows: np.ndarray,
    cu_seqlens: np.ndarray,
    context_lens: np.ndarray,
    tables: np.ndarray,
    size: int,
    window: int | None,
    device: torch.device,
) -> _DecodeGroup:
    ends = context_lens[rows].astype(np.int64)
    starts = np.maximum(ends - window, 0) if window else np.zeros_like(ends)
    first = starts // size
    count = int((-(-ends // size) - first).max())
    columns = first[:, None] + np.arange(count)
    blocks = np.where(columns < -(-ends // size)[:, None], tables[rows[:, None], np.minimum(columns, tables.shape[1] - 1)], 0)
    keys = first[:, None] * size + np.arange(count * size)
    mask = (keys >= starts[:, None]) & (keys < ends[:, None])
    tokens = cu_seqlens[rows].astype(np.int64)
    leading = bool(np.array_equal(tokens, np.arange(rows.size)))
    return _DecodeGroup(
        rows.size,
        None if leading else torch.from_numpy(tokens).to(device),
        torch.from_numpy(blocks.reshape(-1).astype(np.int64)).to(device),
        torch.from_numpy(mask[:, None, None, :]).to(device),
    )


def _plan_chunk(
    start: int, end: int, context: int, table: np.ndarray, size: int, window: int | None, device: torch.device
) -> _Chunk:
    queries = end - start
    done = context - queries
    if done == 0 and (window is None or context <= window):
        return _Chunk(start, end, None, queries, None)
    first = max(0, done + 1 - window) // size if window else 0
    last = -(-context // size)
    blocks = torch.from_numpy(table[first:last].astype(np.int64)).to(device)
    q = torch.arange(done, context, device=device)[:, None]
    k = torch.arange(first * size, context, device=device)
    mask = k <= q
    if window:
        mask &= k > q - window
    return _Chunk(start, end, blocks, context - first * size, mask)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """softmax(scale · q kᵀ) v of every token over its sequence's cached keys (PagedAttention, arXiv:2309.06180).

    q: [T, H, D]; k, v: [T, G, D], this step's own keys and values, which `write_kv` has already put into the caches.
    Returns [T, H, D].
    """
    out = torch.empty_like(q)
    for group in plan.groups:
        _decode(q, k_cache, v_cache, group, scale, out)
    for chunk in plan.chunks:
        _prefill(q, k, v, k_cache, v_cache, chunk, scale, out)
    return out


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _DecodeGroup, scale: float, out: Tensor) -> None:
    """One query per sequence. The H/G query heads that share a key head are its query rows, so keys are never repeated."""
    heads, dim, kv_heads = q.shape[1], q.shape[2], k_cache.shape[2]
    rows = q[: group.size] if group.tokens is None else q.index_select(0, group.tokens)
    keys, values = (
        c.index_select(0, group.blocks).view(group.size, -1, kv_heads, dim).transpose(1, 2) for c in (k_cache, v_cache)
    )
    attended = F.scaled_dot_product_attention(
        rows.view(group.size, kv_heads, heads // kv_heads, dim), keys, values, attn_mask=group.mask, scale=scale
    ).reshape(group.size, heads, dim)
    if group.tokens is None:
        out[: group.size] = attended
    else:
        out.index_copy_(0, group.tokens, attended)


def _prefill(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: _Chunk, scale: float, out: Tensor) -> None:
    """A chunk of one sequence: over itself alone (causal), or over cached keys with the chunk's mask."""
    kv_heads, dim = k.shape[1], k.shape[2]
    span = slice(chunk.start, chunk.end)
    if chunk.blocks is None:
        keys, values = k[span], v[span]
    else:
        keys, values = (c.index_select(0, chunk.blocks).view(-1, kv_heads, dim)[: chunk.keys] for c in (k_cache, v_cache))
    queries = q[span].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [G, H/G, queries, D]
    share = (kv_heads, queries.shape[1], chunk.keys, dim)
    out[span] = (
        F.scaled_dot_product_attention(
            queries,
            keys.transpose(0, 1).unsqueeze(1).expand(share),
            values.transpose(0, 1).unsqueeze(1).expand(share),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=scale,
        )
        .permute(2, 0, 1, 3)
        .flatten(1, 2)
    )
