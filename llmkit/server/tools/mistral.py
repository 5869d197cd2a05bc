"""What follows Mistral's [TOOL_CALLS]: a JSON list of calls, or one call as `name{...}` or `name[ARGS]{...}`."""

from __future__ import annotations

from collections.abc import Collection

from llmkit.server.message import Arguments, CallIds
from llmkit.server.tools.json_reader import ListReader, Reader, Status, ValueReader

_MARKS = ("[ARGS]", "[CALL_ID]")


class MistralReader(Reader):
    """Decides by the first character which of the two forms it is."""

    def __init__(self, ids: CallIds, names: Collection[str]) -> None:
        super().__init__()
        self._ids, self._names = ids, names
        self._list: ListReader | None = None
        self._head = ""  # name and marks before the arguments
        self._value: ValueReader | None = None

    def _push(self, c: str) -> Status:
        if self._list is not None:
            return self._in_list(self._list, c)
        if self._value is not None:
            return self._in_arguments(self._value, c)
        if c == "{":
            return self._begin_arguments(c)
        if not self._head.strip() and c == "[":
            self._list = ListReader(self._ids, self._names, brackets=True)
            return self._in_list(self._list, c)
        self._head += c
        return Status.MORE if len(self._head) <= 256 else Status.BROKEN

    def _in_list(self, calls: ListReader, c: str) -> Status:
        status = calls.push(c)
        self.events += calls.take()
        self.told |= calls.told
        return status

    def _begin_arguments(self, c: str) -> Status:
        name = self._head.partition(_MARKS[0])[0].partition(_MARKS[1])[0].strip()
        if name not in self._names:
            return Status.BROKEN
        self.told = True
        self.events.append(self._ids.new(name))
        self._value = ValueReader()
        return self._in_arguments(self._value, c)

    def _in_arguments(self, value: ValueReader, c: str) -> Status:
        kept = c if c >= " " or not value.in_string else f"\\u{ord(c):04x}"
        status = value.push(c)
        if status in (Status.MORE, Status.END):
            self.events.append(Arguments(self._ids.count - 1, kept))
        return status
