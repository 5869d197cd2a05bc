"""The only door to the kernels: layers call these names and never ask which backend is behind them.

Today one backend stands behind the door, `llmkit_kernels.reference` (plain torch, any device). Linear layers have two: torch's
own matmul, and on a CPU oneDNN with a weight that was packed once (measured on an avx512-bf16 core: 7.2 against 11.9 ms for
SmolLM2's matrices at one token, 16.7 against 22 ms at 32).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmkit_kernels.reference import (
    AttentionPlan,
    CacheLayout,
    kv_rows,
    paged_attention,
    plan_attention,
    rms_norm,
    rotate,
    silu_mul,
    write_kv,
)
from torch import Tensor

__all__ = [
    "AttentionPlan",
    "CacheLayout",
    "cpu_supports_bf16",
    "describe",
    "kv_rows",
    "linear",
    "paged_attention",
    "plan_attention",
    "rms_norm",
    "rotate",
    "silu_mul",
    "write_kv",
]


def cpu_supports_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than it would emulate it."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [T, in] -> x @ weight.T + bias [T, out] for a weight [out, in] that will not change any more."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu_supports_bf16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        run = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: run(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def describe(device: torch.device) -> str:
    """One phrase for the start-up report."""
    packed = device.type == "cpu" and cpu_supports_bf16()
    return f"torch {torch.__version__} on {device}" + (", oneDNN bf16" if packed else "")
