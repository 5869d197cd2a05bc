"""What stands between the qkv product and prefill attention: q/k norm, rotary embedding, KV write; one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import next_power_of_2


@triton.jit
def _rope_cache(
    qkv, q_norm, k_norm, cos_table, sin_table, positions, slots, k_cache, v_cache, eps, qkv_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, VALUES: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """All heads of one token; HEADS and VALUES are H + G and G, rounded up."""
    token = tl.program_id(0).to(tl.int64)
    heads, halves, dims = tl.arange(0, HEADS)[:, None], tl.arange(0, D // 2)[None, :], tl.arange(0, D)[None, :]
    values = tl.arange(0, VALUES)[:, None]
    slot = tl.load(slots + token)
    place = (slot // BLOCK_SIZE * G * BLOCK_SIZE + slot % BLOCK_SIZE) * D  # of key head 0
    source, real = qkv + token * qkv_stride, heads < H + G
    a = tl.load(source + heads * D + halves, mask=real, other=0.0).to(tl.float32)
    b = tl.load(source + heads * D + D // 2 + halves, mask=real, other=0.0).to(tl.float32)
    v = tl.load(source + (H + G + values) * D + dims, mask=values < G, other=0.0)
    tl.store(v_cache + place + values * BLOCK_SIZE * D + dims, v, mask=values < G)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        low = tl.where(heads < H, tl.load(q_norm + halves), tl.load(k_norm + halves)).to(tl.float32)
        high = tl.where(heads < H, tl.load(q_norm + D // 2 + halves), tl.load(k_norm + D // 2 + halves)).to(tl.float32)
        a = (a * scale * low).to(qkv.dtype.element_ty).to(tl.float32)
        b = (b * scale * high).to(qkv.dtype.element_ty).to(tl.float32)
    if ROTARY:
        position = tl.load(positions + token)
        c = tl.load(cos_table + position * D + halves).to(tl.float32)
        s = tl.load(sin_table + position * D + D // 2 + halves).to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
    tl.store(source + heads * D + halves, a, mask=heads < H)
    tl.store(source + heads * D + D // 2 + halves, b, mask=heads < H)
    key, is_key = k_cache + place + (heads - H) * BLOCK_SIZE * D, (heads >= H) & real
    tl.store(key + halves, a, mask=is_key)
    tl.store(key + D // 2 + halves, b, mask=is_key)


def rope_cache(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    tables: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Norm and rotate q and k of qkv [T, H+2G, D] (q in place), store k and v at `slots` int64 [T]; returns q [T, H, D].

    norms: q and k norm weights [D] and eps, or None. tables: cos and sin [positions, D], sin's first half negated, or None.
    Reference: `rms_norm`, `rotate`, `write_kv`.
    """
    tokens, total, dim = qkv.shape
    kv_heads, size = k_cache.shape[1:3]
    heads = total - 2 * kv_heads
    cos, sin = tables or (qkv, qkv)
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    _rope_cache[(tokens,)](
        qkv, q_norm, k_norm, cos, sin, positions, slots, k_cache, v_cache, eps, qkv.stride(0),
        H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, HEADS=next_power_of_2(heads + kv_heads), VALUES=next_power_of_2(kv_heads),
        NORM=norms is not None, ROTARY=tables is not None, num_warps=4,
    )  # fmt: skip
    return qkv[:, :heads]

