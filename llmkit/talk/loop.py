"""Turns and commands, until there is nothing more to read."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from llmkit.errors import LlmkitError, did_you_mean
from llmkit.talk.conversation import Conversation
from llmkit.talk.partners import Partner, Piece
from llmkit.talk.terminal import Terminal

HELP = """/system [TEXT]  show the system prompt, or set it (/system "" takes it away)
/retry          ask the last question again
/reset          forget the conversation, but not the system prompt
/save FILE      write the conversation as JSON
/load FILE      go on with a saved one
/exit           leave; so does Ctrl-D
Ctrl-C stops an answer and keeps what there is of it. A line that ends in \\ goes on in the next; one that begins with a space is
never a command."""


class Talk:
    """One conversation with one partner. failed: an answer could not be had."""

    def __init__(self, partner: Partner, conversation: Conversation) -> None:
        self.partner, self.conversation, self.failed, self.over = partner, conversation, False, False
        self.commands: dict[str, Callable[[str], None]] = {
            "/system": self.system, "/retry": self.retry, "/reset": self.reset, "/save": self.save, "/load": self.load,
            "/exit": self.leave, "/quit": self.leave, "/help": self.help,
        }  # fmt: skip
        self.terminal = Terminal(list(self.commands))

    def run(self) -> int:
        """Talk to the end; the exit code: 1 when a pipe's message got no answer."""
        self.terminal.note(f"{self.partner.name}; /help lists the commands, Ctrl-D leaves")
        with self.terminal.editing():
            while not self.over and (text := self._read()) is not None:
                self.take(text)
        return 1 if self.failed and not self.terminal.interactive else 0

    def _read(self) -> str | None:
        try:
            return self.terminal.read()
        except KeyboardInterrupt:
            if not self.terminal.interactive:
                raise
            print()
            self.terminal.note("Ctrl-D or /exit leaves")
            return ""

    def take(self, text: str) -> None:
        """A message or a command. What goes wrong is said, and the conversation goes on."""
        try:
            if text.startswith("/"):
                self._command(text)
            elif text.strip():
                self.say(text)
        except LlmkitError as e:
            self.failed = True
            self.terminal.error(e.message, e.hint)

    def _command(self, text: str) -> None:
        name, _, rest = text.strip().partition(" ")
        if name not in self.commands:
            near = did_you_mean(name, self.commands)
            hint = f"did you mean {near}?" if near else "/help lists the commands; begin with a space to say it to the model"
            raise LlmkitError(f"there is no command {name}", hint)
        self.commands[name](rest.strip())

    # ---- a turn

    def say(self, text: str) -> None:
        """Ask, and show the answer as it comes. Interrupted, what there is of it stays in the conversation."""
        self.conversation.ask(text)
        answer, stopped = _Answer(), False
        try:
            with closing(self.partner.say(self.conversation.messages)) as pieces:
                for piece in pieces:
                    self._show(answer, piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            if answer.text:
                self.conversation.answer(answer.text)
            if answer.shown:
                self.terminal.write("\n")
        if stopped and not self.terminal.interactive:
            raise KeyboardInterrupt
        self.terminal.note(answer.facts() + (" · stopped" if stopped else ""))

    def _show(self, answer: _Answer, piece: Piece) -> None:
        if answer.take(piece):  # the answer begins where the reasoning ends
            self.terminal.write("\n\n")
        if piece.text and not (piece.thought and not self.terminal.interactive):
            self.terminal.write(piece.text, dim=piece.thought)

    # ---- commands

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == '""' else text
        self.terminal.note(f"system prompt: {self.conversation.system or 'none'}")

    def retry(self, _: str) -> None:
        question = self.conversation.last_question()
        if question is None:
            raise LlmkitError("there is nothing to ask again")
        self.say(question)

    def reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self.terminal.note("a new conversation")

    def save(self, file: str) -> None:
        self.conversation.save(_path(file, "/save"))
        self.terminal.note(f"{len(self.conversation.messages)} messages in {file}")

    def load(self, file: str) -> None:
        self.conversation = Conversation.load(_path(file, "/load"))
        self.terminal.note(f"{len(self.conversation.messages)} messages from {file}")

    def leave(self, _: str) -> None:
        self.over = True

    def help(self, _: str) -> None:
        self.terminal.note(HELP)


class _Answer:
    """What has come of an answer."""

    def __init__(self) -> None:
        self.text, self.shown, self.tokens = "", False, 0
        self._thinking = False
        self._begin = time.perf_counter()
        self._first = self._last = 0.0

    def take(self, piece: Piece) -> bool:
        """Add a piece; True when it is the first one after reasoning."""
        begins = self._thinking and bool(piece.text) and not piece.thought
        self.tokens = self.tokens + piece.tokens if piece.text else max(self.tokens, piece.tokens)
        if piece.text:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self._thinking, self.shown = piece.thought, True
        if not piece.thought:
            self.text += piece.text
        return begins

    def facts(self) -> str:
        """29 tokens · 36.7 tokens/s · first after 112 ms"""
        seconds = self._last - self._first
        speed = [f"{(self.tokens - 1) / seconds:.1f} tokens/s"] if self.tokens > 1 and seconds > 0 else []
        first = [f"first after {1000 * (self._first - self._begin):.0f} ms"] if self.shown else []
        return " · ".join([f"{self.tokens} tokens" if self.tokens else "no tokens", *speed, *first])


def _path(file: str, command: str) -> Path:
    if not file:
        raise LlmkitError(f"{command} needs a file", f"{command} conversation.json")
    return Path(file).expanduser()
