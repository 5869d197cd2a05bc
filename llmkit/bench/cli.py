"""`llmkit bench throughput|latency|startup|parity|timeline|kernels|serve`: arguments, and the way from them to a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench import serve_cli, timeline_cli
from llmkit.bench.engines import OTHERS as ENGINES
from llmkit.bench.engines import check as check_engines
from llmkit.bench.flags import check_folders, natural, own_name, positive
from llmkit.bench.kernels import cli as kernels_cli
from llmkit.config import DEFAULT_MODEL, DTYPE_NAMES, add_engine_arguments, engine_options
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.bench.ceilings import Ceilings
    from llmkit.bench.contenders import Contender, Subject
    from llmkit.bench.limits import Limits
    from llmkit.bench.report import Machine, Row

OTHERS = ("transformers",)
DTYPES = ("float32", "bfloat16", "float16")
OWN = ("batch", "input_len", "output_len", "prefill", "num_prompts", "workload", "static_batch", "repeat", "against")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the measurements to `llmkit bench`."""
    parser.set_defaults(measure=lambda args: _suite(args) if args.suite or args.peers else parser.print_help())
    _add_suite(parser)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_throughput(commands)
    _add_latency(commands)
    _add_startup(commands)
    _add_parity(commands)
    timeline_cli.add(commands)
    kernels_cli.add(commands)
    serve_cli.add(commands)


def _add_suite(parser: argparse.ArgumentParser) -> None:
    p = parser.add_argument_group("a suite of rows, each beside vLLM's figure and ours to reach")
    p.add_argument("--suite", choices=("h100",), help="models by their shapes, random weights: nothing is downloaded")
    p.add_argument("--rows", metavar="NAMES", help="only these, e.g. A-decode,B-nano (default: all)")
    p.add_argument("--against", choices=ENGINES, action="append", default=[], dest="peers",
                   help="have this engine, if it is installed, do the same work after llmkit")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="begin nothing that would not end in this time")
    p.add_argument("--repeat", type=positive, default=3, metavar="N", help="runs of each; medians are shown (default: 3)")
    p.add_argument("--tiny", action="store_true", help="tiny models and work: shows that every row can be measured")
    p.add_argument("--json", metavar="FILE", help="write a line of JSON a row, as soon as it is measured")
    p.add_argument("--markdown", action="store_true", help="print rows for llmkit/bench/RESULTS.md too")
    add_engine_arguments(parser, skip=("model", "tokenizer", "skip_tokenizer_init", "load_format", "max_model_len"))


def _suite(args: argparse.Namespace) -> int:
    """Measure a suite; the exit code."""
    from llmkit.bench.h100 import FULL, SMALL, Clock, select
    from llmkit.bench.suite import Suite, markdown

    if not args.suite:
        raise ConfigError(f"--against {args.peers[0]} goes with a suite", "add --suite h100")
    check_folders(args, "json")
    options, against = engine_options(args), tuple(dict.fromkeys(args.peers))
    check_engines(against, options)
    rows = select(args.rows)
    with open(args.json, "w", encoding="utf-8") if args.json else nullcontext() as out:
        suite = Suite(rows, SMALL if args.tiny else FULL, Clock(args.budget), args.repeat, out, options, against)
        try:
            return suite.run()
        finally:  # what is there is shown, whatever ended the rest
            if args.markdown:
                print("\n" + markdown(suite.results, suite.device_name, suite.options))


def run(args: argparse.Namespace) -> int | None:
    """Run what was asked; the exit code."""
    return args.measure(args)


def _command(commands: Any, name: str, help: str, measure: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    p.set_defaults(measure=measure)
    p.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL, help=f"what to run (default: {DEFAULT_MODEL})")
    p.add_argument("--against", choices=OTHERS, action="append", default=[], help="measure this engine too, in turn with llmkit")
    p.add_argument("--repeat", type=positive, default=3, metavar="N", help="runs of each; medians are shown (default: 3)")
    p.add_argument("--json", metavar="FILE", help="write everything there, every run included")
    p.add_argument("--markdown", action="store_true", help="print rows for llmkit/bench/RESULTS.md too")
    add_engine_arguments(p, skip=("model",))
    return p


def _add_throughput(commands: Any) -> None:
    p = _command(commands, "throughput", "many requests at once: tokens a second, share of the machine's limits", _throughput)
    p.add_argument("--workload", choices=("fixed", "nano", "sharegpt"), default="fixed",
                   help="lengths of the requests: all equal, nano-vLLM's 256, or 1000 like ShareGPT's (default: fixed)")
    p.add_argument("--num-prompts", type=positive, metavar="N", help="requests (default: 32 fixed ones, or all of the workload)")
    _add_lengths(p)
    p.add_argument("--static-batch", type=positive, default=32, metavar="N",
                   help="requests at once for engines without continuous batching (default: 32)")


def _add_latency(commands: Any) -> None:
    p = _command(commands, "latency", "time to first token, time per output token, prefill", _latency)
    p.add_argument("--batch", type=positive, nargs="+", default=[1], metavar="N",
                   help="requests at once, one after the other (default: 1)")
    p.add_argument("--prefill", type=natural, nargs="+", default=[512], metavar="LEN",
                   help="prompt lengths whose prefill is timed; 0 = none (default: 512)")
    _add_lengths(p)


def _add_startup(commands: Any) -> None:
    _command(commands, "startup", "fresh processes: from the start of Python to the first token, and peak memory", _startup)


def _add_parity(commands: Any) -> None:
    what = "does it choose transformers' tokens: greedy answers side by side; exits with 1 where float32 differs"
    p = commands.add_parser("parity", help=what, description=what[0].upper() + what[1:] + ".")
    p.set_defaults(measure=_parity)
    p.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL, help=f"what to run (default: {DEFAULT_MODEL})")
    p.add_argument("--dtypes", type=_dtypes, default=("float32", "bfloat16"), metavar="NAMES",
                   help="each in turn (default: float32,bfloat16)")
    p.add_argument("--num-prompts", type=positive, default=32, metavar="N", help="how many of the prompts (default: 32)")
    p.add_argument("--prompts", metavar="FILE", help="a prompt a line, instead of ours")
    p.add_argument("--output-len", type=positive, default=64, metavar="LEN", help="tokens of each answer (default: 64)")
    p.add_argument("--json", metavar="FILE", help="write everything there, each difference included")
    p.add_argument("--markdown", action="store_true", help="print rows for llmkit/bench/RESULTS.md too")
    add_engine_arguments(p, skip=("model", "tokenizer", "skip_tokenizer_init", "dtype", "load_format"))


def _dtypes(text: str) -> tuple[str, ...]:
    """argparse type: float32,bfloat16 in any of their spellings, each once."""
    names = [DTYPE_NAMES.get(n.strip(), n.strip()) for n in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(DTYPES)}; got {name!r}")
    return tuple(dict.fromkeys(names))


def _add_lengths(p: argparse.ArgumentParser) -> None:
    p.add_argument("--input-len", type=positive, default=128, metavar="LEN", help="tokens of each prompt (default: 128)")
    p.add_argument("--output-len", type=positive, default=128, metavar="LEN", help="tokens of each answer (default: 128)")


# ---- the measurements


@dataclass
class Bench:
    """What a measurement in this process works with."""

    subject: Subject
    ceilings: Ceilings
    limits: Limits
    contenders: list[Contender]
    load_before: float


@contextmanager
def prepared(
    args: argparse.Namespace, decodes: Sequence[int], prefills: Sequence[int] = (), static_batch: int = 32
) -> Iterator[Bench]:
    """Measure the ceilings, then load the contenders; they are closed at the end. decodes, prefills: step sizes that matter."""
    from llmkit.bench.ceilings import Step, measure_ceilings
    from llmkit.bench.contenders import CONTENDERS, Subject
    from llmkit.bench.limits import Limits, ModelCost
    from llmkit.bench.measure import say
    from llmkit.bench.report import load_average

    load = load_average()
    if args.against and not hasattr(args, "gpu_memory_utilization"):
        args.gpu_memory_utilization = 0.5  # on a GPU the others need room beside llmkit
    _check_same_work(args)
    subject = Subject.of({"model": args.model} | engine_options(args), static_batch)
    say("measuring the machine's ceilings")
    steps = [Step(n, n) for n in dict.fromkeys(decodes)] + [Step(n, 1) for n in dict.fromkeys(prefills)]
    ceilings = measure_ceilings(subject.device, subject.dtype, subject.model, steps)
    limits = Limits(ModelCost.of(subject.model, subject.dtype.itemsize, subject.kv_itemsize), ceilings.read, ceilings.matmul)
    with ExitStack() as stack:
        contenders: list[Contender] = []
        for name in names(args):
            say(f"loading {name}")
            contenders.append(CONTENDERS[name](subject))
            stack.callback(contenders[-1].close)
        yield Bench(subject, ceilings, limits, contenders, load)


def _check_same_work(args: argparse.Namespace) -> None:
    """ConfigError where llmkit would keep a cache that nobody else does."""
    if args.against and getattr(args, "kv_cache_dtype", "auto") != "auto":
        raise ConfigError("--against: others keep keys in the model's dtype: other work", "drop --kv-cache-dtype")


def names(args: argparse.Namespace) -> list[str]:
    """The contenders, llmkit first."""
    return list(dict.fromkeys(["llmkit", *args.against]))


def _throughput(args: argparse.Namespace) -> None:
    from llmkit.bench.throughput import measure_throughput
    from llmkit.bench.workload import NAMED, fixed

    check_folders(args, "json")
    if args.workload == "fixed":
        work = fixed(args.num_prompts or 32, args.input_len, args.output_len)
    else:
        work = NAMED[args.workload]().first(args.num_prompts)
    count = len(work.input_lens)
    with prepared(args, [1, count], static_batch=args.static_batch) as bench:
        rows = measure_throughput(bench.contenders, work, args.repeat, bench.limits, bench.subject.model.vocab_size)
        _show(args, "throughput", bench, rows)


def _latency(args: argparse.Namespace) -> None:
    from llmkit.bench.latency import LatencyPlan, measure_latency

    check_folders(args, "json")
    if args.output_len < 2:
        raise ConfigError("the time per output token needs at least two tokens", "--output-len 2 or more")
    prefills = tuple(n for n in args.prefill if n)
    plan = LatencyPlan(tuple(args.batch), args.input_len, args.output_len, prefills, args.repeat)
    with prepared(args, plan.batches, plan.prefills, max(plan.batches)) as bench:
        rows = measure_latency(bench.contenders, plan, bench.limits, bench.subject.model.vocab_size)
        _show(args, "latency", bench, rows)


def _startup(args: argparse.Namespace) -> None:
    from llmkit.bench.report import Machine, load_average
    from llmkit.bench.startup import measure_startup

    check_folders(args, "json")
    _check_same_work(args)
    load = load_average()
    rows, facts = measure_startup({"model": args.model} | engine_options(args), names(args)[1:], args.repeat)
    machine = Machine.here(facts["threads"], facts["gpu"] if facts["device"] != "cpu" else None, tuple(names(args)[1:]))
    _finish(args, "startup", facts["dtype"], machine, None, rows, load)


def _parity(args: argparse.Namespace) -> int:
    from llmkit.bench.contenders import Subject
    from llmkit.bench.measure import say
    from llmkit.bench.parity import ParityReport, encode, measure_parity, read_texts

    check_folders(args, "json")
    texts = read_texts(args.num_prompts, args.prompts)
    given = {"model": args.model, "enable_prefix_caching": False} | engine_options(args)  # no run helps the next one
    subjects = [Subject.of(given | {"dtype": name}, static_batch=args.num_prompts) for name in args.dtypes]
    prompts = encode(texts, subjects[0].folder)
    comparisons = measure_parity(subjects, prompts, args.output_len)
    say("")
    report = ParityReport(own_name(args.model), _machine(subjects[0], ("transformers",)), prompts, comparisons, given)
    report.options.pop("model")  # the report has its name
    print(report.text())
    if args.markdown:
        print("\n" + report.markdown())
    if args.json:
        Path(args.json).write_text(report.json() + "\n", encoding="utf-8")
    return 1 if report.failed else 0


def _machine(subject: Subject, others: tuple[str, ...]) -> Machine:
    """Where and with what this process measures."""
    import torch

    from llmkit.bench.report import Machine

    gpu = torch.cuda.get_device_name(subject.device) if subject.device.type == "cuda" else None
    return Machine.here(torch.get_num_threads(), gpu, others)


def _show(args: argparse.Namespace, name: str, bench: Bench, rows: list[Row]) -> None:
    machine = _machine(bench.subject, tuple(c.name for c in bench.contenders[1:]))
    _finish(args, name, bench.subject.dtype_name, machine, bench.ceilings, rows, bench.load_before)


def _finish(args: argparse.Namespace, name: str, dtype: str, machine: Any, ceilings: Ceilings | None, rows: list[Row],
            load: float) -> None:  # fmt: skip
    from llmkit.bench.measure import say
    from llmkit.bench.report import Report, add_ratios, load_average, warnings
    from llmkit.machine import num_cores

    add_ratios(rows)
    options = engine_options(args) | {n: getattr(args, n) for n in OWN if hasattr(args, n)}
    options.pop("model", None)  # the report has its name
    found = warnings(rows, load, load_average(), num_cores())
    report = Report(name, own_name(args.model), dtype, machine, ceilings, rows, options, found)
    say("")
    print(report.text())
    if args.markdown:
        print("\n" + report.markdown())
    if args.json:
        Path(args.json).write_text(report.json() + "\n", encoding="utf-8")
