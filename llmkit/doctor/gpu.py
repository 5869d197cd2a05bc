"""GPUs and what uses them: driver, CUDA, Triton, flash-attn. No GPU is fine: everything runs on the CPU."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.doctor.report import Finding, ok, warn
from llmkit.doctor.software import torch_build, version_of
from llmkit.hub.cache import size_text

PATIENCE = 5  # seconds for nvidia-smi, which hangs with a broken driver
FIELDS = "name,memory.total,memory.free,driver_version"
ASK = "import json; from llmkit.doctor.gpu import seen_by_torch; print(json.dumps(seen_by_torch()))"


@dataclass(frozen=True)
class Gpu:
    """As the driver reports it; bytes."""

    name: str
    total: int
    free: int
    driver: str


def gpu() -> list[Finding]:
    """The GPUs as the driver and as torch see them, then Triton and flash-attn."""
    found, problem = nvidia_smi()
    if problem:
        return [warn("gpu", f"{problem}: llmkit runs on the CPU", "nvidia-smi   # then restart, or install the driver again")]
    if not found:
        return [ok("gpu", _without_nvidia())]
    return [_gpu(found), triton(), flash_attn()]


def _without_nvidia() -> str:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return 'Apple GPU: LLM(..., device="mps")'
    return "none: CPU only (Triton and flash-attn are not needed)"


def _gpu(found: list[Gpu]) -> Finding:
    each = "; ".join(f"{g.name}, {size_text(g.free)} of {size_text(g.total)} free" for g in found)
    detail = f"{each}; driver {found[0].driver}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return ok("gpu", f"{detail}; hidden by CUDA_VISIBLE_DEVICES={hidden!r}: CPU only", "unset CUDA_VISIBLE_DEVICES")
    if version_of("torch") is None:
        return ok("gpu", detail)
    if torch_build()[0] == "cpu":
        return warn("gpu", f"{detail}; this torch is built for CPUs and cannot use it", "pip install --force-reinstall torch")
    seen = _ask_torch()
    if not seen["available"]:
        why = seen["problem"] or "torch sees no GPU"
        return warn("gpu", f"{detail}; {why}", "install a driver as new as torch's CUDA, or a torch built for an older CUDA")
    if min(seen["capabilities"]) < 8:
        return ok("gpu", f"{detail}; older than Ampere: plain torch instead of llmkit's own kernels")
    busy = [g for g in found if g.free < g.total / 2]
    if busy:
        return warn("gpu", f"{detail}; other processes hold more than half of it", "nvidia-smi   # shows who holds the memory")
    return ok("gpu", detail)


def nvidia_smi() -> tuple[list[Gpu], str]:
    """(the GPUs, "") or ([], what is wrong with the driver); ([], "") where there is no driver at all."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    try:
        command = [program, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (subprocess.TimeoutExpired, OSError) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__})"
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        return [], f"nvidia-smi says: {(lines or done.stderr.strip().splitlines() or ['nothing'])[0]}"
    return [_parse(line) for line in lines], ""


def _parse(line: str) -> Gpu:
    name, total, free, driver = (part.strip() for part in line.split(","))
    return Gpu(name, _mib(total), _mib(free), driver)


def _mib(text: str) -> int:
    """Some GPUs share the machine's memory and report `[N/A]`."""
    return int(text) << 20 if text.isdigit() else 0


def _ask_torch() -> dict[str, Any]:
    """What torch says of the GPUs, from a process of its own: importing it here would cost this one seconds and memory."""
    if "torch" in sys.modules:
        return seen_by_torch()
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=_environment())
    if done.returncode:
        return {"available": False, "problem": f"torch cannot be imported: {(done.stderr.strip().splitlines() or ['?'])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    """That process must find the llmkit that runs here, from a checkout too."""
    house = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([house, *filter(None, [os.environ.get("PYTHONPATH")])])}


def seen_by_torch() -> dict[str, Any]:
    """available, capabilities (the major number of each GPU), and why not when not."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    capabilities = [torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())] if available else []
    return {"available": available, "capabilities": capabilities, "problem": str(said[0].message) if said else ""}


def triton() -> Finding:
    """It compiles kernels when they are first used, for which it needs a C compiler and Python's headers."""
    version = version_of("triton")
    if version is None:
        return warn("triton", "not installed: plain torch instead of llmkit's own kernels", "pip install triton")
    if not any(map(shutil.which, [os.environ.get("CC") or "cc", "gcc", "clang"])):
        return warn("triton", f"{version}, but there is no C compiler, which it needs", "apt-get install -y gcc")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return warn("triton", f"{version}, but Python.h is missing, which it needs", "apt-get install -y python3-dev")
    return ok("triton", version)


def flash_attn() -> Finding:
    """Used where it is, never required."""
    version = version_of("flash-attn")
    return ok("flash-attn", version or "not installed, and not needed: llmkit has attention kernels of its own")
