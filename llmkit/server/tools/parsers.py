"""Where in an answer the calls are: between tags, after a mark, or all of it. Whatever is no call stays content."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from llmkit.server.message import Arguments, CallIds, Event, Text, unsure
from llmkit.server.tools.json_reader import CallReader, ListReader, Reader, Status
from llmkit.server.tools.mistral import MistralReader
from llmkit.server.tools.pythonic import PythonicReader

NewReader = Callable[[CallIds, Collection[str]], Reader]


class TaggedCalls:
    """Calls after `opening` anywhere in the text, with a `closing` that models sometimes forget. Blanks around calls are dropped.

    A call that breaks before its name is known is content, tag and all; one that breaks later ends there, the rest is content.
    """

    def __init__(self, opening: str, closing: str, reader: NewReader, names: Collection[str], ids: CallIds) -> None:
        self._opening, self._closing, self._new_reader = opening, closing, reader
        self._names, self._ids = names, ids
        self._held = ""  # text that may still become a tag
        self._reader: Reader | None = None
        self._lead = ""  # blanks and tag before the call being read
        self._after = False  # a call has ended, and only blanks came since

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            text = self._in_call(self._reader, text, events) if self._reader else self._in_text(text, events)
        return events

    def finish(self) -> list[Event]:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.told:
            return [Text(self._lead + reader.raw)]
        if self._after and not self._held.removeprefix(self._closing).strip():
            return []
        held, self._held = self._held, ""
        return [Text(held)] if held else []

    def _in_text(self, text: str, events: list[Event]) -> str:
        held = self._without_closing(self._held + text)
        before, found, rest = held.partition(self._opening)
        if found:
            shown = before.rstrip()
            self._lead, self._held = before[len(shown) :] + self._opening, ""
            self._reader, self._after = self._new_reader(self._ids, self._names), False
        else:
            shown = held[: len(held) - self._undecided(held)]
            self._held, rest = held[len(shown) :], ""
        if shown:
            self._after = False
            events.append(Text(shown))
        return rest

    def _without_closing(self, held: str) -> str:
        """After a call its closing tag and blanks belong to it."""
        return held.lstrip().removeprefix(self._closing).lstrip() if self._after and self._closing else held

    def _undecided(self, held: str) -> int:
        if self._after and self._closing and self._closing.startswith(held.lstrip()):
            return len(held)
        return unsure(held, self._opening)

    def _in_call(self, reader: Reader, text: str, events: list[Event]) -> str:
        for i, c in enumerate(text):
            status = reader.push(c)
            if status is Status.MORE:
                continue
            events += reader.take()
            self._reader = None
            self._after = status is not Status.BROKEN or reader.told
            if status is Status.BROKEN and not reader.told:
                events.append(Text(self._lead + reader.raw))
            return text[i + (status is Status.END) :]
        events += reader.take()
        return ""


class WholeCalls:
    """The answer is calls from its first character (after any of `marks`), or it is content. `closing` after them is nothing."""

    def __init__(self, reader: Reader, marks: Sequence[str] = (), closing: str = "") -> None:
        self._reader: Reader | None = reader
        self._marks, self._closing = marks, closing
        self._begin = ""  # blanks and marks, until the first other character
        self._started = False
        self._after = False  # calls have ended
        self._tail = ""  # what came since, as long as it may be blanks and the closing mark

    def push(self, text: str) -> list[Event]:
        if self._reader is None:
            return self._rest(text)
        if not self._started:
            text = self._skip_marks(text)
        return self._read(self._reader, text) if text else []

    def _skip_marks(self, text: str) -> str:
        begin = self._begin + text
        rest = begin.lstrip()
        mark = next((m for m in self._marks if rest.startswith(m)), "")
        rest = rest.removeprefix(mark).lstrip()
        if not rest or (not mark and any(m.startswith(rest) for m in self._marks)):
            self._begin = begin
            return ""
        self._begin, self._started = begin[: len(begin) - len(rest)], True
        return rest

    def _read(self, reader: Reader, text: str) -> list[Event]:
        events: list[Event] = []
        for i, c in enumerate(text):
            status = reader.push(c)
            if status is Status.MORE:
                continue
            events += reader.take()
            self._reader, self._after = None, reader.told
            if not reader.told:
                return [Text(self._begin + reader.raw + text[i:])]
            return [*events, *self._rest(text[i + (status is Status.END) :])]
        return [*events, *reader.take()]

    def _rest(self, text: str) -> list[Event]:
        """What follows."""
        self._tail += text
        if self._after and self._closing.startswith(self._tail.strip()):
            return []
        tail, self._tail, self._after = self._tail, "", False
        return [Text(tail)] if tail else []

    def finish(self) -> list[Event]:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.told:
            text = self._begin + reader.raw
        else:
            text = "" if self._tail.strip() in ("", self._closing) else self._tail
        return [Text(text)] if text else []


class OneCall:
    """tool_choice named the tool, and the grammar lets nothing through but its arguments."""

    def __init__(self, name: str, ids: CallIds) -> None:
        self._name, self._ids, self._begun = name, ids, False

    def push(self, text: str) -> list[Event]:
        if not text:
            return []
        call: list[Event] = [] if self._begun else [self._ids.new(self._name)]
        self._begun = True
        return [*call, Arguments(0, text)]

    def finish(self) -> list[Event]:
        return []


def hermes(names: Collection[str], ids: CallIds) -> TaggedCalls:
    """Hermes, Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""
    return TaggedCalls("<tool_call>", "</tool_call>", CallReader, names, ids)


def mistral(names: Collection[str], ids: CallIds) -> TaggedCalls:
    """Mistral: [TOOL_CALLS] [{...}, {...}], and from 2025 on [TOOL_CALLS]name[ARGS]{...}."""
    return TaggedCalls("[TOOL_CALLS]", "", MistralReader, names, ids)


def llama3_json(names: Collection[str], ids: CallIds) -> WholeCalls:
    """Llama 3: {"name": ..., "parameters": {...}}; {...}."""
    return WholeCalls(ListReader(ids, names, brackets=False), ("<|python_tag|>",))


def pythonic(names: Collection[str], ids: CallIds) -> WholeCalls:
    """Llama 3.2, Llama 4: [name(argument=value), ...]."""
    return WholeCalls(PythonicReader(ids, names), ("<|python_start|>",), "<|python_end|>")


def required(names: Collection[str], ids: CallIds) -> WholeCalls:
    """What our grammar for tool_choice "required" lets through: [{"name": ..., "parameters": {...}}, ...]."""
    return WholeCalls(ListReader(ids, names, brackets=True))


PARSERS: dict[str, Callable[[Collection[str], CallIds], TaggedCalls | WholeCalls]] = {
    "hermes": hermes, "llama3_json": llama3_json, "mistral": mistral, "pythonic": pythonic,
}  # fmt: skip
