"""An answer as the content blocks of an Anthropic message, and the events that tell of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmkit.outputs import CompletionOutput, RequestOutput
from llmkit.server.endpoints.translation import named_frame
from llmkit.server.message import Arguments, Call, Event, Text, Thought

_STOPS = {"length": "max_tokens", "stop": "end_turn"}


class MessageWriter:
    """Fills `message`, whose `content` begins empty. Every method returns the frames of what it changed."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message
        self._blocks: list[dict[str, Any]] = message["content"]
        self._kind: type | None = None  # of the block that is open
        self._arguments = ""

    def begin(self, output: RequestOutput) -> bytes:
        """What is known at the first token."""
        self.message["usage"] = usage(output) | {"output_tokens": 0}
        return named_frame({"type": "message_start", "message": self.message}) + named_frame({"type": "ping"})

    def take(self, events: Sequence[Event]) -> bytes:
        """More of the answer."""
        return b"".join(map(self._take, events))

    def _take(self, event: Event) -> bytes:
        if isinstance(event, Call):
            block = {"type": "tool_use", "id": f"toolu_{event.id.removeprefix('call_')}", "name": event.name, "input": {}}
            return self._close() + self._open(Call, block)
        if isinstance(event, Arguments):
            self._arguments += event.text
            return self._delta({"type": "input_json_delta", "partial_json": event.text})
        opening = b""
        if self._kind is not type(event):
            text, thinking = {"type": "text", "text": ""}, {"type": "thinking", "thinking": "", "signature": ""}
            opening = self._close() + self._open(type(event), text if isinstance(event, Text) else thinking)
        name = "text" if isinstance(event, Text) else "thinking"
        self._blocks[-1][name] += event.text
        return opening + self._delta({"type": f"{name}_delta", name: event.text})

    def _open(self, kind: type, block: dict[str, Any]) -> bytes:
        self._kind, self._arguments = kind, ""
        self._blocks.append(block)
        return named_frame({"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named_frame({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta})

    def _close(self) -> bytes:
        if self._kind is None:
            return b""
        signed = b""
        if self._kind is Call:
            self._blocks[-1]["input"] = _object(self._arguments)
        elif self._kind is Thought:
            signed = self._delta({"type": "signature_delta", "signature": ""})
        self._kind = None
        return signed + named_frame({"type": "content_block_stop", "index": len(self._blocks) - 1})

    def finish(self, output: RequestOutput) -> bytes:
        """The answer is complete."""
        closing, done = self._close(), output.outputs[0]
        reason, sequence = self._why(done)
        self.message |= {"stop_reason": reason, "stop_sequence": sequence, "usage": usage(output)}
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        last = {"type": "message_delta", "delta": delta, "usage": self.message["usage"]}
        return closing + named_frame(last) + named_frame({"type": "message_stop"})

    def _why(self, done: CompletionOutput) -> tuple[str, str | None]:
        if isinstance(done.stop_reason, str):
            return "stop_sequence", done.stop_reason
        if done.finish_reason == "stop" and any(b["type"] == "tool_use" for b in self._blocks):
            return "tool_use", None
        return _STOPS.get(done.finish_reason or "", "max_tokens"), None  # "error" is a cut, too


def usage(output: RequestOutput) -> dict[str, int]:
    """Tokens read, of which those from the prefix cache are counted apart, and written."""
    read, cached = len(output.prompt_token_ids), output.num_cached_tokens
    return {"input_tokens": read - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
            "output_tokens": len(output.outputs[0].token_ids)}  # fmt: skip


def _object(text: str) -> dict[str, Any]:
    """A call's input. An answer that was cut in the middle of one leaves what is no JSON: then it is empty."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
