"""An answer as the items of a response, and the events that tell of them one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from llmkit.errors import EngineError
from llmkit.outputs import RequestOutput
from llmkit.server.endpoints.translation import named_frame, new_id
from llmkit.server.http.errors import as_http_error
from llmkit.server.message import Arguments, Call, Event, Text, Thought

# kind of event -> (type of the item, beginning of its id, type of its part, beginning of its events' names)
_SPOKEN: dict[type, tuple[str, str, str, str]] = {
    Text: ("message", "msg", "output_text", "response.output_text"),
    Thought: ("reasoning", "rs", "reasoning_text", "response.reasoning_text"),
}


class ResponseWriter:
    """Fills `response`, whose `output` begins empty. Every method returns the frames of what it changed."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response
        self._items: list[dict[str, Any]] = response["output"]
        self._kind: type | None = None  # of the item that is open
        self._sequence = 0

    def begin(self) -> bytes:
        return self._tell("response.created", response=self.response) + self._tell("response.in_progress", response=self.response)

    def take(self, events: Sequence[Event], logprobs: Sequence[dict[str, Any]] = ()) -> bytes:
        """More of the answer. logprobs: of the tokens that brought it, in OpenAI's form."""
        return b"".join(self._take(e, logprobs) for e in events)

    def _take(self, event: Event, logprobs: Sequence[dict[str, Any]]) -> bytes:
        if isinstance(event, Call):
            return self._close() + self._open_call(event)
        if isinstance(event, Arguments):
            self._items[-1]["arguments"] += event.text
            return self._tell_inside("response.function_call_arguments.delta", delta=event.text)
        opening = b"" if self._kind is type(event) else self._close() + self._open_spoken(type(event))
        return opening + self._speak(event, logprobs)

    # ---- items

    def _open_call(self, call: Call) -> bytes:
        self._kind = Call
        return self._add({"type": "function_call", "id": new_id("fc"), "call_id": call.id, "name": call.name, "arguments": "",
                          "status": "in_progress"})  # fmt: skip

    def _open_spoken(self, kind: type) -> bytes:
        self._kind = kind
        item_type, prefix, part_type, _ = _SPOKEN[kind]
        item: dict[str, Any] = {"type": item_type, "id": new_id(prefix), "status": "in_progress", "content": []}
        item |= {"role": "assistant"} if kind is Text else {"summary": []}
        added = self._add(item)
        part: dict[str, Any] = {"type": part_type, "text": ""} | ({"annotations": [], "logprobs": []} if kind is Text else {})
        item["content"].append(part)
        return added + self._tell_inside("response.content_part.added", content_index=0, part=part)

    def _add(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        return self._tell("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _speak(self, event: Text | Thought, logprobs: Sequence[dict[str, Any]]) -> bytes:
        part, name = self._items[-1]["content"][0], _SPOKEN[type(event)][3]
        part["text"] += event.text
        more: dict[str, Any] = {"content_index": 0, "delta": event.text}
        if isinstance(event, Text):
            part["logprobs"] += logprobs
            more["logprobs"] = list(logprobs)
        return self._tell_inside(f"{name}.delta", **more)

    def _close(self, status: str = "completed") -> bytes:
        """End the item that is open."""
        if self._kind is None:
            return b""
        item, kind = self._items[-1], self._kind
        self._kind, item["status"] = None, status
        if kind is Call:
            said = self._tell_inside("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if kind is Text else {}
            said = self._tell_inside(f"{_SPOKEN[kind][3]}.done", content_index=0, text=part["text"], **more)
            said += self._tell_inside("response.content_part.done", content_index=0, part=part)
        return said + self._tell("response.output_item.done", output_index=len(self._items) - 1, item=item)

    # ---- the end

    def finish(self, output: RequestOutput, usage: dict[str, Any]) -> bytes:
        """The answer is complete, or as long as it may get."""
        if output.outputs[0].finish_reason == "error":
            return self.fail(EngineError("the model could not go on: no token may follow, or its numbers broke"))
        cut = output.outputs[0].finish_reason != "stop"
        opening = b"" if self._items or cut else self._open_spoken(Text)  # an empty answer is an empty message
        closing = self._close("incomplete" if cut else "completed")
        self.response["status"] = "incomplete" if cut else "completed"
        self.response["usage"] = usage
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        return opening + closing + self._tell(f"response.{self.response['status']}", response=self.response)

    def fail(self, error: BaseException) -> bytes:
        """It broke."""
        closing = self._close("incomplete")
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": as_http_error(error).message}
        return closing + self._tell("response.failed", response=self.response)

    def cancel(self) -> None:
        """Its reader, or a request of its own, ended it."""
        self._close("incomplete")
        self.response["status"] = "cancelled"

    # ---- frames

    def _tell_inside(self, kind: str, **fields: Any) -> bytes:
        return self._tell(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _tell(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return named_frame(event)
