"""Products of a few tokens with a big weight, where memory speed is the limit: up to some 128 rows of x against W [N, K].

The weight's rows take the tensor core's wide side (swap-AB: Wx, not xWᵀ), so that its instructions are full even at one token;
from some tens of tokens on big weights are shared out otherwise (`band_gemm`). K is split over several programs where N alone
does not fill the GPU. The splits' fp32 partial results are not added here but by the next kernel, in a fixed order: a result
never depends on timing. `plan` fixes the tile sizes per shape; nothing is tuned at run time. More tokens are right, too, but
mostly slower than `torch.nn.functional.linear`: `beats_cublas` knows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels import activation, band_gemm, wide_gemm
from llmkit_kernels.launch import begin, cdiv, descriptor, num_sms, pdl, shared_memory, stages_that_fit, widest
from llmkit_kernels.prepared import PreparedWeight

MOST_TOKENS = band_gemm.MOST_TOKENS  # of one tile; further ones are further programs
MOST_OF_HEAD = 64  # tokens whose logits are computed sooner here than by cuBLAS
_SMALL = 16 << 20  # bytes of a weight whose read is over before the launch of its kernel is


@dataclass(frozen=True)
class Tile:
    """How a product is cut: BLOCK_N weight rows by BLOCK_K columns a program, `splits` programs along K."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1


def beats_cublas(w: PreparedWeight, m: int) -> bool:
    """Whether our product of m tokens is faster, measured on an H100 within a whole step. Ours overlaps with the kernels around
    it and needs none to add up its parts; cuBLAS has tiles of any size, which counts where many tokens meet few rows."""
    n, k = w.weight.shape
    small = 2 * n * k <= _SMALL
    if m > MOST_TOKENS:
        return m <= 256 and small and (n > 2048 or m > 224)
    return m <= 96 or k >= 8192 or k >= n >= 2048 or small


def token_tiles(m: int) -> tuple[int, int]:
    """Two tile sizes (the second may be 0) of a program; it reads a weight tile once for both. More tokens than they hold are
    shared out among programs."""
    for first in (16, 32, 64):
        if m <= first:
            return first, 0
    if m <= 96:
        return 64, 32
    if MOST_TOKENS < m <= 192:
        return 128, 16 if m <= 144 else 32 if m <= 160 else 64
    return 128, 0


@functools.lru_cache(4096)
def plan(n: int, k: int, m: int) -> Tile:
    """Tile for W [n, k] and m tokens. Measured on an H100 for Qwen2-7B's shapes; others take the nearest class."""
    block_k = 128 if k % 128 == 0 else 64 if k % 64 == 0 else 32
    if m <= 32 and k % 512 == 0 and 2 * n * k <= _SMALL:
        return Tile(64, 512, 4, 1, k // 512)
    if m > 32 and is_deep(n, k):
        return plan_deep(n, m)
    if m > 64:
        return _plan_many(n, k, m, min(64, block_k))
    if n >= 16384:
        return Tile(64, block_k, 4, 4 if m <= 16 else 6 if m <= 32 else 3)
    if k >= 8192:
        return Tile(64, 256, 4, 3, 2) if m > 16 and k % 256 == 0 else Tile(64, block_k, 4, 6, 2)
    splits = 4 if 1 < m <= 16 and n <= 4096 else 2
    if 2 * n * k <= _SMALL and m > 32:
        return Tile(64, block_k, 4, 4, 1 if n > 2048 else max(1, min(4, k // (4 * block_k))))
    if m == 1 and n <= 4096 and k % 256 == 0:
        return Tile(64, 256, 4, 3, splits)
    stages = 4 if m <= 16 else 6 if m <= 32 else 3
    return Tile(64, block_k, 4, stages, max(1, min(splits, k // (4 * block_k))))


def is_deep(n: int, k: int) -> bool:
    """Whether a weight [n, k] has many columns for its rows: the first thing to divide is K."""
    return k >= 8192 and n < 16384


@functools.lru_cache(1024)
def plan_deep(n: int, m: int) -> Tile:
    """More than 32 tokens and a deep weight of n rows: programs of 64 or 128 rows and a part of K, such that the busiest
    multiprocessor, which takes one at a time, has the least to read; in few rounds and few parts, if there is a choice."""

    def cost(cut: tuple[int, int]) -> tuple[float, int, int, int]:
        rows, splits = cut
        rounds = cdiv(cdiv(n, rows) * splits, num_sms())
        return rounds * rows / splits, rounds, splits, rows

    rows, splits = min(((rows, splits) for rows in (64, 128) for splits in range(1, 6)), key=cost)
    if rows == 64:
        return Tile(64, 128, 4, 4 if m > 64 else 6, splits)
    return Tile(128, 64, 4, 6, splits) if m > 64 else Tile(128, 128, 4, 3, splits)


def _plan_many(n: int, k: int, m: int, block_k: int) -> Tile:
    """More than 64 tokens."""
    if n >= 16384:
        return Tile(64, block_k, 4, 3)
    if 2 * n * k <= _SMALL and m <= 192 and k % 512 == 0:
        return Tile(64, 128, 4, 3, 2 if n > 2048 else 4)
    if 2 * n * k <= _SMALL:
        return Tile(64, block_k, 4, 6, 1 if n > 2048 else max(1, min(3 if m <= MOST_TOKENS else 4, k // (4 * block_k))))
    return Tile(64, block_k, 4, 4 if n > 4096 else 6, max(1, min(3 if n > 4096 else 2, k // (4 * block_k))))


@functools.lru_cache(4096)
def fitting(tile: Tile, tokens: int, bytes_each: int) -> Tile:
    """The tile itself on a Hopper, for which it was planned; where shared memory is smaller, with fewer stages or columns."""
    column = (tile.block_n + tokens) * bytes_each
    block_k = tile.block_k
    least = min(2, tile.stages)  # fewer columns rather than waiting for each tile
    while block_k > 32 and least * column * block_k > shared_memory():
        block_k //= 2
    return replace(tile, block_k=block_k, stages=stages_that_fit(tile.stages, column * block_k))


@triton.jit
def _load_x(x, x_desc, first_token, k, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """[BLOCK_K, BLOCK_M] of xᵀ; zeros outside."""
    if TMA:
        return tl.trans(x_desc.load([first_token, k]))
    tokens, columns = first_token + tl.arange(0, BLOCK_M), k + tl.arange(0, BLOCK_K)
    inside = (tokens[:, None] < M) & (columns[None, :] < K)
    return tl.trans(tl.load(x + tokens[:, None] * K + columns[None, :], mask=inside, other=0.0))


@triton.jit
def _load_w(w, w_desc, first_row, k, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return w_desc.load([first_row, k])
    rows, columns = first_row + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    return tl.load(w + rows[:, None].to(tl.int64) * K + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(
    acc, out, first_row, split, first_token, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SILU: tl.constexpr
):
    """acc [BLOCK_N, BLOCK_M]; SILU: of pairs of rows, gate and up, silu(gate) · up."""
    tokens = first_token + tl.arange(0, BLOCK_M)
    if SILU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, BLOCK_M]), [0, 2, 1]))
        columns = first_row // 2 + tl.arange(0, BLOCK_N // 2)
        inside = (tokens[None, :] < M) & (columns[:, None] < N // 2)
        tl.store(out + tokens[None, :].to(tl.int64) * (N // 2) + columns[:, None], gate * tl.sigmoid(gate) * up, mask=inside)
    else:
        rows = first_row + tl.arange(0, BLOCK_N)
        where = (split * M + tokens[None, :]).to(tl.int64) * N + rows[:, None]
        tl.store(out + where, acc, mask=(tokens[None, :] < M) & (rows[:, None] < N))


@triton.jit(do_not_specialize=["M"])
def _product(
    x, x_desc, x_desc2, w, w_desc, out, M, N, K, K_TILES,
    BLOCK_M: tl.constexpr, BLOCK_M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SILU: tl.constexpr,
    EARLY: tl.constexpr, TMA: tl.constexpr, X_TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """EARLY: there is one tile along K, read while the kernel before this one still computes x."""
    first_row, split, first_token = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2) * BLOCK_M
    if EARLY:
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        weight = _load_w(w, w_desc, first_row, split * BLOCK_K, N, K, BLOCK_N, BLOCK_K, TMA)
        if PDL:
            tl.extra.cuda.gdc_wait()
        hidden = _load_x(x, x_desc, first_token, split * BLOCK_K, M, K, BLOCK_M, BLOCK_K, X_TMA)
        acc = tl.dot(weight, hidden)
    else:
        begin(PDL)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if BLOCK_M2 > 0:
            acc2 = tl.zeros([BLOCK_N, BLOCK_M2], tl.float32)
        for i in range(K_TILES):
            k = (split * K_TILES + i) * BLOCK_K
            weight = _load_w(w, w_desc, first_row, k, N, K, BLOCK_N, BLOCK_K, TMA)
            acc = tl.dot(weight, _load_x(x, x_desc, first_token, k, M, K, BLOCK_M, BLOCK_K, X_TMA), acc)
            if BLOCK_M2 > 0:
                acc2 = tl.dot(weight, _load_x(x, x_desc2, BLOCK_M, k, M, K, BLOCK_M2, BLOCK_K, X_TMA), acc2)
        if BLOCK_M2 > 0:
            _store(acc2, out, first_row, split, BLOCK_M, M, N, BLOCK_M2, BLOCK_N, SILU)
    _store(acc, out, first_row, split, first_token, M, N, BLOCK_M, BLOCK_N, SILU)


@triton.jit
def _gate_up_silu_1(x, w, out, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """One token: plain multiply-add, which reads the weight at the full speed of memory."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_K)
    inside = pair[:, None] < N // 2
    gate, up = tl.zeros([BLOCK, BLOCK_K], tl.float32), tl.zeros([BLOCK, BLOCK_K], tl.float32)
    row = w + (2 * pair[:, None]).to(tl.int64) * K
    begin(PDL)
    for k in range(0, K, BLOCK_K):
        keep = inside & (k + columns[None, :] < K)
        hidden = tl.load(x + k + columns, mask=k + columns < K, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(row + k + columns[None, :], mask=keep, other=0.0).to(tl.float32) * hidden
        up += tl.load(row + K + k + columns[None, :], mask=keep, other=0.0).to(tl.float32) * hidden
    g, u = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    tl.store(out + pair, g * tl.sigmoid(g) * u, mask=pair < N // 2)


@triton.jit
def _product_1(x, w, out, N, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """One token, [N] fp32."""
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    begin(PDL)
    for k in range(0, K, BLOCK_K):
        keep = (rows[:, None] < N) & (k + columns[None, :] < K)
        hidden = tl.load(x + k + columns, mask=k + columns < K, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(w + rows[:, None].to(tl.int64) * K + k + columns[None, :], mask=keep, other=0.0).to(tl.float32) * hidden
    tl.store(out + rows, tl.sum(acc, axis=1), mask=rows < N)


X_TMA_FROM = 16  # tokens; below, plain loads are as quick


def _launch(x: Tensor, w: PreparedWeight, out: Tensor, tile: Tile, silu: bool) -> Tensor:
    (m, k), n = x.shape, w.weight.shape[0]
    first, second = token_tiles(m)
    tile = fitting(tile, first + second, x.element_size())
    w_desc, tma = w.descriptor(tile.block_n, tile.block_k)
    x_tma = tma and (m > X_TMA_FROM or tile.block_k > 256)
    x_desc = descriptor(x, first, tile.block_k) if x_tma else x
    x_desc2 = descriptor(x, second, tile.block_k) if x_tma and second else x_desc
    k_tiles = cdiv(cdiv(k, tile.splits), tile.block_k)
    _product[(cdiv(n, tile.block_n), tile.splits, cdiv(m, first + second))](
        x, x_desc, x_desc2, w.weight, w_desc, out, m, n, k, k_tiles, BLOCK_M=first, BLOCK_M2=second, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, SILU=silu, EARLY=k_tiles == 1 and not second, TMA=tma, X_TMA=x_tma, num_warps=tile.warps,
        num_stages=tile.stages, **pdl(),
    )  # fmt: skip
    return out


def partial_products(x: Tensor, w: PreparedWeight, out: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """x [M, K] · W [N, K]ᵀ as fp32 partial results [S, M, N], whose sum over S is the product. out: of a given tile's splits."""
    (m, k), n = x.shape, w.weight.shape[0]
    if tile is None and out is None and (band := band_gemm.plan_parts(n, k, m)):
        return band_gemm.partial_products(x, w, band)
    tile = tile or plan(n, k, m)
    out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=x.device) if out is None else out
    return _launch(x, w, out, tile, silu=False)


def gate_up_silu(x: Tensor, w: PreparedWeight, out: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """silu(x·gateᵀ) · (x·upᵀ), [M, I], for W [2·I, K] whose rows are gate 0, up 0, gate 1, up 1, ...; any M."""
    (m, k), n = x.shape, w.weight.shape[0]
    if m > MOST_TOKENS and tile is None:
        return _gate_up_silu_many(x, w, out)
    if tile is None and (band := band_gemm.plan(n, k, m)):
        return band_gemm.gate_up_silu(x, w, band, out)
    out = torch.empty(m, n // 2, dtype=x.dtype, device=x.device) if out is None else out
    small = m <= 32 and k in (512, 1024) and k <= widest() and 2 * n * k <= _SMALL
    if small and tile is None:
        tile = Tile(64, k, 4, 1)
    if m == 1 and tile is None:
        _gate_up_silu_1[(cdiv(n // 2, 2),)](x, w.weight, out, n, k, BLOCK=2, BLOCK_K=512, num_warps=1, num_stages=4, **pdl(False))
        return out
    tile = tile or plan(n, k, m)
    if tile.splits > 1:
        tile = Tile(tile.block_n, min(128, tile.block_k), tile.warps, max(3, tile.stages))
    return _launch(x, w, out, tile, silu=True)


def _gate_up_silu_many(x: Tensor, w: PreparedWeight, out: Tensor | None) -> Tensor:
    """More than 128 tokens: the kernel for few where the weight is small, the one for many, or cuBLAS and one more pass."""
    (m, k), n = x.shape, w.weight.shape[0]
    if m <= 256 and 2 * n * k <= _SMALL:
        return gate_up_silu(x, w, out, Tile(64, 128, 4, 3) if m <= 192 else Tile(128, 64, 8, 6))
    tile = wide_gemm.plan(n, k, m)
    if tile is None:
        return activation.silu_mul_pairs(F.linear(x, w.weight), out)
    return wide_gemm.gate_up_silu(x, w, tile, out)


def logits(x: Tensor, w: PreparedWeight, out: Tensor | None = None) -> Tensor:
    """x [M, K] · W [vocabulary, K]ᵀ as fp32 [M, vocabulary]."""
    (m, k), n = x.shape, w.weight.shape[0]
    out = torch.empty(m, n, dtype=torch.float32, device=x.device) if out is None else out
    if m == 1:
        _product_1[(cdiv(n, 8),)](x, w.weight, out, n, k, BLOCK=8, BLOCK_K=1024, num_warps=8, num_stages=3, **pdl(False))
        return out
    tile = plan(n, k, m)
    return _launch(x, w, out.view(1, m, n), Tile(tile.block_n, tile.block_k, tile.warps, tile.stages), silu=False)[0]
