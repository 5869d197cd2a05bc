"""`<think>…</think>`: what a model says to itself before it answers, parted from the answer as it streams."""

from __future__ import annotations

from llmkit.server.message import Event, Text, Thought, unsure

Tags = tuple[str, str]
_KNOWN: tuple[Tags, ...] = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))


def find_tags(template: str, option: str | None) -> Tags | None:
    """The tags of thoughts: as the operator says, else those that the chat template names; None: the model has no thoughts."""
    if option is not None:
        return None if option == "none" else _KNOWN[0]
    return next((tags for tags in _KNOWN if tags[1] in template), None)


class ThoughtSplitter:
    """Parts an answer. opened: the prompt already ends with the opening tag, so that the answer begins inside.

    Blanks around the tags belong to nobody. Without the opening tag at its very beginning an answer has no thoughts.
    """

    def __init__(self, tags: Tags, opened: bool) -> None:
        self._open, self._close = tags
        self._state = "inside" if opened else "before"
        self._held = ""
        self._fresh = opened  # nothing but blanks since the last tag

    def push(self, text: str) -> list[Event]:
        self._held += text
        if self._state == "before":
            self._look_for_opening()
        events: list[Event] = []
        if self._state == "inside":
            events += self._think()
        if self._state == "after":
            events += self._answer()
        return events

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        if self._state == "inside":
            return [Thought(held)] if held.strip() or not self._fresh else []
        return [Text(held)] if held and not self._fresh else []

    def _look_for_opening(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._open):
            self._state, self._fresh, self._held = "inside", True, begun[len(self._open) :]
        elif not self._open.startswith(begun):
            self._state = "after"

    def _think(self) -> list[Event]:
        thought, closed, rest = self._held.partition(self._close)
        if closed:
            self._state, self._held = "after", rest
            said = self._stripped(thought.rstrip())
            self._fresh = True
            return [Thought(said)] if said else []
        cut = len(self._held) - unsure(self._held, self._close)
        said, self._held = self._stripped(self._held[:cut]), self._held[cut:]
        return [Thought(said)] if said else []

    def _answer(self) -> list[Event]:
        text, self._held = self._stripped(self._held), ""
        return [Text(text)] if text else []

    def _stripped(self, text: str) -> str:
        """Without the blanks that follow a tag."""
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text
