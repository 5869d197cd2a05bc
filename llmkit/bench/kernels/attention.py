"""Attention of one decoding step, of whole prompts, and what comes before the latter."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from llmkit_kernels import decode_attention, prefill_attention, reference
from llmkit_kernels.rope_cache import rope_cache
from torch import Tensor

from llmkit.bench.kernels.work import Inputs, Work

_BLOCK = 64  # tokens of a KV block, the engine's own choice


def decode(given: Inputs, batch: int, context: int, stored: torch.dtype | None = None) -> Work:
    """One new token each of `batch` sequences: from the product's partial results to the heads' outputs. stored: the cache's
    dtype, where it is not the queries'."""
    c, blocks, stored = given.config, -(-context // _BLOCK), stored or given.dtype
    read = 2 * context * c.num_kv_heads * c.head_dim * stored.itemsize * batch
    copies = given.copies(read)
    k_cache, v_cache, tables = _cache(given, copies * batch, blocks)
    k_cache, v_cache = k_cache.to(stored), v_cache.to(stored)
    positions = torch.full((batch,), context - 1, device=given.device)
    parts = given.normal(2, batch, given.qkv_width, dtype=torch.float32)
    cut = decode_attention.plan_decode(batch, c.num_kv_heads, stored.itemsize)
    scratch = decode_attention.DecodeScratch(batch, c.num_heads, c.num_kv_heads, c.head_dim, given.device, cut)
    out = given.poisoned(batch, c.num_heads * c.head_dim)

    def run(i: int) -> Tensor:
        where = k_cache, v_cache, tables[i % copies * batch :][:batch], positions, None
        return decode_attention.fused_decode(
            parts, given.bias, given.norms, given.rope, *where, c.head_dim**-0.5, None, scratch, out
        )

    def want() -> Tensor:
        q, k, v = _rotated(given, parts.sum(0), positions, given.bias)
        keys, values = (_sequences(cache, tables[:batch], context).float() for cache in (k_cache, v_cache))
        keys[:, -1], values[:, -1] = (reference.kept(x, stored).float() for x in (k, v))
        return torch.stack([_attend(*each)[0] for each in zip(q.float()[:, None], keys, values)]).flatten(1)

    return Work(run, copies, read + parts.nbytes + out.nbytes, 4 * batch * context * c.num_heads * c.head_dim, want)


def prefill(given: Inputs, count: int, length: int) -> Work:
    """`count` whole prompts, whose keys are in the cache already."""
    c, tokens = given.config, count * length
    k_cache, v_cache, tables = _cache(given, count, -(-length // _BLOCK))
    q, out = given.normal(tokens, c.num_heads, c.head_dim), given.poisoned(tokens, c.num_heads, c.head_dim)
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=given.device)
    contexts = torch.full((count,), length, dtype=torch.int32, device=given.device)
    sequence, first = torch.from_numpy(prefill_attention.query_tiles(np.full(count, length))).to(given.device).unbind(0)
    by_tma = [prefill_attention.cache_descriptor(cache) for cache in (k_cache, v_cache)]
    descriptors = None if by_tma[0] is None else (by_tma[0], by_tma[1])
    keys, values = (_sequences(cache, tables, length) for cache in (k_cache, v_cache))
    each = q.view(count, length, c.num_heads, c.head_dim), keys, values
    heads_first = [x.transpose(1, 2).contiguous() for x in each]

    def run(i: int) -> Tensor:
        return prefill_attention.prefill(
            q, k_cache, v_cache, ends, contexts, tables, (sequence, first), c.head_dim**-0.5, None, out, descriptors
        )

    def want() -> Tensor:
        return torch.cat([_attend(*(x.float() for x in one)) for one in zip(*each)])

    def by_torch(i: int) -> Tensor:
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)  # pyright: ignore

    flops = 4 * count * (length * (length + 1) // 2) * c.num_heads * c.head_dim
    return Work(run, 1, 2 * q.nbytes + sum(x.nbytes for x in heads_first[1:]), flops, want, by_torch=by_torch)


def rotate_and_store(given: Inputs, tokens: int) -> Work:
    """q/k norm, rotation and KV write of a step of prompts."""
    c = given.config
    k_cache, v_cache, _ = _cache(given, 1, -(-tokens // _BLOCK))
    positions = torch.arange(tokens, device=given.device)
    qkv = given.normal(tokens, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
    before, slots = qkv.clone(), positions + _BLOCK  # block 0 is nobody's

    def run(i: int) -> Tensor:
        return rope_cache(qkv, given.norms, given.rope, positions, slots, k_cache, v_cache)

    def want() -> Tensor:
        return torch.cat(_rotated(given, before.flatten(1).float(), positions, None), 1)

    def result(q: Tensor) -> Tensor:
        return torch.cat([q, *(cache.transpose(1, 2).flatten(0, 1)[slots] for cache in (k_cache, v_cache))], 1)

    return Work(run, 1, 2 * qkv.nbytes, want=want, result=result)


def _cache(given: Inputs, sequences: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in shuffled blocks, and block tables int32 [sequences, blocks]; block 0 is nobody's."""
    shape = (sequences * blocks + 1, given.config.num_kv_heads, _BLOCK, given.config.head_dim)
    order = torch.randperm(sequences * blocks, device=given.device).int() + 1
    return given.normal(*shape), given.normal(*shape), order.view(sequences, blocks)


def _sequences(cache: Tensor, tables: Tensor, length: int) -> Tensor:
    """[S, length, G, D]: the first tokens of each sequence."""
    return cache[tables.long()].transpose(2, 3).flatten(1, 2)[:, :length]


def _rotated(given: Inputs, qkv: Tensor, positions: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, heads, D] of the product fp32 [T, (H+2G)·D], rounded where a model's layers round."""
    c = given.config
    total = (qkv if bias is None else qkv + bias).to(given.dtype).unflatten(1, (-1, c.head_dim))
    q, k, v = total.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
    if given.norms:
        q, k = (reference.rms_norm(x, weight, c.norm_eps) for x, weight in zip((q, k), given.norms[:2]))
    cos, sin = (t[positions][:, None].float() for t in given.rope)
    q, k = (reference.rotate(x.float(), cos, sin).to(given.dtype) for x in (q, k))
    return q, k, v


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v of one sequence's last tokens, one or all: q [T, H, D], keys and values [K, G, D], float32."""
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, is_causal=len(q) > 1).transpose(0, 1)
