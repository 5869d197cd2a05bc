"""`llmkit serve`: its flags are the fields of EngineConfig, ServerOptions and ServeOptions, in vLLM's spelling too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.flags import add_flags, add_foreign_flags, given
from llmkit.cli.parser import Parser, UsageError, command
from llmkit.config import DEFAULT_MODEL, EngineConfig, add_engine_arguments
from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.server.processes.serve_options import Plan

OTHER_NAMES = {"uvicorn_log_level": "log_level"}
SHORT = {"-tp": "tensor_parallel_size", "-q": "quantization"}
SHORT_FOREIGN = {"-pp": "pipeline_parallel_size", "-dp": "data_parallel_size", "-O": "compilation_config"}


def add(commands: Any) -> None:
    """serve."""
    command(commands, "serve", "serve a model over HTTP, as OpenAI does", _serve, fill=add_serve_arguments)


def add_serve_arguments(parser: Parser) -> None:
    """All flags of a server."""
    from llmkit import vllm_options
    from llmkit.config import ALIASES
    from llmkit.server.options import ALIASES as SERVER_ALIASES
    from llmkit.server.options import ServerOptions
    from llmkit.server.processes.serve_options import ServeOptions

    parser.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS,
                        help=f"folder, .gguf file, hub id, modelscope:ID, hf:ID or pypi:PACKAGE (default: {DEFAULT_MODEL})")
    parser.add_argument("--model", metavar="MODEL", dest="model", default=argparse.SUPPRESS, help="the same, as vLLM spells it")
    parser.add_argument("--config", metavar="FILE.yaml", default=argparse.SUPPRESS,
                        help="flags from a file; those of the command line count more")
    add_flags(parser.add_argument_group("address and processes"), ServeOptions, OTHER_NAMES)
    add_flags(parser.add_argument_group("requests and answers"), ServerOptions, SERVER_ALIASES, skip=("generation_config",))
    add_engine_arguments(parser, skip=("model", "skip_tokenizer_init"))
    for other, own in ALIASES.items():
        parser.add_argument(f"--{other.replace('_', '-')}", dest=own, default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                            type=int if own == "num_kv_blocks" else str)  # fmt: skip
    for short, own in SHORT.items():
        parser.add_argument(short, dest=own, default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                            type=int if own == "tensor_parallel_size" else str)  # fmt: skip
    add_foreign_flags(parser, vllm_options.ENGINE | vllm_options.SERVER | SKIPPED, SHORT_FOREIGN)


SKIPPED: dict[str, tuple[tuple[Any, ...], str]] = {
    "skip_tokenizer_init": ((False,), "a server needs the tokenizer; LLM(skip_tokenizer_init=True) works without"),
}


def _serve(args: argparse.Namespace) -> int:
    plan = plan_of(args)  # mistakes come to light before anything is started
    try:
        from llmkit.server.processes.launch import launch
    except ModuleNotFoundError as e:
        raise ConfigError(f"the server needs the package {e.name}", 'pip install "llmkit[server]"') from e
    return launch(plan)


def plan_of(args: argparse.Namespace) -> Plan:
    """What a command line, and the file it names, ask for."""
    from llmkit.server.options import ServerOptions
    from llmkit.server.processes.serve_options import Plan, ServeOptions

    args = _with_file(args)
    _check_model_was_named(args)
    engine = EngineConfig.from_options(**{"model": DEFAULT_MODEL} | given(args, EngineConfig))
    return Plan(engine, ServerOptions.from_options(**given(args, ServerOptions)), ServeOptions(**given(args, ServeOptions)))


def _check_model_was_named(args: argparse.Namespace) -> None:
    """`--api-key KEY MODEL` reads as two keys: better asked than served under the wrong name."""
    several = next((n for n, v in vars(args).items() if isinstance(v, tuple) and len(v) > 1), None)
    if several and not hasattr(args, "model"):
        raise UsageError(f"{args.leaf.prog}: there is no MODEL, and {several} has several words",
                         "name the model first: llmkit serve MODEL --...")  # fmt: skip


# ---- --config FILE.yaml


def _with_file(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the file below those of the command line."""
    if not hasattr(args, "config"):
        return args
    space, unknown = args.leaf.parse_known_args(_words(args.leaf, _read_yaml(args.config), args.config))
    if unknown:
        args.leaf.refuse(unknown[0])
    return argparse.Namespace(**vars(space) | vars(args))


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as e:
        raise UsageError(f"--config: cannot read {path}: {e.strerror}") from e
    except yaml.YAMLError as e:
        raise UsageError(f"--config: {path} is no YAML: {e}") from e
    if not isinstance(value, dict):
        raise UsageError(f"--config: {path} needs lines like `max-model-len: 2048`")
    return value


def _words(parser: Parser, options: dict[str, Any], path: str) -> list[str]:
    """What would be typed."""
    flags = {name: action for action in parser._actions for name in action.option_strings}
    words: list[str] = []
    for key, value in options.items():
        flag = f"--{str(key).replace('_', '-')}"
        if flag not in flags:
            parser.refuse(flag)
        if value is None:
            continue
        if flags[flag].nargs == 0:
            if not isinstance(value, bool):
                raise UsageError(f"--config: {path}: {key} is a switch: true or false, not {value!r}")
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
