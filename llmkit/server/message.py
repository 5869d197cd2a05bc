"""An answer's text, as it comes, to what a message is made of: thoughts, content and tool calls.

A whole answer is read by the same code as a streamed one, in one piece; so both always say the same.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """More content."""

    text: str

    def delta(self) -> dict[str, Any]:
        return {"content": self.text}


@dataclass(frozen=True, slots=True)
class Thought:
    """More of what the model thinks before it answers."""

    text: str

    def delta(self) -> dict[str, Any]:
        return {"reasoning_content": self.text}


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call begins."""

    index: int
    id: str
    name: str

    def delta(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": ""}
        return {"tool_calls": [{"index": self.index, "id": self.id, "type": "function", "function": function}]}


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str

    def delta(self) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.index, "function": {"arguments": self.text}}]}


Event = Text | Thought | Call | Arguments


class Parser(Protocol):
    """Finds tool calls in an answer's text. What it says, joined, does not depend on how the text came in pieces."""

    def push(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...


class PlainText:
    """No calls: text is content."""

    def push(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class Splitter(Protocol):
    """Parts thoughts from the rest."""

    def push(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...


class MessageReader:
    """Thoughts first, then calls in what is left. show_thoughts: whether thoughts are told at all."""

    def __init__(self, thoughts: Splitter | None, calls: Parser | None = None, show_thoughts: bool = True) -> None:
        self._thoughts: Splitter = thoughts or PlainText()
        self._calls: Parser = calls or PlainText()
        self._show = show_thoughts

    def push(self, text: str) -> list[Event]:
        """What `text` adds; nothing while it could still become something else."""
        return joined(self._sort(self._thoughts.push(text)))

    def finish(self) -> list[Event]:
        """What was held back, once no text follows."""
        return joined([*self._sort(self._thoughts.finish()), *self._calls.finish()])

    def _sort(self, events: Sequence[Event]) -> list[Event]:
        sorted_out: list[Event] = []
        for event in events:
            if isinstance(event, Text):
                sorted_out += self._calls.push(event.text)
            elif self._show:
                sorted_out.append(event)
        return sorted_out


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind as one."""
    together: list[Event] = []
    for event in events:
        last = together[-1] if together else None
        if isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            together[-1] = Arguments(event.index, last.text + event.text)
        elif isinstance(event, (Text, Thought)) and type(last) is type(event):
            together[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        elif isinstance(event, Call) or event.text:
            together.append(event)
    return together


@dataclass
class Message:
    """A whole message, from its events."""

    role: str
    content: str = ""
    thoughts: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Text):
                self.content += event.text
            elif isinstance(event, Thought):
                self.thoughts += event.text
            elif isinstance(event, Call):
                self.calls.append({"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}})
            else:
                self.calls[event.index]["function"]["arguments"] += event.text

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it. Content is null when there are only calls, or only thoughts."""
        only_others = not self.content and bool(self.calls or self.thoughts)
        body: dict[str, Any] = {"role": self.role, "content": None if only_others else self.content, "refusal": None}
        if self.thoughts:
            body["reasoning_content"] = self.thoughts
        return body | ({"tool_calls": self.calls} if self.calls else {})


class CallIds:
    """Numbers and names the calls of one answer."""

    def __init__(self, make: Callable[[], str] | None = None) -> None:
        self.count, self._make = 0, make or (lambda: f"call_{uuid.uuid4().hex[:24]}")

    def new(self, name: str) -> Call:
        self.count += 1
        return Call(self.count - 1, self._make(), name)


def unsure(text: str, mark: str) -> int:
    """How many characters at the end of `text` may still turn out to be blanks and `mark`, of which they are the beginning."""
    begun = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return len(text) - len(text[: len(text) - begun].rstrip())
