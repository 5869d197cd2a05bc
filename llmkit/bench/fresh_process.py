"""Engines in a process of their own: how long until one is ready, and what it leaves behind.

The process loads engines one after the other, asks each for a few tokens, closes it, and prints one line of JSON. Nothing is
imported before its clock starts. Run by llmkit.bench.h100.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

from llmkit.errors import LlmkitError

_CACHES = "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"
_MARK = "llmkit-fresh-process "
_CODE = "import time; begin = time.perf_counter(); from llmkit.bench.fresh_process import main; main(begin)"


def launch(package: str, options: dict[str, Any], loads: int, cache: str | None = None) -> dict[str, Any]:
    """What such a process says. package: whose engine. cache: the folder in which it finds and keeps compiled kernels."""
    command = [sys.executable, "-c", _CODE, package, str(loads), json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if cache:
        environment |= {name: os.path.join(cache, name.lower()) for name in _CACHES}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = [x.removeprefix(_MARK) for x in done.stdout.splitlines() if x.startswith(_MARK)]
    if done.returncode or not said:
        raise LlmkitError(f"the process ended with code {done.returncode}:\n{done.stderr[-2000:].strip()}")
    return json.loads(said[-1])


def used_memory() -> int:
    """Bytes of the GPU in use, by anybody; without a GPU this process's own."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    import psutil

    return psutil.Process().memory_info().rss


def main(begin: float) -> None:
    """The process. begin: when it began, before any import."""
    words = importlib.import_module(sys.argv[1])
    make, params = words.LLM, words.SamplingParams  # imported when first asked for
    facts: dict[str, Any] = {"import_s": time.perf_counter() - begin}
    loads, options = int(sys.argv[2]), json.loads(sys.argv[3])
    ask = partial(params, temperature=0.6, ignore_eos=True, detokenize=False)
    before, held, above = 0, [], []
    for i in range(loads):
        if i == 0 and loads > 1:
            before = _context()
        begin = time.perf_counter()
        llm = make(**options)
        loaded = time.perf_counter()
        llm.generate([[1, 2, 3]], ask(max_tokens=1), use_tqdm=False)
        if i == 0:
            facts |= {"load_s": loaded - begin, "first_token_s": time.perf_counter() - loaded} | _report(llm)
        llm.generate([[1, 2, 3]] * 4, ask(max_tokens=8), use_tqdm=False)
        held.append(used_memory() - before)
        del llm
        above.append(_after_closing() - before)
    print(_MARK + json.dumps(facts | {"held": held, "above_before": above}))


def _report(llm: Any) -> dict[str, Any]:
    """What llmkit tells of a start; others tell nothing."""
    if not hasattr(llm, "startup_report"):
        return {}
    report = llm.startup_report()
    return {"stages": dict(report.stages), "facts": dict(report.facts)}


def _context() -> int:
    """Memory in use before any engine, once the device's own context is there, which no process can give back."""
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        torch.cuda.empty_cache()
    return used_memory()


def _after_closing() -> int:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return used_memory()
