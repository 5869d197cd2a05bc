"""Products of a few tokens with a big weight, where memory speed is the limit: M <= 128 rows of x against W [N, K].

The weight's rows take the tensor core's wide side (swap-AB: Wx, not xWᵀ), so that its instructions are full even at one token,
and K is split over several programs where N alone does not fill the GPU. The splits' fp32 partial results are not added here
but by the next kernel, in a fixed order: a result never depends on timing. `plan` fixes the tile sizes per shape; nothing is
tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, cdiv, is_hopper, next_power_of_2, pdl


@dataclass(frozen=True)
class Tile:
    """How a product is cut: BLOCK_N weight rows by BLOCK_K columns a program, `splits` programs along K."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1


def plan(n: int, k: int, m: int) -> Tile:
    """Tile for W [n, k] and m tokens. Measured on an H100 for Qwen2-7B's shapes; others take the nearest class.

    Up to 128 tokens all of them are one tile, so a stage holds 64 rows of W and m of x; six stages must fit 227 KB.
    """
    block_k = 128 if k % 128 == 0 else 64 if k % 64 == 0 else 32
    if m > 64:
        return Tile(64, min(64, block_k), 4, 6)
    if n >= 16384:
        return Tile(64, block_k, 4, 4 if m <= 16 else 6)
    if k >= 8192:
        return Tile(64, 256, 4, 3, 2) if 16 < m <= 32 and k % 256 == 0 else Tile(64, block_k, 4, 6, 2)
    splits = 4 if 1 < m <= 16 and n <= 4096 else 2
    if m == 1 and n <= 4096 and k % 256 == 0:
        return Tile(64, 256, 4, 3, splits)
    return Tile(64, block_k, 4, 4 if m <= 16 else 6, max(1, min(splits, k // (4 * block_k))))


@triton.jit
def _tile_product(
    x, w, w_desc, first_row, k_begin, k_end, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N, BLOCK_M]: rows first_row.. of W times x, over columns k_begin..k_end."""
    tokens, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    rows = first_row + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        if TMA:
            weight = w_desc.load([first_row, k])
        else:
            inside = (rows[:, None] < N) & (k + columns[None, :] < K)
            weight = tl.load(w + rows[:, None].to(tl.int64) * K + k + columns[None, :], mask=inside, other=0.0)
        inside_x = (tokens[:, None] < M) & (k + columns[None, :] < K)
        hidden = tl.load(x + tokens[:, None] * K + k + columns[None, :], mask=inside_x, other=0.0)
        acc = tl.dot(weight, tl.trans(hidden), acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def _partial_products(
    x, w, w_desc, out, M, N, K, K_SPLIT,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    begin(PDL)
    k_begin = split * K_SPLIT
    acc = _tile_product(x, w, w_desc, first, k_begin, min(k_begin + K_SPLIT, K), M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
    tokens, rows = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    where = (split * M + tokens[None, :]).to(tl.int64) * N + rows[:, None]
    tl.store(out + where, acc, mask=(tokens[None, :] < M) & (rows[:, None] < N))


@triton.jit(do_not_specialize=["M"])
def _gate_up_silu(
    x, w, w_desc, out, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    begin(PDL)
    acc = _tile_product(x, w, w_desc, first, 0, K, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
    pairs = tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, BLOCK_M]), [0, 2, 1])
    gate, up = tl.split(pairs)  # [BLOCK_N / 2, BLOCK_M]
    tokens, columns = tl.arange(0, BLOCK_M), first // 2 + tl.arange(0, BLOCK_N // 2)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + tokens[None, :] * (N // 2) + columns[:, None], value, mask=(tokens[None, :] < M) & (columns[:, None] < N // 2))


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


class SkinnyWeight:
    """A weight [N, K] prepared for these kernels; it keeps the TMA descriptors of the tiles that were used."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._descriptors: dict[tuple[int, int], object] = {}

    def descriptor(self, tile: Tile) -> tuple[object, bool]:
        """(TMA descriptor or the weight itself, whether it is a descriptor)."""
        if not is_hopper() or self.weight.shape[1] * self.weight.element_size() % 16:
            return self.weight, False
        key = (tile.block_n, tile.block_k)
        if key not in self._descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor

            self._descriptors[key] = TensorDescriptor.from_tensor(self.weight, [tile.block_n, tile.block_k])
        return self._descriptors[key], True


def partial_products(x: Tensor, w: SkinnyWeight, out: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """x [M, K] · W [N, K]ᵀ as fp32 partial results [S, M, N], whose sum over S is the product. M <= 128."""
    (m, k), n = x.shape, w.weight.shape[0]
    tile = tile or plan(n, k, m)
    out = torch.empty(tile.splits, m, n, dtype=torch.float32, device=x.device) if out is None else out
    descriptor, tma = w.descriptor(tile)
    k_split = cdiv(cdiv(k, tile.splits), tile.block_k) * tile.block_k
    _partial_products[(cdiv(n, tile.block_n), tile.splits)](
        x, w.weight, descriptor, out, m, n, k, k_split, BLOCK_M=max(16, next_power_of_2(m)), BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, TMA=tma, num_warps=tile.warps, num_stages=tile.stages, **pdl(),
    )  # fmt: skip
    return out


def gate_up_silu(x: Tensor, w: SkinnyWeight, out: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """silu(x·gateᵀ) · (x·upᵀ), [M, I], for W [2·I, K] whose rows are gate 0, up 0, gate 1, up 1, ...; M <= 128."""
    (m, k), n = x.shape, w.weight.shape[0]
    out = torch.empty(m, n // 2, dtype=x.dtype, device=x.device) if out is None else out
    if m == 1 and tile is None:
        _gate_up_silu_1[(cdiv(n // 2, 2),)](x, w.weight, out, n, k, BLOCK=2, BLOCK_K=512, num_warps=1, num_stages=4, **pdl(False))
        return out
    tile = tile or plan(n, k, m)
    descriptor, tma = w.descriptor(tile)
    _gate_up_silu[(cdiv(n, tile.block_n),)](
        x, w.weight, descriptor, out, m, n, k, BLOCK_M=max(16, next_power_of_2(m)), BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, TMA=tma, num_warps=tile.warps, num_stages=tile.stages, **pdl(),
    )  # fmt: skip
    return out


def logits(x: Tensor, w: SkinnyWeight, out: Tensor | None = None) -> Tensor:
    """x [M, K] · W [vocabulary, K]ᵀ as fp32 [M, vocabulary]; M <= 128."""
    (m, k), n = x.shape, w.weight.shape[0]
    out = torch.empty(m, n, dtype=torch.float32, device=x.device) if out is None else out
    if m == 1:
        _product_1[(cdiv(n, 8),)](x, w.weight, out, n, k, BLOCK=8, BLOCK_K=1024, num_warps=8, num_stages=3, **pdl(False))
        return out
    partial_products(x, w, out.view(1, m, n), Tile(64, 128 if k % 128 == 0 else 64, 4, 6) if m <= 64 else Tile(128, 64, 8, 6))
    return out
