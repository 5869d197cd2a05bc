"""Products of many tokens, compute-bound, for prompts: x [M, K] against W [N, K].

For gate and up with SiLU in its end: cuBLAS multiplies as fast, but then writes twice what is needed, and one more kernel reads
it all, a tenth of the product's time. And for results whose bits never depend on M (`fixed_gemm`), of which cuBLAS says nothing.
As many programs as the GPU has multiprocessors take tile after tile, so that the next tile's loads run under the end of this one;
tiles that share rows of x or W are taken close to each other, so that both stay in the second-level cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import cdiv, descriptor, is_hopper, memory_speed, num_sms
from llmkit_kernels.prepared import PreparedWeight

_TOGETHER = 8  # tiles of tokens that take the same rows of the weight one after the other


@dataclass(frozen=True)
class WideTile:
    """BLOCK_M tokens by BLOCK_N weight rows, BLOCK_K columns at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@functools.lru_cache(4096)
def plan(n: int, k: int, m: int) -> WideTile | None:
    """Tile for W [n, k] and m tokens, measured on an H100 for Qwen2-7B's and Qwen3-0.6B's shapes; None where cuBLAS and a pass
    of SiLU are faster, or the GPU lacks what this kernel lives on."""
    if not is_hopper() or k % 8:  # TMA wants rows that begin at 16 bytes
        return None
    big = n * k >= 64 << 20
    if m <= 176 or (m <= 256 and not big):
        return None
    if m <= 192:
        return WideTile(64, 256, 64, 4, 4)
    if m <= 256 and memory_speed() < 4.5e12:  # an H200 feeds cuBLAS better
        return WideTile(128, 128, 64, 8, 6)
    if m < 448:
        return None
    if m < 768:
        return WideTile(64, 256, 64, 4, 4)
    return WideTile(128, 256, 64, 8, 4 if m < 4096 else 3)


@triton.jit
def load(x, desc, row, k, ROWS, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """[BLOCK, BLOCK_K] of x [ROWS, K] from (row, k) on; zeros outside."""
    if TMA:
        tile = desc.load([row, k])
    else:
        rows, columns = row + tl.arange(0, BLOCK)[:, None], k + tl.arange(0, BLOCK_K)[None, :]
        tile = tl.load(x + rows.to(tl.int64) * K + columns, mask=(rows < ROWS) & (columns < K), other=0.0)
    return tile


@triton.jit
def _accumulate(
    x, x_desc, w, w_desc, token, row, first, end, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: the product's part of columns first..end."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first, end, BLOCK_K):
        hidden = load(x, x_desc, token, k, M, K, BLOCK_M, BLOCK_K, TMA)
        acc = tl.dot(hidden, tl.trans(load(w, w_desc, row, k, N, K, BLOCK_N, BLOCK_K, TMA)), acc)
    return acc


@triton.jit
def _store(out, out_desc, value, token, column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        out_desc.store([token, column], value)
    else:
        tokens, columns = token + tl.arange(0, BLOCK_M)[:, None], column + tl.arange(0, BLOCK_N)[None, :]
        tl.store(out + tokens.to(tl.int64) * N + columns, value, mask=(tokens < M) & (columns < N))


@triton.jit
def finish(
    acc, out, out_desc, token, row, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SILU: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Store acc [BLOCK_M, BLOCK_N] in out [M, N] from (token, row) on; SILU: in out [M, N/2], of pairs of columns, gate and up,
    silu(gate) · up."""
    if SILU:
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
        value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        _store(out, out_desc, value, token, row // 2, M, N // 2, BLOCK_M, BLOCK_N // 2, TMA)
    else:
        _store(out, out_desc, acc, token, row, M, N, BLOCK_M, BLOCK_N, TMA)


@triton.jit(do_not_specialize=["M"])
def _wide_product(
    x, x_desc, w, w_desc, out, out_desc, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, SILU: tl.constexpr, TOGETHER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=SPLITS == 1):
        band = tile // (TOGETHER * tiles_n)
        width = tl.minimum(tiles_m - band * TOGETHER, TOGETHER)
        within = tile % (TOGETHER * tiles_n)
        token, row = (band * TOGETHER + within % width) * BLOCK_M, within // width * BLOCK_N
        each = K // SPLITS
        total = _accumulate(x, x_desc, w, w_desc, token, row, 0, each, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        for split in tl.static_range(1, SPLITS):
            total += _accumulate(
                x, x_desc, w, w_desc, token, row, split * each, (split + 1) * each, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        finish(total, out, out_desc, token, row, M, N, BLOCK_M, BLOCK_N, SILU, TMA)


def _launch(x: Tensor, w: PreparedWeight, out: Tensor, tile: WideTile, splits: int, silu: bool) -> Tensor:
    (m, k), (n, columns) = x.shape, (w.weight.shape[0], out.shape[1])
    w_desc, tma = w.descriptor(tile.block_n, tile.block_k)
    tma = tma and columns % 8 == 0
    x_desc, out_desc = x, out
    if tma:
        x_desc = descriptor(x, tile.block_m, tile.block_k)
        out_desc = descriptor(out, tile.block_m, tile.block_n // 2 if silu else tile.block_n)
    tiles = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    _wide_product[(min(num_sms(), tiles),)](
        x, x_desc, w.weight, w_desc if tma else w.weight, out, out_desc, m, n, k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, SPLITS=splits, SILU=silu, TOGETHER=_TOGETHER, TMA=tma, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def gate_up_silu(x: Tensor, w: PreparedWeight, tile: WideTile, out: Tensor | None = None) -> Tensor:
    """silu(x·gateᵀ) · (x·upᵀ), [M, I], for W [2·I, K] whose rows are gate 0, up 0, gate 1, up 1, ...

    Nothing is rounded before the end. Reference: `torch.nn.functional.linear`, then `reference.silu_mul` of its gates and ups.
    """
    out = torch.empty(x.shape[0], w.weight.shape[0] // 2, dtype=x.dtype, device=x.device) if out is None else out
    return _launch(x, w, out, tile, 1, silu=True)


def product(x: Tensor, w: PreparedWeight, tile: WideTile, splits: int = 1, out: Tensor | None = None) -> Tensor:
    """x · Wᵀ as fp32 [M, N]: the sum, in order, of the products of `splits` equal parts of K, a multiple of splits · block_k
    unless splits is 1."""
    out = torch.empty(x.shape[0], w.weight.shape[0], dtype=torch.float32, device=x.device) if out is None else out
    return _launch(x, w, out, tile, splits, silu=False)
