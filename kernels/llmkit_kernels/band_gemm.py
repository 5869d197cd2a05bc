"""Products of some tens of tokens with a big weight, x [M, K] · W [N, K]ᵀ, in as many programs as the GPU has multiprocessors.

A program reads all of x for its rows of W. From some 33 tokens on, programs of few rows wait for the second-level cache, which
has to give x more often than memory gives W, and the last of them find most of the GPU idle. So each multiprocessor takes one
band of rows, as wide as its registers hold and such that all end together: 37,888 rows are 132 bands of 288, two tiles of 256
and 32, for a tile's side is a power of 2. On an H200 this product, gate and up of Qwen2-7B, takes 72 µs for 128 tokens where
bands of 64 rows take 87 and reading W takes 62.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, cdiv, descriptor, is_hopper, num_sms, pdl
from llmkit_kernels.prepared import PreparedWeight
from llmkit_kernels.wide_gemm import finish, load

MOST_TOKENS = 128  # of a band; further ones are further programs


@dataclass(frozen=True)
class Band:
    """`tokens` by block_n + block_n2 weight rows, block_k columns at a time, in one of `splits` programs along K."""

    tokens: int
    block_n: int
    block_n2: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Of W."""
        return self.block_n + self.block_n2


_OF_64 = [Band(64, 256, 32, 64, 4, 5), Band(64, 256, 0, 64, 4, 5), Band(64, 128, 64, 64, 4, 6)]
_OF_128 = [Band(128, 256, 32, 64, 8, 4), Band(128, 256, 0, 64, 8, 4), Band(128, 128, 64, 64, 8, 5)]
_PARTS = [Band(64, 128, 16, 128, 4, 4, s) for s in (4, 2)] + [Band(64, 128, 64, 64, 4, 4, s) for s in (4, 2)]


@functools.lru_cache(4096)
def plan(n: int, k: int, m: int) -> Band | None:
    """Bands of a big weight [n, k] for m tokens, K undivided: those that give the busiest multiprocessor the fewest rows. None
    where narrower programs, or others, are faster; measured on an H200 for the shapes of ten models."""
    if not _has_room(k) or not 32 < m <= MOST_TOKENS or n < 16384:
        return None
    rounds = lambda band: cdiv(cdiv(n, band.rows), num_sms())
    band = min(_OF_64 if m <= 64 else _OF_128, key=lambda band: rounds(band) * band.rows)
    idle = m <= 64 and cdiv(n, band.rows) < 0.7 * rounds(band) * num_sms()
    return None if idle else band


@functools.lru_cache(4096)
def plan_parts(n: int, k: int, m: int) -> Band | None:
    """Bands of a smaller weight [n, k] for m tokens, 17 to 64, K divided such that all multiprocessors but a few have one; else
    None."""
    if not _has_room(k) or not 16 < m <= 64 or n >= 16384 or k >= 8192 or n * k <= 8 << 20:
        return None
    programs = lambda band: cdiv(n, band.rows) * band.splits
    return next((band for band in _PARTS if 0.9 * num_sms() <= programs(band) <= num_sms()), None)


def _has_room(k: int) -> bool:
    return is_hopper() and k % 8 == 0  # TMA wants rows that begin at 16 bytes


@triton.jit(do_not_specialize=["M"])
def _band_product(
    x, x_desc, w, w_desc, w_desc2, out, M, N, K, K_TILES, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr, SILU: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, split, token = tl.program_id(0) * (BLOCK_N + BLOCK_N2), tl.program_id(1), tl.program_id(2) * BLOCK_M
    begin(PDL)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    for i in range(K_TILES):
        k = (split * K_TILES + i) * BLOCK_K
        hidden = load(x, x_desc, token, k, M, K, BLOCK_M, BLOCK_K, TMA)
        acc = tl.dot(hidden, tl.trans(load(w, w_desc, row, k, N, K, BLOCK_N, BLOCK_K, TMA)), acc)
        if BLOCK_N2 > 0:
            acc2 = tl.dot(hidden, tl.trans(load(w, w_desc2, row + BLOCK_N, k, N, K, BLOCK_N2, BLOCK_K, TMA)), acc2)
    part = out + split.to(tl.int64) * M * N
    if BLOCK_N2 > 0:
        finish(acc2, part, part, token, row + BLOCK_N, M, N, BLOCK_M, BLOCK_N2, SILU, False)
    finish(acc, part, part, token, row, M, N, BLOCK_M, BLOCK_N, SILU, False)


def _launch(x: Tensor, w: PreparedWeight, out: Tensor, band: Band, silu: bool) -> Tensor:
    (m, k), n = x.shape, w.weight.shape[0]
    w_desc, tma = w.descriptor(band.block_n, band.block_k)
    w_desc2 = w.descriptor(band.block_n2, band.block_k)[0] if band.block_n2 else w_desc
    x_desc = descriptor(x, band.tokens, band.block_k) if tma else x
    k_tiles = cdiv(cdiv(k, band.splits), band.block_k)
    _band_product[(cdiv(n, band.rows), band.splits, cdiv(m, band.tokens))](
        x, x_desc, w.weight, w_desc, w_desc2, out, m, n, k, k_tiles, BLOCK_M=band.tokens, BLOCK_N=band.block_n,
        BLOCK_N2=band.block_n2, BLOCK_K=band.block_k, SILU=silu, TMA=tma, num_warps=band.warps, num_stages=band.stages, **pdl(),
    )  # fmt: skip
    return out


def partial_products(x: Tensor, w: PreparedWeight, band: Band, out: Tensor | None = None) -> Tensor:
    """x [M, K] · W [N, K]ᵀ as fp32 partial results [splits, M, N], whose sum over the first is the product, of any M. Reference:
    `torch.nn.functional.linear`."""
    out = torch.empty(band.splits, x.shape[0], w.weight.shape[0], dtype=torch.float32, device=x.device) if out is None else out
    return _launch(x, w, out, band, silu=False)


def gate_up_silu(x: Tensor, w: PreparedWeight, band: Band, out: Tensor | None = None) -> Tensor:
    """silu(x·gateᵀ) · (x·upᵀ), [M, I], for W [2·I, K] whose rows are gate 0, up 0, gate 1, up 1, ...; any M, but a band
    with K undivided. Reference: `torch.nn.functional.linear`, then `reference.silu_mul` of its gates and ups."""
    assert band.splits == 1, "parts of a sum cannot be activated"
    out = torch.empty(x.shape[0], w.weight.shape[0] // 2, dtype=x.dtype, device=x.device) if out is None else out
    return _launch(x, w, out, band, silu=True)
