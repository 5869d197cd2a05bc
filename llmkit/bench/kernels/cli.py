"""The command: which kernels at which sizes, one after the other, a line each as soon as it is measured."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench.flags import check_folders
from llmkit.bench.row_names import pick_rows
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from llmkit.bench.ceilings import Ceilings
    from llmkit.bench.kernels.work import Work
    from llmkit.models.config import ModelConfig


_TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4}  # relative distance from the same in float32


def add(commands: Any) -> None:
    """bench kernels."""
    what = "each GPU kernel alone: its time, the share of the machine's limit, torch's time for the same"
    p = commands.add_parser("kernels", help=what, description=what[0].upper() + what[1:] + ". Every result is checked.")
    p.set_defaults(measure=_measure)
    p.add_argument("models", metavar="MODEL", nargs="*", default=["A", "B"],
                   help="whose shapes: A (Qwen2-7B), B (Qwen3-0.6B), or a folder with a config.json (default: A B)")  # fmt: skip
    p.add_argument("--rows", metavar="NAMES", help="only these, e.g. A-attention,B-qkv-32 (default: all)")
    p.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of weights and keys (default: bfloat16)")
    p.add_argument("--tiny", action="store_true",
                   help="tiny shapes, launched without a graph: shows that every kernel can be measured, under "
                        "compute-sanitizer or, with TRITON_INTERPRET=1, without a GPU, too")
    p.add_argument("--json", metavar="FILE", help="write a line of JSON a kernel, as soon as it is measured")
    p.add_argument("--markdown", action="store_true", help="print rows for llmkit/bench/RESULTS.md too")


def _measure(args: argparse.Namespace) -> int:
    _check(args)
    shapes = {Path(name).name: _shape(name, args.tiny) for name in args.models}
    device, dtype = _device(args)
    import torch

    from llmkit.bench.kernels.cases import FULL, SMALL, cases
    from llmkit.bench.kernels.work import Inputs
    from llmkit.bench.report import Machine

    sizes = SMALL if args.tiny else FULL
    known: dict[str, Callable[[], Work]] = {}
    for name, config in shapes.items():
        known |= {f"{name}-{case}": make for case, make in cases(Inputs(config, device, dtype, sizes.rotate), sizes).items()}
    wanted = pick_rows(args.rows, known)
    machine = Machine.here(torch.get_num_threads(), torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    ceilings = _ceilings(device, dtype, next(iter(shapes.values())), args.tiny)
    print(f"llmkit bench kernels · {str(dtype).removeprefix('torch.')}\n{machine}\n{ceilings}\n\n{HEADING}", flush=True)
    results = []
    with open(args.json, "w", encoding="utf-8") if args.json else nullcontext() as out:
        _write(out, {"bench": "kernels", "machine": asdict(machine), "ceilings": asdict(ceilings)})
        for name in wanted:
            results.append({"name": name} | _one(known[name], device, ceilings, args.tiny))
            _write(out, results[-1])
            print(line(results[-1]), flush=True)
    if args.markdown:
        print("\n" + markdown(results, machine))
    return int(any(r["wrong"] for r in results))


def _check(args: argparse.Namespace) -> None:
    """Better now than after minutes of measuring."""
    check_folders(args, "json")
    if args.tiny and args.markdown:
        raise ConfigError("--tiny gives no figures that belong into a table", "leave out --tiny or --markdown")


def _shape(name: str, tiny: bool) -> ModelConfig:
    from llmkit.bench.h100 import MODELS, TINY
    from llmkit.models.config import ModelConfig

    if name in MODELS:
        return ModelConfig.from_dict(MODELS[name] | ({**TINY, "head_dim": 32} if tiny else {}))
    if not Path(name).is_dir():
        raise ConfigError(f"{name}: there is no such folder", f"give {', '.join(MODELS)}, or a folder with a config.json")
    return ModelConfig.from_folder(Path(name))


def _device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The GPU. Without one, Triton's interpreter: it shows that everything can be measured, its times mean nothing."""
    import torch

    from llmkit import ops

    dtype = getattr(torch, args.dtype)
    if torch.cuda.is_available() and ops.has_kernels(torch.device("cuda"), dtype):
        return torch.device("cuda"), dtype
    if os.environ.get("TRITON_INTERPRET") == "1" and args.tiny and importlib.util.find_spec("triton"):
        return torch.device("cpu"), torch.float32
    raise ConfigError(
        "there is no GPU here that runs our kernels (NVIDIA, compute capability 8 or later)",
        "llmkit bench throughput measures a CPU; with triton and TRITON_INTERPRET=1, --tiny runs here, too",
    )


def _ceilings(device: torch.device, dtype: torch.dtype, model: ModelConfig, tiny: bool) -> Ceilings:
    from llmkit.bench.ceilings import SIZES, Sizes, measure_ceilings

    return measure_ceilings(device, dtype, model, sizes=Sizes(1 << 20, 64, 1 << 16, 0.001) if tiny else SIZES[device.type])


def _one(make: Callable[[], Work], device: torch.device, ceilings: Ceilings, tiny: bool) -> dict[str, Any]:
    """Check, then time. What breaks one kernel leaves the others."""
    import torch

    try:
        torch.manual_seed(0)
        with torch.inference_mode():
            work = make()
            distance = work.error()
            seconds = _seconds(work.run, work.copies, device, tiny)
            by_torch = _seconds(work.by_torch, work.copies, device, tiny) if work.by_torch else None
    except Exception as error:
        said = "".join(traceback.format_exception(error))
        return {"error": f"{type(error).__name__}: {error}", "traceback": said, "wrong": True}
    limit = max(work.size / ceilings.read, work.flops / ceilings.matmul)
    return {"us": 1e6 * seconds, "bytes": work.size, "flops": work.flops, "gb_per_s": work.size / seconds / 1e9,
            "tflop_per_s": work.flops / seconds / 1e12, "limit_share": limit / seconds,
            "torch_us": 1e6 * by_torch if by_torch else None, "distance": distance,
            "wrong": distance is not None and not distance <= _TOLERANCE[ceilings.dtype]}  # fmt: skip


def _seconds(run: Callable[[int], Any], copies: int, device: torch.device, tiny: bool) -> float:
    """Of one launch, the best of many; on a GPU from a graph, so that the host's part is not in it."""
    import torch

    from llmkit.bench.ceilings import best_seconds

    if device.type != "cuda":  # interpreted: nobody compares it with anything
        begin = time.perf_counter()
        run(0)
        return time.perf_counter() - begin
    if tiny:  # for compute-sanitizer: the first capture failed under it
        return best_seconds(lambda: run(0), device, 0)
    run(0)
    graph, count = torch.cuda.CUDAGraph(), max(10, copies)
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i)
    return best_seconds(graph.replay, device, 0.05) / count


def _write(out: Any, value: dict[str, Any]) -> None:
    if out:
        out.write(json.dumps(value, ensure_ascii=False) + "\n")
        out.flush()


# ---- showing them

HEADING = f"{'kernel':<30} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'of limit':>9} {'torch us':>10} {'x torch':>8} {'distance':>9}"


def line(r: dict[str, Any]) -> str:
    """One kernel of the table. distance: from the same in float32."""
    if "error" in r:
        return f"{r['name']:<30} broke: {r['error'].splitlines()[0]}"
    rates = f"{r['us']:>10,.1f} {r['gb_per_s']:>8,.0f} {_cell(r['tflop_per_s'] or None, 8, ',.1f')} {r['limit_share']:>9.1%}"
    times = r["torch_us"] / r["us"] if r["torch_us"] else None
    beside = f"{_cell(r['torch_us'], 10, ',.1f')} {_cell(times, 8, '.2f')} {_cell(r['distance'], 9, '.1e')}"
    return f"{r['name']:<30} {rates} {beside}" + ("  WRONG" if r["wrong"] else "")


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'–' if value is None else format(value, form):>{width}}"


def markdown(results: list[dict[str, Any]], machine: Any) -> str:
    """Rows for RESULTS.md: date, device, what, figure, share of limit; right ones only."""
    rows, version = [], machine.versions["llmkit"]
    for r in results:
        if not r["wrong"]:
            rate = f"{r['tflop_per_s']:,.0f} TFLOP/s" if r["flops"] / r["bytes"] > 300 else f"{r['gb_per_s']:,.0f} GB/s"
            beside = f" (torch: {r['torch_us']:,.1f} us)" if r["torch_us"] else ""
            figure = f"{r['us']:,.1f} us, {rate}{beside}"
            rows.append(f"| {machine.date} | {machine.device} | kernels: {r['name']}, llmkit {version} | {figure} | "
                        f"{r['limit_share']:.0%} |")  # fmt: skip
    return "\n".join(rows)
