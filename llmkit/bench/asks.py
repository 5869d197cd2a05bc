"""What a load asks of a server: prompts and how long their answers shall be, made up or out of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmkit.bench.workload import Workload
from llmkit.errors import ConfigError

WORDS = ("time", "people", "water", "house", "light", "music", "river", "paper", "green", "small", "open", "walk", "late", "near",
         "story", "table", "under", "winter", "market", "garden", "bread", "stone", "cloud", "morning")  # fmt: skip
SHORTEST, LONGEST = 4, 1024  # tokens, as everyone filters ShareGPT


@dataclass(frozen=True)
class Ask:
    """prompt: text, token ids, or messages. output_len: tokens of the answer. reference: a text as long as the answer shall be,
    whose tokens a server is to count."""

    prompt: str | list[Any]
    output_len: int | None = None
    reference: str | None = None

    def body(self, model: str, chat: bool, ignore_eos: bool, extra: dict[str, Any]) -> dict[str, Any]:
        """The request, streamed, with the usage at its end."""
        messages = isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], dict)
        said = self.prompt if messages else [{"role": "user", "content": self.prompt}]
        what = {"messages": said} if chat else {"prompt": self.prompt}
        end = {"ignore_eos": True} if ignore_eos else {}
        return {"model": model, **what, "max_tokens": self.output_len, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, **end, **extra}  # fmt: skip


def synthetic(work: Workload, seed: object, vocab: int, text: bool) -> list[Ask]:
    """Requests of these lengths. text: of common words, about one token each, where a server takes no token ids."""
    if not text:
        return [Ask(ids, n) for ids, n in zip(work.prompts(seed, vocab), work.output_lens)]
    r = random.Random(f"{seed}")
    return [Ask(" ".join(r.choices(WORDS, k=i)), o) for i, o in zip(work.input_lens, work.output_lens)]


def read_asks(path: Path) -> list[Ask]:
    """ShareGPT's JSON, or JSON lines: {"prompt": …, "output_len": …}, {"messages": […]}, {"body": {…}} as in a batch; texts."""
    try:
        text = path.read_text("utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}", "give a file of prompts") from e
    try:
        whole = text.lstrip().startswith("[")
        items = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as e:
        raise ConfigError(f"{path} is neither JSON nor JSON lines: {e}") from e
    asks = [ask for item in items if (ask := _ask(item)) is not None]
    if not asks:
        raise ConfigError(f"{path} holds no prompts", 'a line is {"prompt": "...", "output_len": 128}; or ShareGPT\'s JSON')
    return asks


def _ask(item: Any) -> Ask | None:
    if isinstance(item, str):
        return Ask(item)
    if not isinstance(item, dict):
        return None
    if isinstance(item.get("conversations"), list):
        return _sharegpt(item["conversations"])
    item = item["body"] if isinstance(item.get("body"), dict) else item
    prompt: Any = item.get("messages") or item.get("prompt")
    length = next((item[k] for k in ("output_len", "max_tokens", "max_completion_tokens") if isinstance(item.get(k), int)), None)
    if not prompt or not isinstance(prompt, (str, list)):
        return None
    return Ask(prompt, length)


def _sharegpt(turns: Sequence[Any]) -> Ask | None:
    """The first question, and its answer's length."""
    said = [t.get("value") for t in turns if isinstance(t, dict)]
    first = turns[0].get("from") if turns and isinstance(turns[0], dict) else None
    if first not in ("human", "user") or len(said) < 2 or not all(isinstance(s, str) and s for s in said[:2]):
        return None
    return Ask(str(said[0]), reference=str(said[1]))


def within_filter(length: int) -> int:
    """The length of an answer, where everyone who measures with ShareGPT cuts it."""
    return max(SHORTEST, min(LONGEST, length))


class Source(Protocol):
    """Where the requests of a load come from. has_messages: they are for the chat endpoint."""

    name: str
    has_messages: bool

    def take(self, turn: int) -> list[Ask]:
        """Those of load number `turn`, -1 for warming up: others each time, or a prefix cache would answer."""
        ...


class MadeUp:
    """Random prompts of given lengths. text: of words, where a server takes no token ids."""

    has_messages = False

    def __init__(self, work: Workload, vocab: int, text: bool) -> None:
        self.name, self._work, self._vocab, self._text = work.name, work, vocab, text

    def take(self, turn: int) -> list[Ask]:
        return synthetic(self._work, f"serve/{turn}", self._vocab, self._text)


class FromFile:
    """`count` prompts of a file for each load, in random order; from the beginning again when they are used up."""

    def __init__(self, name: str, asks: Sequence[Ask], count: int) -> None:
        self.name = f"{count} of {name}"
        self.has_messages = any(isinstance(a.prompt, list) and isinstance(a.prompt[0], dict) for a in asks)
        self._asks, self._count = random.Random("serve").sample(list(asks), len(asks)), count

    def take(self, turn: int) -> list[Ask]:
        start = (turn + 1) * self._count
        return [self._asks[i % len(self._asks)] for i in range(start, start + self._count)]
