"""`llmkit chat`: arguments, and the way from them to a conversation."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.batch import add_server_arguments, server_key
from llmkit.cli.generate import add_sampling_arguments, sampling_options
from llmkit.cli.parser import UsageError, command
from llmkit.config import DEFAULT_MODEL, add_engine_arguments, engine_options

if TYPE_CHECKING:
    from llmkit.talk.partners import Partner


def add(commands: Any) -> None:
    """chat."""
    p = command(commands, "chat", "talk to a model: in a terminal, or line by line through a pipe", _chat)
    p.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS,
                   help=f"what to run (default: {DEFAULT_MODEL}); with --url, what the server calls it (default: its first)")
    p.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    p.add_argument("--load", metavar="FILE", type=Path, help="go on with a conversation that /save wrote")
    add_server_arguments(p)
    add_sampling_arguments(p)
    add_engine_arguments(p, skip=("model", "skip_tokenizer_init"))


def _chat(args: argparse.Namespace) -> int:
    from llmkit.talk.conversation import Conversation
    from llmkit.talk.loop import Talk

    sampling = sampling_options(args)  # mistakes come to light before a model is loaded
    if sampling.get("n", 1) != 1:
        raise UsageError("a conversation has one answer at a time", "drop --n")
    conversation = Conversation.load(args.load) if args.load else Conversation()
    conversation.system = args.system or conversation.system
    with closing(_remote(args, sampling) if args.url else _local(args, sampling)) as partner:
        return Talk(partner, conversation).run()


def _local(args: argparse.Namespace, sampling: dict[str, Any]) -> Partner:
    from llmkit import LLM
    from llmkit.talk.partners import Local

    llm = LLM(**{"model": DEFAULT_MODEL} | engine_options(args))
    return Local(llm, llm.get_default_sampling_params().clone(**sampling))


def _remote(args: argparse.Namespace, sampling: dict[str, Any]) -> Partner:
    from llmkit.talk.partners import Remote, request_options

    options = engine_options(args)
    model, seed = options.pop("model", None), {"seed": options.pop("seed")} if "seed" in options else {}
    if options:
        raise UsageError(f"--url asks a server that has its own options; {next(iter(options))} means nothing to it",
                         "drop one of the two")  # fmt: skip
    return Remote(args.url, server_key(args), model, request_options(sampling) | seed)
