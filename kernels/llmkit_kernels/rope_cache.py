"""What stands between the qkv product and prefill attention: q/k norm, rotary embedding, KV write; one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_cache(
    qkv, q_norm, k_norm, cos_table, sin_table, positions, slots, k_cache, v_cache, eps, qkv_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    halves = tl.arange(0, D // 2)
    source = qkv + token * qkv_stride + head * D
    slot = tl.load(slots + token)
    a = tl.load(source + halves).to(tl.float32)
    b = tl.load(source + D // 2 + halves).to(tl.float32)
    row = ((slot // BLOCK_SIZE * G + head - H) * BLOCK_SIZE + slot % BLOCK_SIZE) * D
    if head >= H + G:
        row -= G * BLOCK_SIZE * D
        tl.store(v_cache + row + halves, a)
        tl.store(v_cache + row + D // 2 + halves, b)
    else:
        if NORM:
            norm = q_norm if head < H else k_norm
            scale = tl.rsqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / D + eps)
            a = (a * scale * tl.load(norm + halves).to(tl.float32)).to(qkv.dtype.element_ty).to(tl.float32)
            b = (b * scale * tl.load(norm + D // 2 + halves).to(tl.float32)).to(qkv.dtype.element_ty).to(tl.float32)
        if ROTARY:
            position = tl.load(positions + token)
            c = tl.load(cos_table + position * D + halves).to(tl.float32)
            s = tl.load(sin_table + position * D + D // 2 + halves).to(tl.float32)
            a, b = a * c - b * s, b * c + a * s
        if head < H:
            tl.store(source + halves, a)
            tl.store(source + D // 2 + halves, b)
        else:
            tl.store(k_cache + row + halves, a)
            tl.store(k_cache + row + D // 2 + halves, b)


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
    _rope_cache[(tokens, total)](
        qkv, q_norm, k_norm, cos, sin, positions, slots, k_cache, v_cache, eps, qkv.stride(0),
        H=heads, G=kv_heads, D=dim, BLOCK_SIZE=size, NORM=norms is not None, ROTARY=tables is not None, num_warps=1,
    )  # fmt: skip
    return qkv[:, :heads]

