"""Products whose every row has the same bits however many rows there are. For `deterministic=True`.

A tensor core adds a row's products to its fp32 accumulator in the order of K, sixteen at a time, whatever the shape of the tile
around it (on an H100 mma.sync and wgmma gave the same bits for all tiles that were tried). So tiles may suit the number of
tokens, if only K is cut at the same places, which here depend on the weight and the GPU alone, and the parts are added in the
same order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmkit_kernels import band_gemm, gemm, wide_gemm
from llmkit_kernels.gemm import MOST_TOKENS, Tile
from llmkit_kernels.launch import cdiv, is_hopper, num_sms
from llmkit_kernels.prepared import PreparedWeight
from llmkit_kernels.wide_gemm import WideTile


def splits_of(n: int, k: int) -> int:
    """Parts that K is cut into: more where few rows alone would not fill the GPU at one token."""
    wanted = 1 if n >= 16384 else gemm.plan_deep(n, MOST_TOKENS).splits if gemm.is_deep(n, k) else 4 if n <= 2048 else 2
    return next((splits for splits in range(wanted, 1, -1) if k % (128 * splits) == 0), 1)


def _few(n: int, k: int, m: int, splits: int) -> Tile:
    """At most 128 tokens, as `gemm.plan` would have it."""
    part = k // splits
    if m > 32 and gemm.is_deep(n, k) and part % 128 == 0:
        return replace(gemm.plan_deep(n, m), splits=splits)
    if m > 64 and num_sms() < cdiv(n, 64) * splits < 1.25 * num_sms():  # little more than one round of programs; so half of one
        return Tile(128, 64 if part % 64 == 0 else 32, 4, 6, splits)
    block_k = 128 if m <= 64 and part % 128 == 0 else 64 if part % 64 == 0 else 32
    stages = 4 if m <= 16 else 6 if m <= 32 else 3 if m <= 64 or n >= 16384 else 6 if n <= 4096 else 4
    return Tile(64, block_k, 4, stages, splits)


def _many(silu: bool, splits: int, m: int) -> WideTile:
    if not is_hopper():
        return WideTile(64, 128, 32, 4, 3)
    if splits > 1:  # two accumulators
        return WideTile(128, 128, 64, 8, 3)
    if m <= 768:
        return WideTile(64, 256, 64, 4, 4) if silu else WideTile(64, 128, 64, 4, 4)
    return WideTile(128, 256, 64, 8, 4 if m < 4096 else 3) if silu else WideTile(128, 128, 64, 8, 3)


def product(x: Tensor, w: PreparedWeight) -> Tensor:
    """x [M, K] · W [N, K]ᵀ as fp32 [S, M, N], whose sum over S, in order, is the product. S is 1 when M is above 128."""
    (m, k), n = x.shape, w.weight.shape[0]
    splits = splits_of(n, k)
    if m <= MOST_TOKENS:
        return gemm.partial_products(x, w, tile=_few(n, k, m, splits))
    return wide_gemm.product(x, w, _many(False, splits, m), splits)[None]


def gate_up_silu(x: Tensor, w: PreparedWeight) -> Tensor:
    """As `gemm.gate_up_silu`."""
    (m, k), n = x.shape, w.weight.shape[0]
    if band := band_gemm.plan(n, k, m):
        return band_gemm.gate_up_silu(x, w, band)
    if m <= MOST_TOKENS:
        return gemm.gate_up_silu(x, w, tile=_few(n, k, m, 1))
    return wide_gemm.gate_up_silu(x, w, _many(True, 1, m))


def logits(x: Tensor, w: PreparedWeight, out: Tensor | None = None) -> Tensor:
    """x [M, K] · W [vocabulary, K]ᵀ as fp32 [M, vocabulary]."""
    (m, k), n = x.shape, w.weight.shape[0]
    out = torch.empty(m, n, dtype=torch.float32, device=x.device) if out is None else out
    for first in range(0, m, MOST_TOKENS):
        part = x[first : first + MOST_TOKENS]
        there = out[None, first : first + len(part)]
        if band := band_gemm.plan(n, k, len(part)):
            band_gemm.partial_products(part, w, band, there)
        else:
            gemm.partial_products(part, w, there, _few(n, k, len(part), 1))
    return out
