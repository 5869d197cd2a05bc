"""What a request to /v1/responses says, as a conversation and fields of a chat request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from llmkit.server.endpoints.translation import Conversation, new_id
from llmkit.server.http.errors import HttpError, refuse
from llmkit.server.http.protocol import Count, Object, RequestBody

Item = dict[str, Any]
_INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}], "example": "Hello"}
# fields of chat completions that this endpoint takes too
SAMPLING = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids",
            "ignore_eos", "min_tokens", "logit_bias", "chat_template_kwargs", "priority", "structured_outputs")  # fmt: skip
# chat's name of a field -> ours
NAMES = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format", "reasoning_effort": "reasoning.effort",
         "messages": "input"}  # fmt: skip
# fields that change nothing here, or are only repeated
QUIET = ("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "stream_options", "max_tool_calls",
         "prompt_cache_options", "moderation")  # fmt: skip


class ResponseRequest(RequestBody):
    """POST /v1/responses."""

    input: Annotated[Any, WithJsonSchema(_INPUT)] = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]})] = None
    tool_choice: Annotated[Any, WithJsonSchema({})] = None
    parallel_tool_calls: bool | None = None
    text: Object
    reasoning: Object
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    truncate_prompt_tokens: Count | None = None


def chat_fields(body: ResponseRequest) -> dict[str, Any]:
    """The fields of the chat request. Raises 400 for what there is not."""
    _refuse_missing(body)
    format = (body.text or {}).get("format")
    logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or [])
    return {
        **{name: (body.model_extra or {}).get(name) for name in SAMPLING},
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": logprobs or None,
        "top_logprobs": body.top_logprobs,
        "tools": chat_tools(body.tools),
        "tool_choice": _tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(format),
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
    }


def _refuse_missing(body: ResponseRequest) -> None:
    extra = body.model_extra or {}
    for name, hint in {"conversation": "use previous_response_id", "prompt": "send the text itself as instructions"}.items():
        if extra.get(name) is not None:
            raise refuse(f"{name} is not available", name, hint)
    if body.truncation not in (None, "auto", "disabled"):
        raise refuse(f"truncation must be auto or disabled; got {body.truncation[:60]!r}", "truncation")
    if body.background and body.stream:
        raise refuse("background and stream exclude each other here", "background", "drop one of the two")
    if body.background and body.store is False:
        raise refuse("background needs store: the response is fetched later", "store", "drop store=false")


def _format(given: Any) -> dict[str, Any] | None:
    """text.format -> response_format."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise refuse("text.format must be an object", "text.format")
    if given.get("type") != "json_schema":
        return dict(given)
    if not isinstance(given.get("schema"), Mapping):
        raise refuse("text.format needs {'type': 'json_schema', 'name': ..., 'schema': {...}}", "text.format.schema")
    return {"type": "json_schema", "json_schema": {k: given[k] for k in ("name", "schema", "strict") if k in given}}


def chat_tools(tools: Any) -> Any:
    """Flat function tools -> chat's nested ones; anything else stays for the reader of chat tools to complain about."""

    def nested(i: int, tool: Any) -> Any:
        if not isinstance(tool, Mapping) or tool.get("type") != "function" or "function" in tool:
            return tool
        return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}

    return [nested(i, t) for i, t in enumerate(tools)] if isinstance(tools, list) else tools


def _tool_choice(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    if given.get("type") == "allowed_tools" and "allowed_tools" not in given:
        inside = {"mode": given.get("mode", "auto"), "tools": chat_tools(given.get("tools"))}
        return {"type": "allowed_tools", "allowed_tools": inside}
    if given.get("type") == "function" and "name" in given:
        return {"type": "function", "function": {"name": given["name"]}}
    return given


# ---- items


def input_items(given: Any) -> list[Item]:
    """`input` as items. Raises 400 when it is neither text nor a list of items."""
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not isinstance(given, list) or not all(isinstance(i, Mapping) for i in given):
        raise refuse("input must be text or a list of items", "input")
    return [{"type": "message", **item, "id": item.get("id") or new_id("item")} for item in given]


def add_items(talk: Conversation, items: list[Item], where: str = "input") -> None:
    """Append items to a conversation. Calls join the assistant's message before them, as do its thoughts."""
    calls: dict[str, str] = {}
    for i, item in enumerate(items):
        kind, place = item.get("type"), f"{where}[{i}]"
        if kind == "message":
            _add_message(talk, item, place)
        elif kind == "function_call":
            call = _call(item, place)
            calls[call["id"]] = call["function"]["name"]
            _turn(talk, place).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            _add_output(talk, item, place, calls)
        elif kind == "reasoning":
            talk.add(place, "assistant", reasoning_content=_thoughts(item, place))
        else:
            raise refuse(f"{place} is of type {str(kind)[:60]!r}; messages, function calls, their outputs and reasoning are read",
                         f"{place}.type")  # fmt: skip
    for message in talk.messages:
        if message["role"] == "assistant":
            message.setdefault("content", "")  # what templates read even beside calls


def _add_message(talk: Conversation, item: Item, place: str) -> None:
    role, content = item.get("role"), item.get("content")
    if isinstance(content, list):
        content = [_text_of_refusal(p) for p in content]
    if role == "assistant":
        turn = _turn(talk, place)
        if "content" in turn or "tool_calls" in turn:  # it has spoken already
            turn = talk.add(place, "assistant")
        turn["content"] = content
    else:
        talk.add(place, "system" if role == "developer" else role, content=content)  # type: ignore[arg-type]


def _text_of_refusal(part: Any) -> Any:
    is_refusal = isinstance(part, Mapping) and part.get("type") == "refusal"
    return {"type": "output_text", "text": part.get("refusal")} if is_refusal else part


def _turn(talk: Conversation, place: str) -> dict[str, Any]:
    """The assistant's message that is being put together."""
    last = talk.messages[-1] if talk.messages else None
    return last if last and last["role"] == "assistant" else talk.add(place, "assistant")


def _call(item: Item, place: str) -> dict[str, Any]:
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(item.get("call_id"), str):
        raise refuse(f"{place} needs a call_id, a name and arguments, which are JSON text", place)
    try:
        json.loads(arguments or "{}")
    except (ValueError, RecursionError) as e:
        raise refuse(f"{place}.arguments is not valid JSON: {str(e)[:200]}", f"{place}.arguments") from e
    return {"id": item["call_id"], "type": "function", "function": {"name": name, "arguments": arguments}}


def _add_output(talk: Conversation, item: Item, place: str, calls: Mapping[str, str]) -> None:
    if not isinstance(item.get("call_id"), str):
        raise refuse(f"{place} needs the call_id that it answers", f"{place}.call_id")
    named = {"name": calls[item["call_id"]]} if item["call_id"] in calls else {}
    talk.add(place, "tool", tool_call_id=item["call_id"], content=item.get("output"), **named)


def _thoughts(item: Item, place: str) -> str:
    content, summary = item.get("content") or [], item.get("summary") or []
    if not isinstance(content, list) or not isinstance(summary, list):
        raise refuse(f"{place}: content and summary of reasoning are lists of parts", place)
    parts = [*content, *summary]
    return "\n".join(p["text"] for p in parts if isinstance(p, Mapping) and isinstance(p.get("text"), str))


def with_instructions(talk: Conversation, instructions: str | None) -> Conversation:
    """The instructions and the system messages at the beginning as one message, for templates read no more."""
    leading = next((i for i, m in enumerate(talk.messages) if m["role"] != "system"), len(talk.messages))
    systems = talk.messages[:leading]
    if (not instructions and leading < 2) or not all(isinstance(m.get("content"), (str, list)) for m in systems):
        return talk  # nothing to join, or something that the reader of messages will complain about
    texts = [instructions, *(m["content"] if isinstance(m["content"], str) else _joined(m["content"]) for m in systems)]
    whole = Conversation()
    whole.add(talk.origins[0] if leading else "instructions", "system", content="\n\n".join(t for t in texts if t))
    return Conversation(whole.messages + talk.messages[leading:], whole.origins + talk.origins[leading:])


def _joined(parts: list[Any]) -> str:
    texts = [p.get("text") if isinstance(p, Mapping) else None for p in parts]
    if not all(isinstance(t, str) for t in texts):
        raise HttpError(400, "system and developer messages hold text only", None, "input")
    return "\n".join(t for t in texts if t)
