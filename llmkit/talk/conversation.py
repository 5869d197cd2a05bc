"""What was said, as the API wants it, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Conversation:
    """system: the system prompt, "" for none. turns: the messages after it."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All of it, for a model."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> None:
        """The user speaks. What was said before and got no answer is taken back, for templates want turns to alternate."""
        self.take_back()
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The model has said `text`, to its end or not."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> str | None:
        """Forget the last message if it is the user's; its text."""
        return self.turns.pop()["content"] if self.turns and self.turns[-1]["role"] == "user" else None

    def last_question(self) -> str | None:
        """Forget the last answer and its question; the question."""
        while self.turns and self.turns[-1]["role"] != "user":
            self.turns.pop()
        return self.take_back()

    def save(self, path: Path) -> None:
        """Write {"messages": [...]}: what a request to /v1/chat/completions holds."""
        try:
            path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"cannot write {path}: {e.strerror}") from e

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote, the body of a request, or a bare list of messages."""
        try:
            data = json.loads(path.read_text("utf-8"))
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from e
        except ValueError as e:
            raise ConfigError(f"{path} is not JSON: {e}") from e
        messages = data.get("messages") if isinstance(data, dict) else data
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ConfigError(f"{path} holds no conversation", 'it needs {"messages": [{"role": "user", "content": "..."}, ...]}')
        systems = [m["content"] for m in messages if m["role"] == "system"]
        return cls("\n".join(systems), [m for m in messages if m["role"] != "system"])


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)
