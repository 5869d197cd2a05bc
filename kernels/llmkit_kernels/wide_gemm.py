"""The gate/up product of many tokens with SiLU in its end: x [M, K] against W [2·I, K], compute-bound, for prompts.

cuBLAS multiplies as fast, but then writes twice as much as is needed, and one more kernel reads it all: a tenth of the product's
time. Here as many programs as the GPU has multiprocessors take tile after tile, so that the next tile's loads run under the end of
this one; tiles that share rows of x or W are taken close to each other, so that both stay in the second-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import cdiv, descriptor, is_hopper, num_sms

_TOGETHER = 8  # tiles of tokens that take the same rows of the weight one after the other


@dataclass(frozen=True)
class WideTile:
    """BLOCK_M tokens by BLOCK_N weight rows, BLOCK_K columns at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def plan(n: int, k: int, m: int) -> WideTile | None:
    """Tile for W [n, k] and m tokens, measured on an H100 for Qwen2-7B's and Qwen3-0.6B's shapes; None where cuBLAS and a pass
    of SiLU are faster, or the GPU lacks what this kernel lives on."""
    if not is_hopper() or k % 8:  # TMA wants rows that begin at 16 bytes
        return None
    if m <= 256:
        big = n * k >= 64 << 20
        return None if m <= 176 or not big else WideTile(64, 256, 64, 4, 4) if m <= 192 else WideTile(128, 128, 64, 8, 6)
    if m < 448:
        return None
    if m < 768:
        return WideTile(64, 256, 64, 4, 4)
    return WideTile(128, 256, 64, 8, 4 if m < 4096 else 3)


@triton.jit
def _load(x, desc, row, k, ROWS, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """[BLOCK, BLOCK_K] of x [ROWS, K] from (row, k) on; zeros outside."""
    if TMA:
        tile = desc.load([row, k])
    else:
        rows, columns = row + tl.arange(0, BLOCK)[:, None], k + tl.arange(0, BLOCK_K)[None, :]
        tile = tl.load(x + rows.to(tl.int64) * K + columns, mask=(rows < ROWS) & (columns < K), other=0.0)
    return tile


@triton.jit(do_not_specialize=["M"])
def _gate_up_silu_wide(
    x, x_desc, w, w_desc, out, out_desc, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        band = tile // (TOGETHER * tiles_n)
        width = tl.minimum(tiles_m - band * TOGETHER, TOGETHER)
        within = tile % (TOGETHER * tiles_n)
        token, row = (band * TOGETHER + within % width) * BLOCK_M, within // width * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            hidden = _load(x, x_desc, token, k, M, K, BLOCK_M, BLOCK_K, TMA)
            acc = tl.dot(hidden, tl.trans(_load(w, w_desc, row, k, N, K, BLOCK_N, BLOCK_K, TMA)), acc)
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
        value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        if TMA:
            out_desc.store([token, row // 2], value)
        else:
            tokens, columns = token + tl.arange(0, BLOCK_M)[:, None], row // 2 + tl.arange(0, BLOCK_N // 2)[None, :]
            inside = (tokens < M) & (columns < N // 2)
            tl.store(out + tokens.to(tl.int64) * (N // 2) + columns, value, mask=inside)


def gate_up_silu(x: Tensor, weight: Tensor, tile: WideTile, out: Tensor | None = None) -> Tensor:
    """silu(x·gateᵀ) · (x·upᵀ), [M, I], for weight [2·I, K] whose rows are gate 0, up 0, gate 1, up 1, ...

    Nothing is rounded before the end. Reference: `torch.nn.functional.linear`, then `reference.silu_mul` of its gates and ups.
    """
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n // 2, dtype=x.dtype, device=x.device) if out is None else out
    tma = is_hopper() and k % 8 == 0 and n % 16 == 0
    descriptors = (
        (descriptor(x, tile.block_m, tile.block_k), descriptor(weight, tile.block_n, tile.block_k),
         descriptor(out, tile.block_m, tile.block_n // 2)) if tma else (x, weight, out)
    )  # fmt: skip
    tiles = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    _gate_up_silu_wide[(min(num_sms(), tiles),)](
        x, descriptors[0], weight, descriptors[1], out, descriptors[2], m, n, k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, TOGETHER=_TOGETHER, TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
