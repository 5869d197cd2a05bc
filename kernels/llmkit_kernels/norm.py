"""RMSNorm, fused with what comes before it: the residual add, and the sum of a split-K product's partial results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, next_power_of_2, pdl


@triton.jit(do_not_specialize=["M"])
def _add_rms_norm(
    x, residual, weight, out, M, H, eps, SPLITS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    begin(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(x + (split * M + row) * H + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        # round the sum to the stream's dtype, as the unfused layers do
        total = total.to(residual.dtype.element_ty).to(tl.float32)
        total += tl.load(residual + row * H + columns, mask=inside, other=0.0).to(tl.float32)
        total = total.to(residual.dtype.element_ty).to(tl.float32)
        tl.store(residual + row * H + columns, total, mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / H + eps)
    tl.store(out + row * H + columns, total * scale * w, mask=inside)


def _warps(block: int) -> int:
    """Many: programs are placed while the kernel before still runs, and small ones crowd on the few multiprocessors that it
    leaves free. On an H100 240 rows of 1,024 columns take 4.4 µs with 2 warps each, 1.8 with 8."""
    return min(16, max(1, block // 128))


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """residual += x, then the norm of residual; without a residual, the norm of x.

    x: [M, H], or fp32 partial products [S, M, H], which are summed first, in order. residual: [M, H], updated in place.
    Returns [M, H] in weight's dtype. Reference: `reference.add_rms_norm`.
    """
    splits = x.shape[0] if x.dim() == 3 else 1
    rows, width = x.shape[-2:]
    out = torch.empty(rows, width, dtype=weight.dtype, device=x.device) if out is None else out
    block = next_power_of_2(width)
    _add_rms_norm[(rows,)](
        x, residual if residual is not None else x, weight, out, rows, width, eps,
        SPLITS=splits, ADD=residual is not None, BLOCK=block, num_warps=_warps(block), **pdl(),
    )  # fmt: skip
    return out


@triton.jit
def _embed_rms_norm(
    table, tokens, rows, weight, residual, out, H, eps, INDEXED: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    row = b
    if INDEXED:
        row = tl.load(rows + b)
    token = tl.load(tokens + row)
    x = tl.load(table + token * H + columns, mask=inside, other=0.0)
    tl.store(residual + b * H + columns, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + b * H + columns, x * scale * w, mask=inside)


def embed_rms_norm(table: Tensor, tokens: Tensor, rows: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The first residual, table[tokens[rows]], and its norm, both [M, H]. tokens: int64 [R]; rows: int64 [M], None for all."""
    count, width = len(tokens if rows is None else rows), table.shape[1]
    residual, out = torch.empty(2, count, width, dtype=table.dtype, device=table.device).unbind(0)
    block = next_power_of_2(width)
    _embed_rms_norm[(count,)](
        table, tokens, tokens if rows is None else rows, weight, residual, out, width, eps, INDEXED=rows is not None,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return residual, out
