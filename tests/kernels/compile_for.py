"""Compile every kernel for a GPU that is not here: `python compile_for.py 89` prints {kernel: bytes of shared memory} as JSON.
Run it with TRITON_INTERPRET=0.

A driver that only names the architecture stands in for the real one, and a launch ends where the binary would be loaded.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from unittest import mock

import torch
from llmkit_kernels import (
    activation,
    band_gemm,
    decode_attention,
    filters,
    fixed_attention,
    fixed_gemm,
    gemm,
    launch,
    norm,
    penalties,
    prefill_attention,
    prepared,
    rope_cache,
    sampling,
    wide_gemm,
)  # fmt: skip
from llmkit_kernels.prepared import PreparedWeight
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

LIMITS = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ARCHITECTURE = int(sys.argv[1])
CPU = torch.device("cpu")


class Absent:
    """What the compiler asks a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def pretend(found: dict[str, int]) -> None:
    """Compile instead of launching, for an architecture instead of a device; what programs share goes to `found`."""
    driver.set_active(Absent())
    compile_and_launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):  # type: ignore[no-untyped-def]
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        found[self.__name__] = max(found.get(self.__name__, 0), kernel.metadata.shared)

    JITFunction.run = run
    for module in (launch, band_gemm, decode_attention, fixed_attention, fixed_gemm, gemm, prefill_attention, prepared, sampling,
                   wide_gemm):
        for name, value in (("is_hopper", LIMITS[ARCHITECTURE] > 200_000), ("shared_memory", LIMITS[ARCHITECTURE]),
                            ("capability", ARCHITECTURE // 10)):  # fmt: skip
            if hasattr(module, name):
                setattr(module, name, lambda value=value: value)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def products() -> None:
    for n, k in ((4608, 3584), (3584, 18944), (1024, 3072)):
        for m in (32, 128):
            gemm.partial_products(empty(m, k), PreparedWeight(empty(n, k)))
    for n, k in ((37888, 3584), (6144, 1024)):
        for m in (1, 128):
            gemm.gate_up_silu(empty(m, k), PreparedWeight(empty(n, k)))
        for m in (144, 192, 256) if n * k < 1 << 23 else ():
            gemm.gate_up_silu(empty(m, k), PreparedWeight(empty(n, k)))
        for m in (180, 256, 500, 1000, 5000):
            tile = wide_gemm.plan(n, k, m) or wide_gemm.WideTile(64, 128, 32, 4, 3)
            wide_gemm.gate_up_silu(empty(m, k), PreparedWeight(empty(n, k)), tile)
    for n, k, m in itertools.product((37888, 28672, 24576), (4096,), (48, 128)):
        band = band_gemm.plan(n, k, m) or band_gemm.Band(64, 64, 16, 32, 4, 2)
        band_gemm.gate_up_silu(empty(m, k), PreparedWeight(empty(n, k)), band)
    for n, k in ((4608, 3584), (3584, 18944), (5120, 27648), (1536, 8960), (4096, 1024), (32000, 1024)):
        for m in (1, 32, 64, 128, 200, 5000):
            fixed_gemm.product(empty(m, k), PreparedWeight(empty(n, k)))
    for m in (1, 48, 128):
        fixed_gemm.logits(empty(m, 1024), PreparedWeight(empty(32000, 1024)))
        fixed_gemm.gate_up_silu(empty(m, 3584), PreparedWeight(empty(37888, 3584)))
    for m in (1, 128):
        gemm.logits(empty(m, 1024), PreparedWeight(empty(32000, 1024)))


def attention() -> None:
    stored = [torch.bfloat16, *([torch.float8_e4m3fn] if ARCHITECTURE >= 89 else [])]
    for dtype, (dim, cap) in itertools.product(stored, ((128, None), (256, None), (128, 50.0))):
        cache, tables = empty(10, 2, 64, dim, dtype=dtype), empty(128, 8, dtype=torch.int32)
        where, cos, ints = empty(128, dtype=torch.int64), empty(512, dim), empty(3, dtype=torch.int32)
        for batch in (1, 64, 128):
            cut = decode_attention.plan_decode(batch, 2, dtype.itemsize)
            scratch = decode_attention.DecodeScratch(batch, 8, 2, dim, CPU, cut)
            qkv, out = empty(2, batch, 12 * dim, dtype=torch.float32), empty(batch, 8 * dim)
            paged = cache, cache, tables, where, where
            decode_attention.fused_decode(qkv, None, None, (cos, cos), *paged, 1.0, None, scratch, out, cap)
        by_tma = prefill_attention.cache_descriptor(cache)
        both = None if by_tma is None else (by_tma, by_tma)
        q = rope_cache.rope_cache(empty(100, 12, dim), None, (cos, cos), where, where, cache, cache)
        parts = empty(2, 100, 12, dim, dtype=torch.float32)
        rope_cache.rope_cache(parts, None, (cos, cos), where, where, cache, cache, empty(12 * dim), torch.bfloat16)
        prefill_attention.prefill(q, cache, cache, ints, ints, tables, (ints, ints), 1.0, 70, None, both, cap)
        for window in (None, 70):
            fixed_attention.prefill(q, cache, cache, ints, ints, tables, (ints, ints), 1.0, window, None, both)
            for splits in (1, 8):
                scratch = fixed_attention.Scratch(100, 8, 2, dim, 1000, CPU, splits)
                fixed_attention.decode(q, cache, cache, tables, where, where, 1.0, window, scratch, empty(100, 8 * dim), both)


def others() -> None:
    norm.add_rms_norm(empty(4, 8, 3584, dtype=torch.float32), empty(8, 3584), empty(3584), 1e-6)
    norm.embed_rms_norm(empty(100, 64), empty(8, dtype=torch.int64), None, empty(64), 1e-6)
    activation.silu_mul_pairs(empty(4, 512))


def choosing() -> None:
    logits, rows, ints = empty(4, 32000, dtype=torch.float32), empty(4, dtype=torch.int64), empty(4, dtype=torch.int32)
    floats, scratch = empty(4, dtype=torch.float32), sampling.SampleScratch(4, 32000, CPU)
    before = penalties.Penalties(floats, floats, floats, empty(4, 32000, dtype=torch.int16))
    penalties.penalise(logits, rows, before)
    kept = filters.keep(logits, rows, floats, filters.Cuts(ints, floats, ints), filters.FilterScratch(4, 32000, CPU))
    for among in (None, kept):
        sampling.sample(logits, rows, floats, rows, rows, rows, rows, scratch, 4, among)
    penalties.count(rows, rows, before, 4)


def compiled_ahead() -> dict[str, list[bool]]:
    """Each kernel of a few that `compile_ahead` has seen -> whether it was compiled, before and after: by their caches."""
    seen = {"norm": norm._add_rms_norm, "silu": activation._silu_mul_pairs, "embed": norm._embed_rms_norm}
    run = launch.JITFunction.run
    caches = lambda: {name: bool(kernel.device_caches[0][0]) for name, kernel in seen.items()}
    before = caches()
    interrupt_compiling()
    launch.compile_ahead(others)
    assert launch.JITFunction.run is run, "as it was"
    return {name: [before[name], after] for name, after in caches().items()}


def interrupt_compiling() -> None:
    """Somebody presses stop while it waits for compilers: whatever is compiled later does not notice."""

    def interrupted(futures: object) -> None:
        raise KeyboardInterrupt

    with mock.patch("triton.runtime._async_compile.as_completed", interrupted), contextlib.suppress(KeyboardInterrupt):
        launch.compile_ahead(lambda: activation.silu_mul_pairs(empty(4, 514)))
        raise AssertionError("not interrupted")


if __name__ == "__main__":
    shared: dict[str, int] = {}
    driver.set_active(Absent())
    ahead = compiled_ahead()
    pretend(shared)
    for family in (products, attention, others, choosing):
        family()
    print(json.dumps({"shared": shared, "ahead": ahead}))
