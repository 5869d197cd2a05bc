"""JSON calls read character by character: a call is told as soon as its name is known, its arguments while they come."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from enum import Enum

from llmkit.server.message import Arguments, CallIds, Event

_WORD = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_WORD_CHARACTERS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")
_BLANKS = " \t\r\n"
MAX_DEPTH = 200


class Status(Enum):
    """What a character did to what is being read. ENDED_BEFORE: it was complete already, and the character belongs to others."""

    MORE = 1
    END = 2
    ENDED_BEFORE = 3
    BROKEN = 4


class ValueReader:
    """Checks one JSON value. Raw line breaks in strings are let through: models write them."""

    def __init__(self) -> None:
        self.in_string = False
        self._stack: list[str] = []
        self._want = "value"  # or: first value, key, first key, colon, next
        self._escape = 0  # hexadecimal digits of an escape still to come; -1: the letter after the backslash
        self._word = ""

    def push(self, c: str) -> Status:
        if self.in_string:
            return self._in_string(c)
        if self._word:
            if c in _WORD_CHARACTERS:
                self._word += c
                return Status.MORE if len(self._word) < 400 else Status.BROKEN
            if not _WORD.fullmatch(self._word):
                return Status.BROKEN
            self._word = ""
            if self._value_done() is Status.END:
                return Status.ENDED_BEFORE
        return Status.MORE if c in _BLANKS else self._between(c)

    def _in_string(self, c: str) -> Status:
        if self._escape:
            return self._escaped(c)
        if c == "\\":
            self._escape = -1
        elif c == '"':
            self.in_string = False
            if self._want == "colon":
                return Status.MORE
            return self._value_done()
        return Status.MORE

    def _escaped(self, c: str) -> Status:
        if self._escape < 0:
            self._escape = 4 if c == "u" else 0
            return Status.MORE if c in '"\\/bfnrtu' else Status.BROKEN
        self._escape -= 1
        return Status.MORE if c in "0123456789abcdefABCDEF" else Status.BROKEN

    def _between(self, c: str) -> Status:
        want = self._want
        if c == '"' and want in ("value", "first value", "key", "first key"):
            self.in_string = True
            self._want = "colon" if "key" in want else "next"
        elif c in "{[" and "value" in want and len(self._stack) < MAX_DEPTH:
            self._stack.append("}" if c == "{" else "]")
            self._want = "first key" if c == "{" else "first value"
        elif c in "}]" and want in ("next", "first key" if c == "}" else "first value") and self._stack[-1:] == [c]:
            self._stack.pop()
            return self._value_done()
        elif c == ":" and want == "colon":
            self._want = "value"
        elif c == "," and want == "next" and self._stack:
            self._want = "key" if self._stack[-1] == "}" else "value"
        elif c in _WORD_CHARACTERS and "value" in want:
            self._word, self._want = c, "next"
        else:
            return Status.BROKEN
        return Status.MORE

    def _value_done(self) -> Status:
        self._want = "next"
        return Status.MORE if self._stack else Status.END


class Reader(ABC):
    """Reads something that may be calls. events: what it said since they were taken.

    raw: what was read while nothing was told. told: whether a Call was said; until then it can still become plain text.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.told = False
        self._raw: list[str] = []

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, c: str) -> Status:
        """One more character. After ENDED_BEFORE or BROKEN it has not been taken."""
        status = self._push(c)
        if not self.told and status in (Status.MORE, Status.END):
            self._raw.append(c)
        return status

    @abstractmethod
    def _push(self, c: str) -> Status: ...

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self.events = self.events, []
        return events

    @property
    def complete(self) -> bool:
        """True when the text may end here."""
        return False


class CallReader(Reader):
    """One `{"name": ..., "arguments" or "parameters": {...}}`, other keys beside.

    names: the tools there are; any other name breaks the call.
    """

    def __init__(self, ids: CallIds, names: Collection[str]) -> None:
        super().__init__()
        self._ids, self._names = ids, names
        self._phase = "open"  # then: first key, key, colon, value, next
        self._value = ValueReader()
        self._text: list[str] = []  # of the key or value being read
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None  # those that came before the name, or in one piece
        self._streaming = False

    def _push(self, c: str) -> Status:
        if self._phase in ("reading key", "value"):
            return self._in_value(c)
        if c in _BLANKS:
            return Status.MORE
        return self._between(c)

    def _between(self, c: str) -> Status:
        phase = self._phase
        if phase == "open" and c == "{":
            self._phase = "first key"
        elif phase in ("first key", "key") and c == '"':
            return self._begin("reading key", c)
        elif phase == "colon" and c == ":":
            self._phase = "before value"
        elif phase == "before value":
            return self._begin_value(c)
        elif phase == "next" and c == ",":
            self._phase = "key"
        elif phase in ("next", "first key") and c == "}":
            return self._end()
        else:
            return Status.BROKEN
        return Status.MORE

    def _begin(self, phase: str, c: str) -> Status:
        self._phase, self._value, self._text = phase, ValueReader(), []
        return self._in_value(c)

    def _begin_value(self, c: str) -> Status:
        if self._is_arguments and (self.told or self._arguments is not None):
            return Status.BROKEN  # arguments twice
        if self._is_arguments and c == "{" and self._name is not None:
            self._tell(self._name)
            self._streaming = True
        return self._begin("value", c)

    @property
    def _is_arguments(self) -> bool:
        return self._key in ("arguments", "parameters")

    def _tell(self, name: str) -> None:
        self.told = True
        self.events.append(self._ids.new(name))

    def _in_value(self, c: str) -> Status:
        kept = json.dumps(c)[1:-1] if c < " " and self._value.in_string else c
        status = self._value.push(c)
        if status in (Status.MORE, Status.END):
            self._keep(kept)
        if status is Status.END or status is Status.ENDED_BEFORE:
            done = self._done()
            return self._between_blank(c) if done is Status.MORE and status is Status.ENDED_BEFORE else done
        return status

    def _between_blank(self, c: str) -> Status:
        return Status.MORE if c in _BLANKS else self._between(c)

    def _keep(self, kept: str) -> None:
        if self._streaming:
            self.events.append(Arguments(self._ids.count - 1, kept))
        else:
            self._text.append(kept)

    def _done(self) -> Status:
        """A key or a value is complete."""
        text = "".join(self._text)
        if self._phase == "reading key":
            self._key, self._phase = json.loads(text), "colon"
            return Status.MORE
        self._phase = "next"
        if self._key == "name":
            return self._take_name(text)
        if self._is_arguments and not self._streaming:
            return self._take_arguments(text)
        self._streaming = False
        return Status.MORE

    def _take_name(self, text: str) -> Status:
        name = json.loads(text)
        if self._name is not None or not isinstance(name, str) or name not in self._names:
            return Status.BROKEN
        self._name = name
        return Status.MORE

    def _take_arguments(self, text: str) -> Status:
        """Arguments before the name, or as JSON text in a string, or none."""
        value = json.loads(text)
        if isinstance(value, str):
            text, value = value, _object_in(value)
        self._arguments = "{}" if value is None and text == "null" else text
        return Status.MORE if isinstance(value, dict) or text == "null" else Status.BROKEN

    def _end(self) -> Status:
        if self._name is None:
            return Status.BROKEN
        if not self.told:
            self._tell(self._name)
            self.events.append(Arguments(self._ids.count - 1, self._arguments or "{}"))
        return Status.END


def _object_in(text: str) -> dict[str, object] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class ListReader(Reader):
    """Calls one after the other: `[a, b]`, or `a; b` where there are no brackets."""

    def __init__(self, ids: CallIds, names: Collection[str], brackets: bool) -> None:
        super().__init__()
        self._ids, self._names, self._brackets = ids, names, brackets
        self._phase = "open" if brackets else "item"
        self._item: CallReader | None = None

    def _push(self, c: str) -> Status:
        if self._item is not None:
            return self._in_item(self._item, c)
        if c in _BLANKS:
            return Status.MORE
        if self._phase == "open" and c == "[":
            self._phase = "item"
        elif self._phase == "item":
            self._item = CallReader(self._ids, self._names)
            return self._in_item(self._item, c)
        elif self._phase == "next" and c == ("," if self._brackets else ";"):
            self._phase = "item"
        elif self._phase == "next" and c == "]" and self._brackets:
            return Status.END
        else:
            return Status.BROKEN
        return Status.MORE

    def _in_item(self, item: CallReader, c: str) -> Status:
        status = item.push(c)
        self.events += item.take()
        self.told |= item.told
        if status is Status.END:
            self._item, self._phase = None, "next"
            return Status.MORE
        return status

    @property
    def complete(self) -> bool:
        """True when the text may end here."""
        return not self._brackets and self._phase == "next"
