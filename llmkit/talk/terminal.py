"""Lines in, text out: a terminal with line editing, or a pipe, where nothing but the answers is written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PROMPT, MORE = "> ", "… "
KEPT = 1000  # lines of history


class Terminal:
    """interactive: a person types. Notes and prompts are for persons; errors and answers for everyone."""

    def __init__(self, commands: Sequence[str]) -> None:
        self.interactive = sys.stdin.isatty()
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._commands = list(commands)

    @contextlib.contextmanager
    def editing(self) -> Iterator[None]:
        """Line editing, with the lines of earlier days, while the block runs; where Python has no readline, without."""
        try:
            import readline
        except ImportError:
            readline = None
        if readline is None or not self.interactive:
            yield
            return
        file = history_file()
        if file.exists():
            readline.read_history_file(file)
        readline.set_completer(self._complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        try:
            yield
        finally:
            readline.set_completer(None)
            readline.set_history_length(KEPT)
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)  # what one asks is one's own affair

    def _complete(self, text: str, state: int) -> str | None:
        return next(iter([c for c in self._commands if c.startswith(text)][state:]), None) if text.startswith("/") else None

    def read(self) -> str | None:
        """The next message; None at the end. A line that ends in a backslash goes on in the next one."""
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            line = self._line(MORE if lines else PROMPT)
            if line is None:
                return "\n".join(lines).rstrip("\\") if lines else None
            lines.append(line)
        return "\n".join(line.removesuffix("\\") for line in lines)

    def _line(self, prompt: str) -> str | None:
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    def write(self, text: str, dim: bool = False) -> None:
        """A piece of an answer, at once."""
        print(f"\x1b[2m{text}\x1b[22m" if dim and self.colour else text, end="", flush=True)

    def note(self, text: str) -> None:
        """Something beside the conversation."""
        if self.interactive:
            print(f"\x1b[2m{text}\x1b[22m" if self.colour else text, file=sys.stderr)

    def error(self, message: str, hint: str | None = None) -> None:
        print(f"error: {message}" + (f"\n  -> {hint}" if hint else ""), file=sys.stderr)


def history_file() -> Path:
    """Where typed lines are kept between sessions."""
    from llmkit.hub.cache import cache_root

    return cache_root() / "chat_history"
