"""What this machine can do, measured with torch in the same run as everything else: read, copy, multiply.

Read: the sum of float32 and the maximum of int32 over one array far larger than any cache, all torch threads, the better of
the two. Copy: bytes read plus bytes written. Matmul: a large square in the dtype of the model, and the model's own matrices
at the numbers of tokens that matter, their copies rotated so that no cache keeps them. Best of several repeats each.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from llmkit.models.config import ModelConfig

MiB = 1 << 20
Shape = tuple[int, int]  # [out, in] of a weight


@dataclass(frozen=True)
class Sizes:
    """How much is moved: bytes of the array that is read, side of the square matmul, bytes over which weights rotate, seconds
    a measurement may repeat."""

    read: int
    square: int
    rotate: int
    seconds: float


SIZES = {"cpu": Sizes(512 * MiB, 2048, 160 * MiB, 0.25), "cuda": Sizes(4096 * MiB, 8192, 512 * MiB, 0.1),
         "mps": Sizes(1024 * MiB, 4096, 256 * MiB, 0.25)}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A step by size: `tokens` through the layers, `sampled` of them through the output matrix."""

    tokens: int
    sampled: int

    def __str__(self) -> str:
        return f"decode {self.tokens}" if self.tokens == self.sampled else f"prefill {self.tokens}"


@dataclass
class Ceilings:
    """Bytes and FLOPs a second. model_matmul_ms: step -> ms that torch's own F.linear needs for all the model's matrices."""

    device: str
    dtype: str
    read: float
    copy: float
    matmul: float
    read_size: int
    square: int
    model_matmul_ms: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        line = (f"read {self.read / 1e9:,.1f} GB/s (sum over {self.read_size // MiB:,} MiB), copy {self.copy / 1e9:,.1f} GB/s "
                f"(read + write), {self.dtype} matmul {self.matmul / 1e12:,.2f} TFLOP/s ({self.square}³)")  # fmt: skip
        if self.model_matmul_ms:
            steps = ", ".join(f"{step} {ms:,.2f} ms" for step, ms in self.model_matmul_ms.items())
            line += f"\nthis model's matrices with torch's matmul: {steps}"
        return line


@torch.inference_mode()
def measure_ceilings(
    device: torch.device, dtype: torch.dtype, model: ModelConfig, steps: Sequence[Step] = (), sizes: Sizes | None = None
) -> Ceilings:
    """Measure; a few seconds. steps: those at which the model's matrices are timed."""
    sizes = sizes or SIZES[device.type]
    result = Ceilings(
        str(device), str(dtype).removeprefix("torch."), read_rate(device, sizes), copy_rate(device, sizes),
        matmul_rate(device, dtype, sizes), sizes.read, sizes.square,
    )  # fmt: skip
    for step in steps:
        result.model_matmul_ms[str(step)] = 1e3 * model_matmul_seconds(model, step, device, dtype, sizes)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def read_rate(device: torch.device, sizes: Sizes) -> float:
    """Bytes a second."""
    x = torch.ones(sizes.read // 4, dtype=torch.float32, device=device)
    integers = x.view(torch.int32)
    return sizes.read / min(best_seconds(f, device, sizes.seconds) for f in (x.sum, integers.amax))


def copy_rate(device: torch.device, sizes: Sizes) -> float:
    """Bytes read plus bytes written a second."""
    source = torch.ones(sizes.read // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, sizes.seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    """FLOPs a second of a square matmul."""
    a, b = (torch.randn(sizes.square, sizes.square, device=device).to(dtype) for _ in range(2))
    return 2 * sizes.square**3 / best_seconds(lambda: a @ b, device, 2 * sizes.seconds)


def model_matmul_seconds(model: ModelConfig, step: Step, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    """Seconds of all matrices of one step, each multiplied by F.linear with a weight that is in no cache."""
    layer = sum(_linear_seconds(shape, step.tokens, device, dtype, sizes) for shape in layer_matrices(model))
    head = _linear_seconds((model.vocab_size, model.hidden_size), step.sampled, device, dtype, sizes)
    return model.num_layers * layer + head


def layer_matrices(model: ModelConfig) -> list[Shape]:
    """[out, in] of a layer's matrices: merged q/k/v, output, merged gate/up, down."""
    heads = model.num_heads * model.head_dim
    qkv = heads + 2 * model.num_kv_heads * model.head_dim
    return [(qkv, model.hidden_size), (model.hidden_size, heads), (2 * model.intermediate_size, model.hidden_size),
            (model.hidden_size, model.intermediate_size)]  # fmt: skip


def _linear_seconds(shape: Shape, m: int, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    copies = max(1, min(64, sizes.rotate // (shape[0] * shape[1] * dtype.itemsize)))
    weights = torch.randn(copies, *shape, device=device, dtype=dtype)
    x = torch.randn(m, shape[1], device=device, dtype=dtype)
    turn = itertools.cycle(weights)
    inner = copies if m <= 64 else 1  # small calls are timed by the round, or the clock would be part of the figure

    def round_() -> None:
        for _ in range(inner):
            F.linear(x, next(turn))

    return best_seconds(round_, device, sizes.seconds / 2) / inner


def best_seconds(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """The fastest run of `work` after one to warm up: at least three, then until `budget` seconds are over."""
    clock = _cuda_seconds if device.type == "cuda" else _host_seconds
    clock(work, device)
    best, runs, begin = float("inf"), 0, time.perf_counter()
    while runs < 3 or time.perf_counter() - begin < budget:
        best, runs = min(best, clock(work, device)), runs + 1
    return best


def _host_seconds(work: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - begin


def _cuda_seconds(work: Callable[[], object], device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
