"""What a request to /v1/messages says, as a conversation and fields of a chat request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from llmkit.server.endpoints.translation import Conversation
from llmkit.server.http.errors import refuse
from llmkit.server.http.protocol import Object, RequestBody

_BLOCKS = {"type": "array", "items": {"type": "object", "required": ["type"]}}
_TEXT = {"anyOf": [{"type": "string"}, _BLOCKS]}
_MESSAGES = {
    "type": "array", "minItems": 1,
    "items": {"type": "object", "required": ["role", "content"],
              "properties": {"role": {"enum": ["user", "assistant"]}, "content": _TEXT}},
    "example": [{"role": "user", "content": "Hello"}],
}  # fmt: skip
# fields of chat completions that this endpoint takes too
SAMPLING = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos", "min_tokens",
            "chat_template_kwargs", "priority", "structured_outputs")  # fmt: skip
# chat's name of a field -> ours
NAMES = {"max_completion_tokens": "max_tokens", "response_format": "output_config.format", "stop": "stop_sequences",
         "reasoning_effort": "output_config.effort", "parallel_tool_calls": "tool_choice"}  # fmt: skip
# fields that change nothing here
QUIET = ("cache_control", "service_tier", "inference_geo", "speed", "diagnostics", "betas", "context_management",
         "user_profile_id", "workspace_id")  # fmt: skip
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CountRequest(RequestBody):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[Any, WithJsonSchema(_MESSAGES)]
    system: Annotated[Any, WithJsonSchema(_TEXT)] = None
    tools: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]})] = None
    tool_choice: Object
    thinking: Object
    output_config: Object
    output_format: Object


class MessageRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    metadata: Object


def chat_fields(body: CountRequest) -> dict[str, Any]:
    """The fields of the chat request. Raises 400 for what there is not."""
    extra = body.model_extra or {}
    for name, hint in {"mcp_servers": "call them from the client", "container": "code runs at the client"}.items():
        if extra.get(name):
            raise refuse(f"{name} is not available", name, hint)
    config, choice = body.output_config or {}, body.tool_choice or {}
    fields = {
        **{name: extra.get(name) for name in SAMPLING},
        "tools": _tools(body.tools),
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "response_format": _format(config.get("format") or body.output_format),
        "reasoning_effort": config.get("effort"),
    }
    thinks = (body.thinking or {}).get("type", "disabled") != "disabled"
    fields["chat_template_kwargs"] = {"enable_thinking": thinks, **(extra.get("chat_template_kwargs") or {})}
    if isinstance(body, MessageRequest):
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or None, "temperature": body.temperature,
                   "top_p": body.top_p, "top_k": body.top_k}  # fmt: skip
    if body.messages and _is_prefill(body.messages):  # the answer goes on where the assistant's last message ends
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return fields


def _is_prefill(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _format(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or given.get("type") != "json_schema" or not isinstance(given.get("schema"), Mapping):
        raise refuse("output_config.format must be {'type': 'json_schema', 'schema': {...}}", "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given["schema"]}}


def _tools(tools: Any) -> Any:
    """Tools with an input_schema -> chat's functions."""
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise refuse("tools must be a list", "tools")
    return [_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools)]


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise refuse(f"{where} must be an object", where)
    if tool.get("type") not in (None, "custom"):
        what = f"{where} is of type {str(tool['type'])[:60]!r}: only tools that the client runs are available"
        raise refuse(what, f"{where}.type")
    if not isinstance(tool.get("input_schema"), Mapping):
        raise refuse(f"{where}.input_schema must be a JSON schema", f"{where}.input_schema")
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _tool_choice(given: Mapping[str, Any] | None) -> Any:
    if given is None:
        return None
    if given.get("type") == "tool" and isinstance(given.get("name"), str):
        return {"type": "function", "function": {"name": given["name"]}}
    if given.get("type") not in _CHOICES:
        raise refuse("tool_choice must be {'type': 'auto' | 'any' | 'none'} or {'type': 'tool', 'name': ...}", "tool_choice")
    return _CHOICES[given["type"]]


# ---- messages


def conversation(body: CountRequest) -> Conversation:
    """The system text and the messages. Raises 400 naming the block at fault."""
    talk = Conversation()
    if body.system is not None:
        talk.add("system", "system", content=_text(body.system, "system"))
    if not isinstance(body.messages, list) or not body.messages:
        raise refuse("messages must be a list of at least one message", "messages")
    for i, message in enumerate(body.messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant"):
            raise refuse(f"{where} must be an object whose role is user or assistant", f"{where}.role")
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(b, Mapping) for b in blocks):
            raise refuse(f"{where}.content must be text or a list of blocks", f"{where}.content")
        (_add_user if message["role"] == "user" else _add_assistant)(talk, blocks, where)
    return talk


def _text(given: Any, where: str) -> str:
    """Text, or blocks of text."""
    if isinstance(given, str):
        return given
    if given is None:
        return ""
    if not isinstance(given, list):
        raise refuse(f"{where} must be text or a list of text blocks", where)
    return "\n".join(_block_text(block, f"{where}[{i}]") for i, block in enumerate(given))


def _block_text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    if kind != "text":
        raise refuse(f"{where} is of type {str(kind)[:60]!r}; this server reads text only", where)
    if not isinstance(block.get("text"), str):
        raise refuse(f"{where} has no text", f"{where}.text")
    return block["text"]


def _add_user(talk: Conversation, blocks: list[Any], where: str) -> None:
    """Results of tools first, each a message of its own, then what the user says."""
    said: list[str] = []
    for i, block in enumerate(blocks):
        place = f"{where}.content[{i}]"
        if block.get("type") == "tool_result":
            _add_result(talk, block, place)
        else:
            said.append(_block_text(block, place))
    if said or not blocks:
        talk.add(where, "user", content="\n".join(said))


def _add_result(talk: Conversation, block: Mapping[str, Any], place: str) -> None:
    if not isinstance(block.get("tool_use_id"), str):
        raise refuse(f"{place} needs the tool_use_id that it answers", f"{place}.tool_use_id")
    text, answered = _text(block.get("content"), f"{place}.content"), _call_id(block["tool_use_id"])
    names = {c["id"]: c["function"]["name"] for m in talk.messages for c in m.get("tool_calls", ())}
    named = {"name": names[answered]} if answered in names else {}
    content = f"Error: {text}" if block.get("is_error") else text
    talk.add(place, "tool", tool_call_id=answered, content=content, **named)


def _add_assistant(talk: Conversation, blocks: list[Any], where: str) -> None:
    said: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        kind, place = block.get("type"), f"{where}.content[{i}]"
        if kind == "tool_use":
            calls.append(_call(block, place))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":  # which nobody here can read
            said.append(_block_text(block, place))
    more: dict[str, Any] = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    talk.add(where, "assistant", content="".join(said), **more, **({"tool_calls": calls} if calls else {}))


def _call(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    name, given = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(block.get("id"), str) or not isinstance(given, Mapping):
        raise refuse(f"{place} needs an id, a name and an input, which is an object", place)
    function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": _call_id(block["id"]), "type": "function", "function": function}


def _call_id(given: str) -> str:
    """As the chat template knows it (Mistral's count its letters)."""
    return given.removeprefix("toolu_")
