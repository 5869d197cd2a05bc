"""`llmkit bench serve`: arguments, and the way from them to a report."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bench.flags import check_folders, own_name, positive
from llmkit.config import DEFAULT_MODEL, add_engine_arguments, engine_options
from llmkit.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from llmkit.bench.asks import Ask, Source
    from llmkit.bench.load import Load, Run
    from llmkit.bench.workload import Workload
    from llmkit.client.openai import OpenAIClient

KEPT = ("workload", "num_prompts", "input_len", "output_len", "endpoint", "ignore_eos", "extra_body", "warmup", "rate",
        "concurrency")  # options that the JSON repeats
VOCAB = 10_000  # token ids drawn for a server that does not say how many it knows


def add(commands: Any) -> None:
    """bench serve."""
    what = "load on a server, ours or any OpenAI one: TTFT, TPOT, ITL, throughput"
    p = commands.add_parser("serve", help=what, description=what[0].upper() + what[1:] + ".")
    p.set_defaults(measure=_measure)
    p.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS,
                   help=f"what to serve (default: {DEFAULT_MODEL}); with --url, what the server calls it (default: its first)")
    p.add_argument("--url", help="measure the server there instead of starting one")
    p.add_argument("--api-key", metavar="KEY", help="its key (default: OPENAI_API_KEY)")
    load = p.add_mutually_exclusive_group()
    load.add_argument("--rate", type=_rate, nargs="+", metavar="R",
                      help="requests a second, at random times (Poisson), however slow the server is; inf = all at once; "
                      "several are measured in turn")  # fmt: skip
    load.add_argument("--concurrency", type=positive, nargs="+", metavar="N",
                      help="requests at once, a new one when one has ended (default: 8); several are measured in turn")
    p.add_argument("--num-prompts", type=positive, metavar="N", help="requests a load (default: 100, or all of the workload)")
    p.add_argument("--dataset", type=Path, metavar="FILE", help="prompts: ShareGPT's JSON, or JSON lines with prompt or messages")
    p.add_argument("--workload", choices=("fixed", "nano", "sharegpt"), default="fixed",
                   help="made-up prompts by length: all equal, nano-vLLM's 256, or 1000 like ShareGPT's (default: fixed)")
    p.add_argument("--input-len", type=positive, default=128, metavar="LEN", help="tokens of each made-up prompt (default: 128)")
    p.add_argument("--output-len", type=positive, metavar="LEN",
                   help="tokens of each answer (default: 128, or what the dataset says)")
    p.add_argument("--endpoint", choices=("completions", "chat"), help="default: completions, or chat for messages")
    p.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
                   help="let no answer end early (OpenAI's own servers do not know this: --no-ignore-eos)")
    p.add_argument("--extra-body", metavar="JSON", default="{}", help="more fields for every request")
    p.add_argument("--warmup", type=int, default=2, metavar="N", help="requests beforehand that do not count (default: 2)")
    p.add_argument("--json", metavar="FILE", help="write everything there, every request included")
    p.add_argument("--plot", metavar="FILE", type=Path, help="draw it: .png, .svg or .pdf")
    p.add_argument("--markdown", action="store_true", help="print rows for llmkit/bench/RESULTS.md too")
    add_engine_arguments(p, skip=("model", "skip_tokenizer_init"))


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return value


@dataclass
class Target:
    """The server to measure. model: as it calls it. vocab: token ids it knows, None when it does not say."""

    client: OpenAIClient
    model: str
    runs_on: str = "a server elsewhere"
    vocab: int | None = None


def _measure(args: argparse.Namespace) -> int:
    from llmkit.bench.load import Load
    from llmkit.bench.measure import say
    from llmkit.bench.report import load_average, warnings
    from llmkit.bench.serve_report import ServeReport
    from llmkit.machine import num_cores

    _check(args)
    load_before = load_average()
    loads = [Load(rate=r) for r in args.rate] if args.rate else [Load(concurrency=n) for n in args.concurrency or [8]]
    with _server(args) as url:
        target, work, runs = asyncio.run(_run(args, url, loads))
    say("")
    options = engine_options(args) | {name: _plain(getattr(args, name)) for name in KEPT}
    options.pop("model", None)
    busy = warnings([], load_before, 0, num_cores())
    report = ServeReport(own_name(target.model), work, target.runs_on, runs, options, busy)
    print(report.text())
    if args.markdown:
        print("\n" + report.markdown())
    if args.json:
        Path(args.json).write_text(report.json() + "\n", encoding="utf-8")
    if args.plot:
        report.plot(args.plot)
    return 1 if any(s.failed for s in report.summaries) else 0


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return [str(v) if isinstance(v, float) and math.isinf(v) else v for v in value] if isinstance(value, list) else value


def _check(args: argparse.Namespace) -> None:
    """Better now than after minutes of measuring."""
    check_folders(args, "json", "plot")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib", 'pip install "llmkit[notebook]"')
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {args.plot}: draws .png, .svg or .pdf")
    given = [name for name in engine_options(args) if name != "model"]
    if args.url and given:
        raise ConfigError(f"--url measures a server with its own options; {given[0]} means nothing to it", "drop one of the two")
    _extra(args)


def _extra(args: argparse.Namespace) -> dict[str, Any]:
    import json

    try:
        extra = json.loads(args.extra_body)
    except ValueError as e:
        raise ConfigError(f"--extra-body is not JSON: {e}") from e
    if not isinstance(extra, dict):
        raise ConfigError("--extra-body must be a JSON object", """such as '{"top_k": 20}'""")
    return extra


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """The address of the server to measure; ours is gone afterwards."""
    if args.url:
        yield args.url
        return
    from llmkit.bench.measure import say
    from llmkit.server.handle.start import serve

    options: dict[str, Any] = {"model": DEFAULT_MODEL} | engine_options(args)
    say(f"starting a server for {options['model']}")
    with serve(reuse=False, **options) as server:
        yield server.url


async def _run(args: argparse.Namespace, url: str, loads: list[Load]) -> tuple[Target, str, list[Run]]:
    from llmkit.bench.load import run_load
    from llmkit.bench.measure import say
    from llmkit.client.openai import OpenAIClient, to_json

    extra = _extra(args)
    with closing(OpenAIClient(url, args.api_key or os.environ.get("OPENAI_API_KEY"))) as client:
        target = await _look(args, client)
        source = _source(args, target)
        chat = args.endpoint == "chat" or source.has_messages
        path = f"/v1/{'chat/' if chat else ''}completions"

        async def bodies(turn: int, count: int | None = None) -> list[bytes]:
            asks = await _with_lengths(args, target, source.take(turn)[:count])
            return [to_json(ask.body(target.model, chat, args.ignore_eos, extra)) for ask in asks]

        runs: list[Run] = []
        await _warm_up(client, path, await bodies(-1, args.warmup))
        for turn, load in enumerate(loads):
            requests = await bodies(turn)
            say(f"{load}: {len(requests)} requests")
            runs.append(await run_load(client, load, path, requests, turn))
        return target, f"{source.name}, {'chat' if chat else 'completions'}", runs


async def _look(args: argparse.Namespace, client: OpenAIClient) -> Target:
    """Who is there."""
    names = await client.models()
    model = getattr(args, "model", None) if args.url else None
    if not (model or names):
        raise ServerError(f"{client.url} does not say what its model is called", "name it: llmkit bench serve NAME --url URL")
    reply = await client.get("/server_info")  # ours has it; another answers 404
    facts = reply.body.get("facts", {}) if reply.ok and isinstance(reply.body, dict) else {}
    return Target(client, model or names[0], _device(args, facts.get("runs_on")), facts.get("vocab_size"))


def _device(args: argparse.Namespace, runs_on: str | None) -> str:
    """What the figures belong to; of a server on this processor, its name."""
    from llmkit.machine import cpu_name, num_cores

    here = f"{cpu_name()}, {num_cores()} cores, " if runs_on and not args.url and " on cpu" in runs_on else ""
    return here + (runs_on or Target.runs_on)


def _source(args: argparse.Namespace, target: Target) -> Source:
    from llmkit.bench.asks import FromFile, MadeUp, read_asks

    if args.dataset is None:
        return MadeUp(_workload(args), target.vocab or VOCAB, text=args.endpoint == "chat")
    source = FromFile(args.dataset.name, read_asks(args.dataset), args.num_prompts or 100)
    if source.has_messages and args.endpoint == "completions":
        raise ConfigError(f"{args.dataset} holds messages, which --endpoint completions does not take", "--endpoint chat")
    return source


def _workload(args: argparse.Namespace) -> Workload:
    from llmkit.bench.workload import NAMED, fixed

    if args.workload == "fixed":
        return fixed(args.num_prompts or 100, args.input_len, args.output_len or 128)
    return NAMED[args.workload]().first(args.num_prompts)


async def _with_lengths(args: argparse.Namespace, target: Target, asks: list[Ask]) -> list[Ask]:
    """Every ask with the length of its answer: the option's, its own, or its reference counted by the server."""
    from llmkit.bench.asks import within_filter

    if args.output_len and args.dataset:
        return [replace(ask, output_len=args.output_len, reference=None) for ask in asks]
    if any(ask.output_len is None and ask.reference is None for ask in asks):
        raise ConfigError(f"{args.dataset} does not say how long the answers shall be", "--output-len LEN")
    gate = asyncio.Semaphore(32)  # questions at once

    async def counted(ask: Ask) -> Ask:
        if ask.reference is None:
            return ask
        async with gate:
            reply = await target.client.post("/tokenize", {"model": target.model, "prompt": ask.reference})
        if not reply.ok:
            raise ConfigError(f"the server cannot count the answers' tokens (/tokenize: {reply.message})", "--output-len LEN")
        return replace(ask, reference=None, output_len=within_filter(reply.body["count"]))

    return list(await asyncio.gather(*map(counted, asks)))


async def _warm_up(client: OpenAIClient, path: str, bodies: list[bytes]) -> None:
    """Send some; what is wrong with the requests comes to light here."""
    from llmkit.bench.load import Load, run_load

    run = await run_load(client, Load(concurrency=1), path, bodies, "warm-up")
    for outcome in run.outcomes:
        if outcome.error:
            raise ServerError(f"the server does not answer such a request: {outcome.error}",
                              "see llmkit bench serve --help for what the requests hold")  # fmt: skip
