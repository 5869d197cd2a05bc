"""`llmkit batch IN.jsonl OUT.jsonl`: arguments, and the way from them to a batch."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.parser import UsageError, command
from llmkit.config import DEFAULT_MODEL, add_engine_arguments, engine_options
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.batch.run import Batch

EXAMPLE = ('a line of IN: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", '
           '"body": {"messages": [{"role": "user", "content": "Hello"}]}}')  # fmt: skip


def add(commands: Any) -> None:
    """batch."""
    p = command(commands, "batch", "answer a file of OpenAI batch requests; stopped anywhere, it goes on", _batch,
                epilog=EXAMPLE)  # fmt: skip
    p.add_argument("requests", metavar="IN.jsonl", type=Path, help="requests, one a line: custom_id, method, url, body")
    p.add_argument("answers", metavar="OUT.jsonl", type=Path, help="answers, one a line; those already there are kept")
    p.add_argument("--retry-failed", action="store_true", help="ask again what an earlier run got errors for")
    p.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default: two steps' worth; 64 with --url)")
    p.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS",
                   help="longest wait for one answer of --url (default: 1800)")
    p.add_argument("--served-model-name", metavar="NAME", action="append", default=[],
                   help="another name that lines may call the model by; may be repeated")
    add_server_arguments(p)
    p.add_argument("--model", metavar="MODEL", default=argparse.SUPPRESS,
                   help=f"what to run; by default the model that the lines name, or {DEFAULT_MODEL} when they name none")
    add_engine_arguments(p, skip=("model", "skip_tokenizer_init"))


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """--url and --api-key: ask a server instead of loading a model."""
    parser.add_argument("--url", help="ask the OpenAI server there, such as http://localhost:8000, instead of loading a model")
    parser.add_argument("--api-key", metavar="KEY", help="its key (default: OPENAI_API_KEY)")


def server_key(args: argparse.Namespace) -> str | None:
    """The key for --url."""
    return args.api_key or os.environ.get("OPENAI_API_KEY")


def _batch(args: argparse.Namespace) -> int:
    from llmkit.batch.journal import Journal
    from llmkit.batch.run import Batch

    if args.concurrency is not None and args.concurrency < 1:
        raise UsageError(f"--concurrency must be at least 1; got {args.concurrency}")
    if args.url and (given := list(engine_options(args))):
        raise UsageError(f"--url asks a server that has its own options; {given[0]} means nothing to it", "drop one of the two")
    if not args.requests.is_file():
        raise UsageError(f"there is no file {args.requests}", "llmkit batch --help shows what a line looks like")
    with closing(Journal(args.answers, args.retry_failed)) as journal:
        batch = Batch(args.requests, journal)
        try:
            _answer(args, batch)
        except KeyboardInterrupt:
            _tell(f"stopped with {batch.count.done} of {batch.count.lines} lines answered; the same command goes on")
            raise
    count = batch.count
    _tell(f"{count.done} of {count.lines} lines answered, {count.failed} of them with an error" if count.failed else
          f"{count.done} lines answered" + (f", {count.before} of them before" if count.before else ""))  # fmt: skip
    return 1 if count.failed else 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _answer(args: argparse.Namespace, batch: Batch) -> None:
    if not batch.left:
        return
    import asyncio

    asyncio.run(_by_server(args, batch)) if args.url else _here(args, batch)


async def _by_server(args: argparse.Namespace, batch: Batch) -> None:
    from llmkit.batch.answerers import Remote
    from llmkit.client.openai import OpenAIClient
    from llmkit.progress import generation_progress

    with closing(OpenAIClient(args.url, server_key(args))) as client:
        await client.models()  # better now than as an error in every line
        with generation_progress(batch.count.lines, show=True) as bar:
            await batch.run(Remote(client, args.concurrency or 64, timeout=args.timeout), bar)


def _here(args: argparse.Namespace, batch: Batch) -> None:
    import asyncio

    _check_endpoints()
    from llmkit import LLM

    options = engine_options(args)
    if "model" not in options:
        options["model"] = batch.model_name() or DEFAULT_MODEL
    with LLM(**options) as llm:
        asyncio.run(_by_engine(args, batch, llm, (options["model"], *args.served_model_name)))


def _check_endpoints() -> None:
    """Better before a model is loaded than after."""
    try:
        importlib.import_module("llmkit.server.app")
    except ModuleNotFoundError as e:
        raise ConfigError(f"a batch needs the server's package {e.name}", 'pip install "llmkit[server]"') from e


async def _by_engine(args: argparse.Namespace, batch: Batch, llm: Any, names: tuple[str, ...]) -> None:
    from llmkit.batch.answerers import Local, lifespan
    from llmkit.progress import generation_progress
    from llmkit.server.app import create_app
    from llmkit.server.in_process import InProcessEngine
    from llmkit.server.options import ServerOptions

    engine = InProcessEngine(llm)
    app = create_app(engine, ServerOptions.from_options(served_model_names=names, enable_page=False, enable_docs=False))
    with generation_progress(batch.count.lines, show=True) as bar:
        async with lifespan(app):
            await batch.run(Local(app, args.concurrency or 2 * engine.facts.max_num_seqs), bar)
