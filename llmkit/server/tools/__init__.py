"""Tools of a chat request: what the model is told of them, which answers are allowed, and how calls are found in the answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkit.sampling_params import StructuredOutputs
from llmkit.server.http.errors import refuse
from llmkit.server.message import CallIds, Parser
from llmkit.server.options import TOOL_PARSERS, ServerOptions
from llmkit.server.tools.in_text import with_tools_in_text
from llmkit.server.tools.parsers import PARSERS, OneCall, required
from llmkit.server.tools.schema import Tool, arguments_schema, calls_schema


def detect_parser(template: str) -> str | None:
    """The format of calls that a chat template teaches; None when it is none of ours."""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "func_name1(params_name1=" in template or "<|python_start|>" in template:
        return "pythonic"
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return "llama3_json"
    return None


@dataclass(frozen=True)
class ToolUse:
    """What one request says of tools. choice: none, auto, required, or the name of one tool in `named`.

    in_text: the template knows no tools, so they are described in the system message, and calls are written as Hermes does.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = "none"
    named: str | None = None
    parser_name: str | None = None
    in_text: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, template: str, options: ServerOptions, tools: Any, choice: Any = None, parallel: bool | None = None) -> ToolUse:
        """Read and check a request's `tools`, `tool_choice` and `parallel_tool_calls`."""
        chosen, named, allowed = _choice(choice, _tools(tools))
        if chosen == "auto" and not options.enable_auto_tool_choice:
            raise refuse('tool_choice "auto" is switched off on this server', "tools" if choice is None else "tool_choice",
                         "start it with --enable-auto-tool-choice, or name the tool")  # fmt: skip
        in_text = "tools" not in template
        parser = options.tool_call_parser or ("hermes" if in_text else detect_parser(template))
        if chosen == "auto" and parser is None:
            raise refuse(f"this model writes tool calls in a way that is not read here ({', '.join(TOOL_PARSERS)} are)", "tools",
                         'use tool_choice "required", name the tool, or start the server with --tool-call-parser')  # fmt: skip
        return cls(allowed, chosen, named, parser, in_text, parallel is not False)

    @property
    def for_template(self) -> list[Tool] | None:
        """The tools that the chat template shall show."""
        return list(self.tools) if self.tools and self.choice != "none" and not self.in_text else None

    def messages(self, messages: Any) -> Any:
        """The conversation as the template can read it."""
        return with_tools_in_text(messages, self.tools if self.choice != "none" else ()) if self.in_text else messages

    @property
    def shows_special_tokens(self) -> bool:
        """Whether the marks of calls are special tokens, which would be hidden."""
        return self.choice == "auto" and self.parser_name in ("mistral", "llama3_json", "pythonic")

    def parser(self) -> Parser | None:
        """What finds the calls in one answer."""
        names, ids = [t["function"]["name"] for t in self.tools], CallIds(_short_id if self.parser_name == "mistral" else None)
        found: Parser | None = None
        if self.choice == "required":
            found = required(names, ids)
        elif self.named is not None:
            found = OneCall(self.named, ids)
        elif self.choice == "auto" and self.parser_name is not None:
            found = PARSERS[self.parser_name](names, ids)
        return found if found is None or self.parallel else FirstCall(found)

    def grammar(self, asked: StructuredOutputs | None) -> StructuredOutputs | None:
        """The language of the answer: that of the calls when one must be made, else what the request asked for."""
        if self.choice not in ("required", "named"):
            return asked
        if asked is not None:
            raise refuse("response_format and a required tool call exclude each other", "tool_choice", "drop one of the two")
        if self.named is not None:
            schema = arguments_schema(next(t for t in self.tools if t["function"]["name"] == self.named))
        else:
            schema = calls_schema(self.tools, self.parallel)
        return StructuredOutputs(json=json.dumps(schema))


class FirstCall:
    """parallel_tool_calls is false: one call and what was said before it."""

    def __init__(self, parser: Parser) -> None:
        self._parser, self._begun, self._over = parser, False, False

    def push(self, text: str) -> list[Any]:
        return self._first(self._parser.push(text))

    def finish(self) -> list[Any]:
        return self._first(self._parser.finish())

    def _first(self, events: list[Any]) -> list[Any]:
        return [e for e in events if getattr(e, "index", 0) == 0]


def _short_id() -> str:
    """Mistral's templates insist on nine letters and digits."""
    return uuid.uuid4().hex[:9]


# --- reading the request -----------------------------------------------------------------------------------------------


def _tools(given: Any) -> tuple[Tool, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise refuse(f"tools must be a list, got {type(given).__name__}", "tools")
    tools = tuple(_tool(f"tools[{i}]", tool) for i, tool in enumerate(given))
    names = [t["function"]["name"] for t in tools]
    twice = next((n for n in names if names.count(n) > 1), None) if len(names) < 2000 else None
    if twice is not None:
        raise refuse(f"two tools have the name {twice!r}", "tools")
    return tools


def _tool(where: str, tool: Any) -> Tool:
    if not isinstance(tool, Mapping):
        raise refuse(f"{where} must be an object, got {type(tool).__name__}", where)
    if tool.get("type", "function") != "function":
        raise refuse(f"{where}.type {str(tool['type'])[:60]!r} is not available: functions only", f"{where}.type")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise refuse(f"{where}.function is missing", f"{where}.function", "{'type': 'function', 'function': {'name': ...}}")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        raise refuse(f"{where}.function.name must be text of 1 to 256 characters", f"{where}.function.name")
    if not isinstance(parameters, (Mapping, type(None))):
        raise refuse(f"{where}.function.parameters must be a JSON schema", f"{where}.function.parameters")
    return {**tool, "type": "function", "function": dict(function)}


def _choice(given: Any, tools: tuple[Tool, ...]) -> tuple[str, str | None, tuple[Tool, ...]]:
    """(choice, named tool, the tools allowed)."""
    if isinstance(given, Mapping) and given.get("type") == "allowed_tools":
        return _allowed(given, tools)
    if given is None or given in ("none", "auto", "required"):
        choice = given or ("auto" if tools else "none")
        if choice == "required" and not tools:
            raise refuse("tool_choice is required, but there are no tools", "tool_choice", "give tools")
        return ("none" if not tools else choice), None, tools
    function = given.get("function") if isinstance(given, Mapping) and given.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise refuse('tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
                     "tool_choice")  # fmt: skip
    _must_have(name, tools)
    return "named", name, tools


def _allowed(given: Mapping[str, Any], tools: tuple[Tool, ...]) -> tuple[str, str | None, tuple[Tool, ...]]:
    inside = given.get("allowed_tools")
    listed = inside.get("tools") if isinstance(inside, Mapping) else None
    mode = inside.get("mode", "auto") if isinstance(inside, Mapping) else None
    functions = [t.get("function") for t in listed if isinstance(t, Mapping)] if isinstance(listed, list) else []
    names = [f.get("name") for f in functions if isinstance(f, Mapping)]
    if not names or mode not in ("auto", "required"):
        raise refuse("tool_choice.allowed_tools needs a mode (auto or required) and a list of tools", "tool_choice")
    for name in names:
        _must_have(name, tools)
    return mode, None, tuple(t for t in tools if t["function"]["name"] in names)


def _must_have(name: Any, tools: tuple[Tool, ...]) -> None:
    known = [t["function"]["name"] for t in tools]
    if name not in known:
        among = ", ".join(known)[:500] or "none"
        raise refuse(f"tool_choice names {str(name)[:100]!r}, which is not among the tools ({among})", "tool_choice")
