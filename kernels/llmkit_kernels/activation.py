"""SiLU · up over the merged gate/up product of many tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import cdiv

_BLOCK = 1024


@triton.jit
def _silu_mul_pairs(x, out, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    value = tl.load(x + row * 2 * WIDTH + both, mask=both < 2 * WIDTH, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(value, [BLOCK, 2]))
    tl.store(out + row * WIDTH + pair, gate * tl.sigmoid(gate) * up, mask=pair < WIDTH)


def silu_mul_pairs(x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up for x [T, 2·I] whose columns are gate 0, up 0, gate 1, up 1, ...; [T, I]."""
    width = x.shape[1] // 2
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device) if out is None else out
    _silu_mul_pairs[(x.shape[0], cdiv(width, _BLOCK))](x, out, width, BLOCK=_BLOCK, num_warps=4)
    return out
