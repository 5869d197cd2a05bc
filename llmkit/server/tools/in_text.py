"""Tools for models whose chat template knows none: told in the system message, called and answered as Hermes does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_TOLD = """You may call functions to help with the user's request. Their signatures:
<tools>
{tools}
</tools>

To call one, write its name and arguments as JSON within <tool_call></tool_call>:
<tool_call>
{{"name": "function-name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def with_tools_in_text(messages: Any, tools: Sequence[Mapping[str, Any]]) -> Any:
    """The conversation with its tools, calls and tool results written out. What is no message is left for others to refuse."""
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return messages
    written = [_written(m) for m in messages]
    if not tools:
        return written
    told = _TOLD.format(tools="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))
    first = written[0] if written else {}
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *written[1:]]
    return [{"role": "system", "content": told}, *written] if written else written


def _written(message: Mapping[str, Any]) -> Mapping[str, Any]:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role == "tool" and isinstance(content, (str, list)):
        return {"role": "user", "content": f"<tool_response>\n{_text(content)}\n</tool_response>"}
    functions = [c.get("function") for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else []
    if not functions or not all(isinstance(f, Mapping) for f in functions):
        return message
    lines = [_text(content), *(f"<tool_call>\n{_call(f)}\n</tool_call>" for f in functions)]
    return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": "\n".join(line for line in lines if line)}


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def _call(function: Any) -> str:
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return f'{{"name": {json.dumps(function.get("name"), ensure_ascii=False)}, "arguments": {text or "{}"}}}'
