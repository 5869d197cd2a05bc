"""Messages to a prompt, by the model's own Jinja template.

The text equals transformers' apply_chat_template(..., tokenize=False); jinja2 alone makes it in a fifth of the import time.
Beyond that, messages may be written as the OpenAI API writes them: content in parts, tool arguments as JSON text.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.errors import InvalidRequestError, TokenizerError
from llmkit.tokenizer import Tokenizer

Message = dict[str, Any]
Conversation = Sequence[Mapping[str, Any]]

_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
_TEXT_PARTS = {"text", "input_text", "output_text"}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first
_MARK = "\u2063llmkit-continues-here\u2063"


def render_chat(
    tokenizer: Tokenizer,
    messages: Conversation,
    *,
    chat_template: str | Path | None = None,
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    **template_kwargs: Any,
) -> str:
    """The prompt of a conversation. Encode it with add_special_tokens=False: the template writes them.

    chat_template: text, path, or the name of one of the model's templates. tools: JSON schemas, or functions with type hints and
    a Google-style docstring. add_generation_prompt: open the assistant's turn; None means yes, unless continue_final_message
    leaves the last message open instead. template_kwargs: extra variables (enable_thinking=..., documents=...).
    Raises TokenizerError without a (working) template, InvalidRequestError for messages it cannot render.
    """
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", "leave add_generation_prompt out", "messages"
        )
    template = find_template(tokenizer, chat_template, bool(tools))
    variables: dict[str, Any] = {
        **tokenizer.special_tokens,
        **template_kwargs,
        "tools": tool_schemas(tools),
        "add_generation_prompt": not continue_final_message if add_generation_prompt is None else add_generation_prompt,
    }
    variables.setdefault("documents", None)
    chat = normalize_messages(messages, template, tokenizer.special_tokens)
    return _continued(template, chat, variables) if continue_final_message else _render(template, chat, variables)


def is_conversation(x: Any) -> bool:
    """True for one conversation: a non-empty list of messages (dicts)."""
    return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(m, Mapping) for m in x)


def is_batch_of_conversations(x: Any) -> bool:
    """True for a non-empty list of conversations."""
    return isinstance(x, (list, tuple)) and bool(x) and all(is_conversation(c) for c in x)


# --- which template ----------------------------------------------------------------------------------------------------


def find_template(tokenizer: Tokenizer, chat_template: str | Path | None = None, with_tools: bool = False) -> str:
    """Text of the template to use: the given one (text, path or name), else the model's own."""
    own = tokenizer.chat_template
    if chat_template is not None:
        named = own.get(str(chat_template)) if isinstance(own, dict) else None
        return named or _read_template(chat_template)
    if isinstance(own, dict):
        own = (own.get("tool_use") if with_tools else None) or own.get("default")
    if not own:
        what = "no chat template"
        if isinstance(tokenizer.chat_template, dict) and tokenizer.chat_template:
            what = f"several chat templates ({', '.join(sorted(tokenizer.chat_template))}) and no default"
        raise TokenizerError(
            f"this model has {what}",
            "pass chat_template= (a Jinja text, a file, or a name), or use generate() with a plain prompt",
        )
    return own


def _read_template(given: str | Path) -> str:
    if isinstance(given, str) and ("{" in given or "\n" in given):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise TokenizerError(f"chat_template {str(given)!r} is no file and no Jinja text", "give a path that exists, or the text")
    return path.read_text(encoding="utf-8")


def tool_schemas(tools: Sequence[dict[str, Any] | Callable[..., Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as JSON schemas; Python functions are described from their signature and docstring."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise InvalidRequestError(f"tools must be a list, got {type(tools).__name__}", param="tools")
    return [_tool_schema(i, tool) for i, tool in enumerate(tools)]


def _tool_schema(i: int, tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if not callable(tool):
        raise InvalidRequestError(f"tools[{i}] must be a JSON schema or a function, got {type(tool).__name__}", param="tools")
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as e:  # two exception classes of its own, and whatever reading type hints raises
        hint = "give it type hints and a docstring with an Args: section, or pass a JSON schema"
        raise InvalidRequestError(f"tools[{i}] cannot be described: {e}", hint, "tools") from e


# --- messages ----------------------------------------------------------------------------------------------------------


def normalize_messages(messages: Conversation, template: str, special_tokens: Mapping[str, str]) -> list[Message]:
    """Fresh copies in the form that `template` reads. Raises InvalidRequestError naming messages[i]."""
    if not isinstance(messages, (list, tuple)):
        raise _bad("messages", f"must be a list of {{'role', 'content'}} dicts, got {type(messages).__name__}")
    if not messages:
        raise _bad("messages", "must not be empty: give at least one message")
    takes_text, takes_parts = _content_forms(template, tuple(sorted(special_tokens.items())))
    chat = [_normalize(f"messages[{i}]", message, template) for i, message in enumerate(messages)]
    for message in chat:
        content = message.get("content")
        if isinstance(content, list) and not takes_parts:
            message["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and takes_parts and not takes_text:
            message["content"] = [{"type": "text", "text": content}]
    return chat


def _normalize(where: str, message: Any, template: str) -> Message:
    if not isinstance(message, Mapping):
        raise _bad(where, f"must be a dict with 'role' and 'content', got {type(message).__name__}")
    chat = {k: v for k, v in message.items() if v is not None}  # APIs write content=None; templates want the key gone
    role = chat.get("role")
    if not isinstance(role, str):
        raise _bad(f"{where}.role", f"must be text, got {role!r}")
    if role not in _ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
        raise _bad(f"{where}.role", f"{role!r} is unknown; this model knows {', '.join(sorted(_ROLES))}")
    if "content" in chat:
        chat["content"] = _normalize_content(f"{where}.content", chat["content"])
    elif not chat.get("tool_calls") and role != "assistant":
        raise _bad(where, "has no content")
    if "tool_calls" in chat:
        chat["tool_calls"] = _normalize_calls(f"{where}.tool_calls", chat["tool_calls"])
    reasoning = next((chat[name] for name in _REASONING if name in chat), None)
    return chat if reasoning is None else {"thinking": reasoning, **chat, "reasoning_content": reasoning}


def _normalize_content(where: str, content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise _bad(where, f"must be text or a list of parts, got {type(content).__name__}")
    return [_text_part(f"{where}[{i}]", part) for i, part in enumerate(content)]


def _text_part(where: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
        raise _bad(where, f"is of type {kind!r}; llmkit reads text only (no images, audio, video or files)")
    if not isinstance(part.get("text"), str):
        raise _bad(where, "has no 'text'")
    return {**part, "type": "text"}


def _normalize_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise _bad(where, f"must be a list, got {type(calls).__name__}")
    return [_normalize_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _normalize_call(where: str, call: Any) -> dict[str, Any]:
    """Templates print arguments by tojson, so JSON text must be parsed first or it comes out quoted twice."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _bad(where, "must look like {'type': 'function', 'function': {'name': ..., 'arguments': ...}}")
    if not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        parsed = {**function, "arguments": json.loads(function["arguments"] or "{}")}
    except ValueError as e:
        raise _bad(f"{where}.function.arguments", f"is not valid JSON: {e}") from e
    return {**call, "function": parsed} if "function" in call else parsed


def _bad(where: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where} {why}", param=where)


@functools.lru_cache(maxsize=64)
def _content_forms(template: str, special_tokens: tuple[tuple[str, str], ...]) -> tuple[bool, bool]:
    """(takes text, takes a list of parts), found by rendering one message both ways.

    A template that prints a list shows its quotes and braces; one that loops over parts does not. A probe that fails says no.
    """
    variables = {**dict(special_tokens), "tools": None, "documents": None, "add_generation_prompt": False}

    def shows(content: Any) -> bool:
        try:
            text = _compile(template).render(messages=[{"role": "user", "content": content}], **variables)
        except TokenizerError:
            raise
        except Exception:  # the answer to the question is no; a true fault shows when the real messages are rendered
            return False
        return "probe" in text and "'type'" not in text and '"type"' not in text

    return shows("probe"), shows([{"type": "text", "text": "probe"}])


# --- rendering ---------------------------------------------------------------------------------------------------------


def _render(template: str, chat: list[Message], variables: dict[str, Any]) -> str:
    compiled = _compile(template)
    try:
        return compiled.render(messages=chat, **variables)
    except TypeError as e:
        texts = _with_text_arguments(chat)  # some templates (DeepSeek's) join arguments to text instead of printing JSON
        if texts == chat:
            raise _template_fault(template, chat, variables) from e
        return _render(template, texts, variables)
    except Exception as e:  # what a template raises is any exception of Python, or its own by raise_exception()
        raise _template_fault(template, chat, variables) from e


def _with_text_arguments(chat: list[Message]) -> list[Message]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**m, "tool_calls": [as_text(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in chat]


def _template_fault(template: str, chat: list[Message], variables: dict[str, Any]) -> InvalidRequestError:
    """The error of a failed rendering, with the first message at which the template stops in this way."""
    error, last = _error_of(template, chat, variables), len(chat) - 1
    # looked for in short conversations only: the time grows with the square of their length
    first = next((n for n in range(last) if _error_of(template, chat[: n + 1], variables) == error), last) if last < 100 else last
    return InvalidRequestError(
        f"messages[{first}] does not fit the chat template: {error}",
        f"roles were {', '.join(str(m['role']) for m in chat[:100])}; change the messages, or pass another chat_template=",
        f"messages[{first}]",
    )


def _error_of(template: str, chat: list[Message], variables: dict[str, Any]) -> str | None:
    try:
        _compile(template).render(messages=chat, **variables)
    except Exception as e:  # the point is to learn what it says
        return str(e) or type(e).__name__
    return None


def _continued(template: str, chat: list[Message], variables: dict[str, Any]) -> str:
    """Render with a mark at the end of the last message, then cut at the mark: the turn stays open for the model."""
    last = chat[-1]
    content = last.get("content")
    where = f"messages[{len(chat) - 1}]"
    if not content:
        raise _bad(where, "has no content to continue (continue_final_message=True)")
    if isinstance(content, str):
        marked: Any = content + _MARK + " "
    else:
        marked = [*content[:-1], {**content[-1], "text": content[-1]["text"] + _MARK + " "}]
    text = _render(template, [*chat[:-1], {**last, "content": marked}], variables)
    head, found, tail = text.rpartition(_MARK)
    if not found:
        raise _bad(where, "is left out or changed by the chat template, so it cannot be continued")
    return head if tail.startswith(" ") else head.rstrip()  # a template that strips the mark's space strips the message's, too


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as e:
        raise TokenizerError(f"the chat template is broken in line {e.lineno}: {e.message}", "pass another one") from e


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja as chat templates expect it: sandboxed (they come from strangers), block lines trimmed, JSON as it is."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %} marks what training learns; for a prompt it is just its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the prompt
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
