"""Typed errors. Each one finishes the thought: what was asked, what is possible, the exact fix.

Every error is an `LlmkitError` and also the builtin a Python programmer would expect (ValueError, FileNotFoundError, ...),
so `except ValueError` keeps working. In a notebook it renders as two or three lines instead of a long traceback, and it
still is a true error: papermill fails, `%tb` shows everything.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmkitError(Exception):
    """Base of all errors. `message` says what is wrong, `hint` (optional) how to mend it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message, self.hint = message, hint
        super().__init__(f"{message}\n  -> {hint}" if hint else message)

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: what a notebook shows instead of the traceback (`%tb` is not needed to see the cause)."""
        lines = [f"\x1b[31m{type(self).__name__}\x1b[0m: {self.message}"]
        if self.hint:
            lines.append(f"  -> {self.hint}")
        if self.__cause__ is not None:
            lines.append(f"  caused by {type(self.__cause__).__name__}: {self.__cause__}")
        return lines


class ConfigError(LlmkitError, ValueError):
    """An option has a value that cannot work."""


class UnknownOptionError(ConfigError, TypeError):
    """An option that does not exist; the nearest existing one is named."""


class ModelNotFoundError(LlmkitError, FileNotFoundError):
    """A model id, folder or file that does not exist or cannot be reached."""


class DownloadError(LlmkitError, OSError):
    """A model exists but could not be fetched completely."""


class WeightsError(LlmkitError, ValueError):
    """A weight file is truncated, corrupt, or does not fit config.json. Names the file and the tensor."""


class UnsupportedModelError(LlmkitError, ValueError):
    """An architecture or format that llmkit does not run; the message lists those it does."""


class TokenizerError(LlmkitError, ValueError):
    """The tokenizer or chat template is missing or cannot handle the input."""


class InvalidRequestError(LlmkitError, ValueError):
    """A request that cannot be run: empty prompt, prompt too long, token id outside the vocabulary, bad sampling parameter.

    `param` is the field at fault, as the OpenAI error body names it.
    """

    def __init__(self, message: str, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint)
        self.param = param


class OutOfMemoryError(LlmkitError, MemoryError):
    """The model or its KV cache does not fit; the message carries the memory plan."""


class EngineClosedError(LlmkitError, RuntimeError):
    """The engine was closed, by `close()` or by leaving `with LLM(...)`."""


class EngineError(LlmkitError, RuntimeError):
    """A step broke, and this request with it, though somebody else may have caused it; `__cause__` says how."""


class EngineUnavailableError(LlmkitError, ConnectionError):
    """The server's engine process is starting, restarting, or died under this request; asking again soon may work."""


class QueueFullError(LlmkitError, RuntimeError):
    """Too many requests wait already; asking again later will work."""


class ServerError(LlmkitError, ConnectionError):
    """A server that was asked over HTTP is not there, refused, or broke off; `hint` says what to look at."""


class CheckFailed(LlmkitError, AssertionError):
    """A notebook check (`llmkit.check`) that did not hold."""


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The nearest of `known`, or None when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return near[0] if near else None


def reject_unknown(given: Iterable[str], known: Iterable[str], where: str, refused: dict[str, str] | None = None) -> None:
    """Raise UnknownOptionError for the first name of `given` that is not in `known`.

    `refused` maps names that other engines have and we do not to one sentence of what to do instead.
    """
    known = list(known)
    for name in given:
        if name in known:
            continue
        if refused and name in refused:
            raise UnknownOptionError(f"{where} has no option {name!r}", refused[name])
        near = did_you_mean(name, known)
        raise UnknownOptionError(
            f"{where} has no option {name!r}",
            f"did you mean {near!r}?" if near else f"it has: {', '.join(sorted(known))}",
        )
