"""What stands between the qkv product and prefill attention: q/k norm, rotary embedding, KV write; one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, finite, kept, next_power_of_2, pdl


@triton.jit
def _finished(
    source, bias, columns, real, part_stride, DTYPE: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr
):
    """Columns of one token's product: parts summed in order, biased, rounded to DTYPE once."""
    total = tl.load(source + columns, mask=real, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(source + split * part_stride + columns, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    return total.to(DTYPE)


@triton.jit(do_not_specialize=["part_stride"])
def _rope_cache(
    qkv, bias, q_norm, k_norm, cos_table, sin_table, positions, slots, q_out, k_cache, v_cache, eps, qkv_stride, part_stride,
    out_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, VALUES: tl.constexpr,
    SPLITS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All heads of one token; HEADS and VALUES are H + G and G, rounded up."""
    DTYPE: tl.constexpr = q_out.dtype.element_ty
    CACHE: tl.constexpr = k_cache.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    heads, halves, dims = tl.arange(0, HEADS)[:, None], tl.arange(0, D // 2)[None, :], tl.arange(0, D)[None, :]
    values = tl.arange(0, VALUES)[:, None]
    slot = tl.load(slots + token)
    place = (slot // BLOCK_SIZE * G * BLOCK_SIZE + slot % BLOCK_SIZE) * D  # of key head 0
    source, real = qkv + token * qkv_stride, heads < H + G
    # the padding block stays as it is: whatever is there, nobody owns it
    stored = tl.where(slot >= BLOCK_SIZE, G, 0)  # heads whose key and value are stored
    begin(PDL)
    a = _finished(source, bias, heads * D + halves, real, part_stride, DTYPE, SPLITS, BIAS).to(tl.float32)
    b = _finished(source, bias, heads * D + D // 2 + halves, real, part_stride, DTYPE, SPLITS, BIAS).to(tl.float32)
    v = _finished(source, bias, (H + G + values) * D + dims, values < G, part_stride, DTYPE, SPLITS, BIAS)
    # 0 · NaN is NaN: a value that broke would reach whoever is given this block next, though masked. So 0 is kept, and the key,
    # which a mask does silence, is NaN: who does attend to it breaks, as he must.
    broken = tl.min(tl.min(finite(v).to(tl.int32), axis=1), axis=0) == 0
    tl.store(v_cache + place + values * BLOCK_SIZE * D + dims, kept(tl.where(finite(v), v, 0.0), CACHE), mask=values < stored)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        low = tl.where(heads < H, tl.load(q_norm + halves), tl.load(k_norm + halves)).to(tl.float32)
        high = tl.where(heads < H, tl.load(q_norm + D // 2 + halves), tl.load(k_norm + D // 2 + halves)).to(tl.float32)
        a = (a * scale * low).to(DTYPE).to(tl.float32)
        b = (b * scale * high).to(DTYPE).to(tl.float32)
    if ROTARY:
        position = tl.load(positions + token)
        c = tl.load(cos_table + position * D + halves).to(tl.float32)
        s = tl.load(sin_table + position * D + D // 2 + halves).to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
    query = q_out + token * out_stride + heads * D
    tl.store(query + halves, a, mask=heads < H)
    tl.store(query + D // 2 + halves, b, mask=heads < H)
    key, is_key = k_cache + place + (heads - H) * BLOCK_SIZE * D, (heads >= H) & (heads < H + stored)
    tl.store(key + halves, kept(tl.where(broken, float("nan"), a).to(DTYPE), CACHE), mask=is_key)
    tl.store(key + D // 2 + halves, kept(tl.where(broken, float("nan"), b).to(DTYPE), CACHE), mask=is_key)


def rope_cache(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    tables: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Norm and rotate q and k of qkv, store k and v at `slots` int64 [T], those of block 0 excepted, which is padding; returns q
    [T, H, D]. A token with a value that is not finite is stored with 0 in its place and keys of NaN.

    qkv: [T, H+2G, D], q is rotated in place; or fp32 partial products [S, T, H+2G, D], which are summed first, in order, and q
    is a tensor of its own, of `dtype` or else the cache's, which must not be float8 then. bias: [(H+2G)·D], still to be added.
    norms: q and k norm weights [D] and eps, or None. tables: cos and sin [positions, D], sin's first half negated, or None.
    Reference: `rms_norm`, `rotate`, `write_kv`.
    """
    splits = qkv.shape[0] if qkv.dim() == 4 else 1
    tokens, total, dim = qkv.shape[-3:]
    kv_heads, size = k_cache.shape[1:3]
    heads = total - 2 * kv_heads
    if qkv.dim() == 4 and dtype is None and k_cache.itemsize == 1:
        raise ValueError("a float8 cache does not say of which dtype the queries are: give dtype=")
    cos, sin = tables or (qkv, qkv)
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    q = qkv[:, :heads] if qkv.dim() == 3 else torch.empty(tokens, heads, dim, dtype=dtype or k_cache.dtype, device=qkv.device)
    _rope_cache[(tokens,)](
        qkv, qkv if bias is None else bias, q_norm, k_norm, cos, sin, positions, slots, q, k_cache, v_cache, eps, qkv.stride(-3),
        tokens * total * dim, q.stride(0), H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, HEADS=next_power_of_2(heads + kv_heads),
        VALUES=next_power_of_2(kv_heads), SPLITS=splits, BIAS=bias is not None, NORM=norms is not None, ROTARY=tables is not None,
        num_warps=4, **pdl(),
    )  # fmt: skip
    return q
