"""What every kernel's launch shares: programmatic dependent launch, what this GPU has, and compiling before the first one."""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_compiling = threading.Lock()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def is_hopper() -> bool:
    """TMA, programmatic dependent launch and the shared memory that tiles for them want: compute capability 9 and 10, say.
    GeForce's 12 has 99 KB of that, and goes the way of Ada."""
    return not INTERPRETED and torch.cuda.is_available() and capability() >= 9 and shared_memory() > 200_000


@functools.cache
def capability() -> int:
    """Of the current GPU, its first number; without one, an H100's."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9


def widest() -> int:
    """Columns that a product takes at once at most: Blackwell's tensor memory holds 512."""
    return 512 if capability() in (10, 11) else 1024


def pdl(wanted: bool = True) -> dict[str, bool]:
    """Launch arguments PDL= and launch_pdl= of a kernel whose first dependent read stands after `begin(PDL)`.

    With it a kernel starts while the one before still drains; every kernel of a chain must wait, so that order is transitive.
    """
    on = wanted and is_hopper()
    return {"PDL": on, "launch_pdl": on} if not INTERPRETED else {"PDL": False}


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the results of the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def finite(x):
    """Where x is neither infinite nor NaN."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def kept(x, CACHE: tl.constexpr):
    """x as a cache of this dtype keeps it: a number beyond float8's becomes its largest; float8 has no infinity, but NaN.
    Reference: `reference.kept`."""
    if tl.float8e4nv == CACHE:
        within = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x.to(tl.float32)))
        x = tl.where(finite(x), within, float("nan"))
    return x.to(CACHE)


@triton.jit
def in_float16(x):
    """x in float16, whose largest number stands for larger ones; what is not finite becomes NaN."""
    x = x.to(tl.float32)  # first: a bfloat16 is compared with 65,536, the next that it has
    within = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return tl.where(finite(x), within, float("nan")).to(tl.float16)


@functools.cache
def num_sms() -> int:
    """Multiprocessors of the current GPU; without one, as many as an H100 has."""
    if not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def memory_speed() -> float:
    """Bytes a second for which the GPU's memory is built: 3.35e12 on an H100, 4.8e12 on an H200; without a GPU, an H100's."""
    if not torch.cuda.is_available():
        return 3.35e12
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8


def cdiv(n: int, of: int) -> int:
    """n / of, rounded up. (Triton's own function of this name costs the host microseconds a call.)"""
    return -(-n // of)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.cache
def shared_memory() -> int:
    """Bytes of shared memory a program may have: 227 KB on Hopper (so, too, without a GPU), 163 on an A100, 99 elsewhere."""
    if not torch.cuda.is_available():
        return 232_448
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return getattr(properties, "shared_memory_per_block_optin", 101_376)


def stages_that_fit(wanted: int, stage: int) -> int:
    """Stages of a pipeline, at most `wanted`, whose buffers of `stage` bytes each fit; 1 if need be."""
    return max(1, min(wanted, shared_memory() // stage))


def descriptor(x: Tensor, rows: int, columns: int) -> object:
    """A TMA descriptor of tiles [rows, columns] of x [N, K]."""
    return TensorDescriptor(x, x.shape, x.stride(), [rows, columns])


def compile_ahead(body: Callable[[], object]) -> None:
    """Compile the kernels that `body` launches, side by side, and launch none: what torch computes in it means nothing.

    One after the other, as they are first launched, the kernels of a step take seconds. What does not compile says so when it is
    launched in earnest.
    """
    if INTERPRETED:
        return
    with _compiling:  # the class is changed for a while: by one thread at a time, lest the change be kept
        run, mine = JITFunction.run, threading.get_ident()

        def compile_or_run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return run(self, *args, grid=grid, warmup=warmup or threading.get_ident() == mine, **options)

        JITFunction.run = compile_or_run
        try:
            contextvars.copy_context().run(_side_by_side, body)  # Triton would stay in the mode after an interrupt
        finally:
            JITFunction.run = run


def _side_by_side(body: Callable[[], object]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        body()
