"""`llmkit generate`: answers on the command line, and the flags of sampling parameters."""

from __future__ import annotations

import argparse
import json
import sys
import time
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.parser import UsageError, command
from llmkit.config import DEFAULT_MODEL, add_engine_arguments, engine_options
from llmkit.sampling_params import SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from llmkit.llm import LLM
    from llmkit.outputs import RequestOutput

_SAMPLING = {  # field of SamplingParams -> help; --seed is the engine's, which serves requests that bring none
    "n": "answers per prompt",
    "temperature": "0 takes the most likely token",
    "top_p": "sample from the most likely tokens of this total probability",
    "top_k": "sample from this many most likely tokens; 0 = all",
    "min_p": "smallest probability, relative to the most likely token",
    "max_tokens": "longest answer in tokens; to the end of the context by default",
    "min_tokens": "no end before this many tokens",
    "presence_penalty": "against tokens that occurred, -2 to 2",
    "frequency_penalty": "against tokens by how often they occurred, -2 to 2",
    "repetition_penalty": "against repetition of prompt and answer; 1 = off",
}
_STRUCTURED = {
    "json": ("SCHEMA", "answer with JSON of this schema (text, or @FILE)"),
    "regex": ("REGEX", "answer with a full match of this expression"),
    "grammar": ("LARK", "answer in this Lark grammar (text, or @FILE)"),
}


def add(commands: Any) -> None:
    """generate."""
    p = command(commands, "generate", "answer prompts from the arguments or from stdin", _generate)
    p.add_argument("prompts", metavar="PROMPT", nargs="*", help="a prompt; without any, stdin is the prompt")
    p.add_argument("--chat", action="store_true", help="send each prompt as a chat message, through the model's template")
    p.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    p.add_argument("--stream", action=argparse.BooleanOptionalAction, default=None,
                   help="show tokens as they come (default on a terminal)")
    p.add_argument("--jsonl", action="store_true", help="one JSON object per prompt")
    add_sampling_arguments(p)
    add_engine_arguments(p)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag per sampling parameter, in both spellings (`--top-p`, `--top_p`)."""
    group, hints = parser.add_argument_group("sampling options"), typing.get_type_hints(SamplingParams)
    for name, help in _SAMPLING.items():
        kind = float if hints[name] is float else int
        group.add_argument(*_spellings(name), type=kind, default=argparse.SUPPRESS, metavar=name.upper(), help=help)
    group.add_argument("--stop", metavar="TEXT", action="append", default=argparse.SUPPRESS,
                       help="end the answer here; may be repeated")
    group.add_argument(*_spellings("ignore_eos"), action="store_true", default=argparse.SUPPRESS,
                       help="do not end at the model's end token")
    for name, (metavar, help) in _STRUCTURED.items():
        group.add_argument(f"--{name}", metavar=metavar, help=help)
    group.add_argument("--choice", metavar="TEXT", action="append", help="answer with one of these; may be repeated")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters given on a command line built by `add_sampling_arguments`, found valid."""
    given = {name: getattr(args, name) for name in (*_SAMPLING, "stop", "ignore_eos") if hasattr(args, name)}
    structured = {name: _text(getattr(args, name)) for name in (*_STRUCTURED, "choice") if getattr(args, name)}
    if structured:
        given["structured_outputs"] = StructuredOutputs(**structured)
    SamplingParams(**given)
    return given


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))


def _text(value: Any) -> Any:
    """@FILE stands for the file's text."""
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    try:
        return Path(value[1:]).read_text("utf-8")
    except OSError as e:
        raise UsageError(f"cannot read {value[1:]}: {e.strerror}") from e


def _generate(args: argparse.Namespace) -> None:
    options, prompts = sampling_options(args), _prompts(args)  # mistakes come to light before a model is loaded
    stream = _streams(args, options, prompts)
    from llmkit import LLM

    with LLM(**{"model": DEFAULT_MODEL} | engine_options(args)) as llm:
        params, start = llm.get_default_sampling_params().clone(**options), time.perf_counter()
        tokens = sum(_stream(llm, p, params) for p in prompts) if stream else _batch(args, llm, prompts, params)
        seconds = time.perf_counter() - start
    if sys.stderr.isatty():
        print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


def _prompts(args: argparse.Namespace) -> list[Any]:
    """Texts, or lists of messages with --chat."""
    if not args.prompts and sys.stdin.isatty():
        raise UsageError("there is no prompt", 'llmkit generate "Once upon a time", or pipe text into it')
    texts = args.prompts or [sys.stdin.read().rstrip("\n")]
    if not (args.chat or args.system):
        return texts
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [[*system, {"role": "user", "content": text}] for text in texts]


def _streams(args: argparse.Namespace, options: dict[str, Any], prompts: list[Any]) -> bool:
    possible = not args.jsonl and options.get("n", 1) == 1
    if args.stream and not possible:
        raise UsageError("--stream shows one answer at a time", "drop --stream, or --jsonl and --n")
    return possible and (args.stream if args.stream is not None else sys.stdout.isatty() and len(prompts) == 1)


def _stream(llm: LLM, prompt: Any, params: SamplingParams) -> int:
    """Print the answer as it comes; its tokens."""
    tokens = 0
    for chunk in llm.stream(prompt, params):
        print(chunk.text, end="", flush=True)
        tokens += len(chunk.token_ids)
    print()
    return tokens


def _batch(args: argparse.Namespace, llm: LLM, prompts: list[Any], params: SamplingParams) -> int:
    """Print all answers when all are done; their tokens."""
    call = llm.generate if isinstance(prompts[0], str) else llm.chat
    outputs = call(prompts, params, use_tqdm=sys.stderr.isatty())
    _print_outputs(args, outputs)
    return sum(len(answer.token_ids) for output in outputs for answer in output.outputs)


def _print_outputs(args: argparse.Namespace, outputs: list[RequestOutput]) -> None:
    for output in outputs:
        if args.jsonl:
            answers = [{"text": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason} for c in output.outputs]
            print(json.dumps({"prompt": output.prompt, "outputs": answers}, ensure_ascii=False))
            continue
        for answer in output.outputs:
            print(answer.text)
