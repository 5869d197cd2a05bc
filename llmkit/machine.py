"""What the machine lets this process use. Told without torch."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # a container sees its own limits here


def cgroup_bytes(name: str) -> list[int]:
    """[the limit in the container's file `name`], or [] where there is none."""
    text = _read(CGROUP / name).strip()
    return [int(text)] if text.isdigit() else []


def cgroup_cores() -> float | None:
    """Cores' worth of time a container may use (`docker run --cpus`); None without a limit."""
    quota, _, period = _read(CGROUP / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_name() -> str:
    """The model's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Names of the processor's abilities, as Linux spells them; empty elsewhere."""
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(key: str) -> str:
    lines = (line.partition(":") for line in _read(Path("/proc/cpuinfo")).splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def _read(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""
