"""`llmkit bench timeline`: how busy the device is while it decodes, and with what."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench.flags import check_folders, positive
from llmkit.config import DEFAULT_MODEL, add_engine_arguments, engine_options
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit import LLM
    from llmkit.bench.report import Machine
    from llmkit.timeline import Timeline

SHOWN = 5  # kernels of each batch size; the JSON has all


def add(commands: Any) -> None:
    """bench timeline."""
    what = "share of time in which the device computes while it decodes, and its biggest kernels"
    p = commands.add_parser("timeline", help=what, description=what[0].upper() + what[1:] + ".")
    p.set_defaults(measure=_measure)
    p.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL, help=f"what to run (default: {DEFAULT_MODEL})")
    p.add_argument("--batch", type=_sizes, default=[1], metavar="N,N,...",
                   help="requests at once, one after the other (default: 1)")
    p.add_argument("--input-len", type=positive, default=128, metavar="LEN", help="tokens of each prompt (default: 128)")
    p.add_argument("--output-len", type=positive, default=64, metavar="LEN", help="tokens of each answer (default: 64)")
    p.add_argument("--json", metavar="FILE", help="write the figures there, with every kernel")
    p.add_argument("--save", metavar="FILE", help="keep the timelines: .json or .json.gz, for llmkit.timeline.load_timelines")
    add_engine_arguments(p, skip=("model",))


def _sizes(text: str) -> list[int]:
    """argparse type: 1,128."""
    try:
        return list(dict.fromkeys(positive(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, as 1,128; got {text!r}") from None


def _measure(args: argparse.Namespace) -> None:
    import llmkit
    from llmkit.bench.measure import say
    from llmkit.timeline import save_timelines

    _check(args)
    llm = llmkit.LLM(**({"model": args.model} | engine_options(args)))
    try:
        longest = llm.memory_plan().max_model_len
        if args.input_len + args.output_len > longest:
            raise ConfigError(f"this work needs a context of {args.input_len + args.output_len:,} tokens, llmkit has {longest:,}",
                              "ask for less with --input-len and --output-len, or drop or raise --max-model-len")  # fmt: skip
        found: dict[int, Timeline] = {}
        for batch in args.batch:
            say(f"batch {batch}")
            found[batch] = _decode(llm, batch, args.input_len, args.output_len)
    finally:
        llm.close()
    say("")
    machine = _machine(next(iter(found.values())))
    print(report(found, machine))
    if args.json:
        Path(args.json).write_text(json.dumps(figures(found, machine), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.save:
        save_timelines({f"batch {batch}": t for batch, t in found.items()}, args.save)


def _check(args: argparse.Namespace) -> None:
    """Better now than after minutes of measuring."""
    if args.output_len < 4:
        raise ConfigError("there are decode steps to compare only from the fourth token on", "--output-len 4 or more")
    check_folders(args, "json", "save")


def _decode(llm: LLM, batch: int, input_len: int, output_len: int) -> Timeline:
    """The decode steps of `batch` equal requests. The first is left out: it is the one for which the host has most to prepare."""
    from llmkit import SamplingParams
    from llmkit.bench.workload import fixed
    from llmkit.timeline import Timeline

    prompts = fixed(batch, input_len, output_len).prompts("timeline", llm._started.model_config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    return Timeline.record(llm, prompts, params).decode(first=1)


def _machine(timeline: Timeline) -> Machine:
    import torch

    from llmkit.bench.report import Machine

    return Machine.here(torch.get_num_threads(), None if timeline.device == "cpu" else timeline.device)


def report(found: dict[int, Timeline], machine: Machine) -> str:
    """For the terminal. found: decode steps by batch size."""
    first = next(iter(found.values()))
    how = "" if first.device == "cpu" else " · CUDA graphs" if first.graphs else " · no graphs"
    lines = [f"llmkit bench timeline · {first.model} · {first.dtype}{how}", str(machine)]
    for batch, t in found.items():
        each, busy = len(t.steps), t.wall * t.busy
        lines += ["", f"decode, batch {batch}: {t.plain_ms:.3f} ms a step, device busy {t.plain_busy:.1%}"
                  f" (under the profiler {t.per_step:.3f} ms, busy {t.busy:.1%})"]  # fmt: skip
        lines += [f"  {k.total / 1e3 / each:8.3f} ms  {k.total / busy:6.1%}  {k.count / each:6.1f} × {name}"
                  for name, k in list(t.by_kernel().items())[:SHOWN]]  # fmt: skip
    return "\n".join(lines)


def figures(found: dict[int, Timeline], machine: Machine) -> dict[str, Any]:
    """For --json."""
    first = next(iter(found.values()))
    rows = [
        {"batch": batch, "busy": t.plain_busy, "step_ms": t.plain_ms, "profiled_busy": t.busy, "profiled_step_ms": t.per_step,
         "steps": len(t.steps), "longest_gap_us": max((g.duration for g in t.gaps), default=0.0),
         "kernels": [{"name": name, "count": k.count, "total_us": k.total} for name, k in t.by_kernel().items()]}
        for batch, t in found.items()
    ]  # fmt: skip
    about = {"bench": "timeline", "model": first.model, "dtype": first.dtype, "graphs": first.graphs}
    return about | {"machine": asdict(machine), "rows": rows}
