"""The only door to the kernels: layers call these names and never ask which backend is behind them.

On a GPU, in bfloat16 or float16, our Triton kernels (`llmkit_kernels`); anywhere else `llmkit_kernels.reference`, plain torch.
Linear layers are torch's own matmul, or on a CPU oneDNN with a weight that was packed once (measured on an avx512-bf16 core:
7.2 against 11.9 ms for SmolLM2's matrices at one token, 16.7 against 22 ms at 32).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmkit_kernels import reference
from llmkit_kernels.reference import rms_norm, silu_mul
from torch import Tensor

__all__ = [
    "add_rms_norm",
    "cpu_supports_bf16",
    "describe",
    "gate_up_silu",
    "has_kernels",
    "linear",
    "rms_norm",
]


@functools.cache
def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our Triton kernels run there. In float32 they would round to tf32, so plain torch does."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.cuda is None:
        return False
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device)[0] >= 8


def cpu_supports_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than it would emulate it."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(weight: Tensor, bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """(x [T, in] -> x @ weight.T + bias [T, out], the weight [out, in], or None when only its packed form was kept)."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu_supports_bf16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        run = torch.ops.mkldnn._linear_pointwise.default
        return (lambda x: run(x, packed, bias, "none", [], "")), None
    return (lambda x: F.linear(x, weight, bias)), weight


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of residual + x, residual + x), both [T, H]; without a residual x begins it."""
    if has_kernels(x.device, x.dtype):
        from llmkit_kernels import norm

        return norm.add_rms_norm(x, residual, weight, eps), x if residual is None else residual
    return reference.add_rms_norm(x, residual, weight, eps)


def gate_up_silu(
    run: Callable[[Tensor], Tensor], weight: Tensor | None, bias: Tensor | None, pairs: bool
) -> Callable[[Tensor], Tensor]:
    """x [T, in] -> silu(gate) · up [T, I] for the merged layer that `run` computes, its weight [2·I, in] all gate rows first or,
    where our GPU kernels read it, in `pairs` of one gate and one up row."""
    if not pairs:
        return lambda x: silu_mul(run(x))
    from llmkit_kernels import activation, band_gemm, gemm
    from llmkit_kernels.prepared import PreparedWeight

    if bias is not None or weight is None:
        return lambda x: activation.silu_mul_pairs(run(x))
    kernels = PreparedWeight(weight)

    def compute(x: Tensor) -> Tensor:
        if 64 < len(x) <= gemm.MOST_TOKENS and not band_gemm.plan(*kernels.weight.shape, len(x)):
            # ours for so few lives on the kernels around it being ours, too: see `FusedForward`
            return activation.silu_mul_pairs(run(x))
        return gemm.gate_up_silu(x, kernels)

    return compute


def describe(device: torch.device, dtype: torch.dtype, attention: str = "") -> str:
    """One phrase for the start-up report. attention: who computes it, where that is worth a word."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    extra = ", Triton kernels" if has_kernels(device, dtype) else ""
    if device.type == "cpu" and dtype == torch.bfloat16 and cpu_supports_bf16():
        extra = ", oneDNN bf16"
    extra += f", attention: {attention}" if attention else ""
    return f"torch {torch.__version__} on {name}{extra}, {str(dtype).removeprefix('torch.')}"
