"""Processor and memory, as a container's limits leave them."""

from __future__ import annotations

import math
import os
import sys

from llmkit.doctor.report import Finding, ok, warn
from llmkit.hub.cache import size_text
from llmkit.machine import cgroup_bytes, cgroup_cores, cpu_flags, cpu_name, num_cores

LITTLE_MEMORY = 2e9  # bytes; the default model needs about one


def cpu() -> list[Finding]:
    """Cores, whether bfloat16 is fast, and whether more threads than cores would fight for them."""
    cores, quota = num_cores(), cgroup_cores()
    usable = min(cores, max(1, math.floor(quota))) if quota else cores
    limited = f" (this container's share of {cores})" if usable < cores else ""
    detail = f"{cpu_name()}, {usable} core{'s' * (usable > 1)}{limited}, {bfloat16(cpu_flags())}"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    asked = int(threads) if threads.isdigit() else cores  # without the variable torch starts one thread a core it sees
    if asked > usable:
        slow = f"{detail}; {asked} threads would share them, which is slow"
        return [warn("cpu", slow, f"export OMP_NUM_THREADS={usable}")]
    few = f"; OMP_NUM_THREADS={threads} leaves {usable - asked} idle" if asked < usable else ""
    return [ok("cpu", detail + few, "unset OMP_NUM_THREADS" if few else None)]


def bfloat16(flags: set[str]) -> str:
    """What the processor does with bfloat16, the format of most models."""
    if not flags:
        return "bf16 unknown" if sys.platform != "darwin" else "float32"
    fast = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags]
    if fast:
        return f"fast bf16 ({fast[0]})"
    if {"avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "bf16 by AVX-512, not in hardware"
    return "no bf16: weights become float32, twice the size"


def memory() -> list[Finding]:
    """What is free, and a container's limit where there is one."""
    import psutil

    machine = psutil.virtual_memory()
    limits, used = cgroup_bytes("memory.max"), cgroup_bytes("memory.current")
    total = min([machine.total, *limits])
    free = min([machine.available, *(limit - use for limit, use in zip(limits, used))])
    detail = f"{size_text(free)} of {size_text(total)} free"
    if free < LITTLE_MEMORY:
        little = f"{detail}: little more than the default model needs"
        return [warn("memory", little, "close other notebooks, or LLM(..., kv_cache_memory=0.25)")]
    return [ok("memory", detail)]
