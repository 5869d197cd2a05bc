"""Token ids to text while they come: whole characters only, and stop strings across token borders."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from llmkit.errors import InvalidRequestError
from llmkit.sampling_params import SamplingParams
from llmkit.tokenizer import Tokenizer

_ESCAPED = re.compile("[\udc80-\udcff]")
CONTEXT = 6  # tokens of the prompt that decide how the first generated one is written


class Detokenizer:
    """Text of one answer. Push its token ids as they are sampled; what comes back is safe to show and never taken back.

    text: everything returned so far. stop_reason: the stop string that ended the answer, if one did; the text ends before it
    (after it with include_stop_str_in_output). stop_token_count: how many of the pushed tokens it took, the completing one
    included; tokens after it are ignored. Stop strings completed within the first `min_tokens` tokens do not count.

    Without `prompt_token_ids` the joined pieces equal `tokenizer.decode(ids)`; with them the first piece keeps the space that
    separates it from the prompt ("▁Paris" -> " Paris"). A byte run of a SentencePiece tokenizer that turns out invalid after
    whole characters were shown is the one exception: those characters stay.

    Push neither the eos nor a stop id that must not be seen: the engine knows which token ended the request.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        if params.stop and not tokenizer.vocab_size:
            raise InvalidRequestError(
                "stop strings are looked for in text, and this engine has no tokenizer (skip_tokenizer_init=True)",
                "use stop_token_ids=", param="stop",
            )  # fmt: skip
        self.stop_reason: str | None = None
        self.stop_token_count: int | None = None
        self._pieces: list[str] = []
        self._count = 0
        self._min_tokens = params.min_tokens
        self._stops = _StopStrings(list(params.stop), params.include_stop_str_in_output) if params.stop else None
        self._stream = _stream(tokenizer, params, prompt_token_ids)

    @property
    def text(self) -> str:
        """Everything that push() and flush() returned."""
        return "".join(self._pieces)

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is safe to show: no half character, nothing that may still become a stop string."""
        if self._stops is None:
            if piece := self._stream.push(token_ids):
                self._pieces.append(piece)
            return piece
        return self._show("".join([self._push_one(token, self._stops) for token in token_ids]))

    def flush(self) -> str:
        """The rest, once no token follows: held-back text, and U+FFFD for bytes that never became a character."""
        if self._stops is None or self.stop_reason is not None:
            return self._show("" if self.stop_reason is not None else self._stream.flush())
        piece = self._search(self._stream.flush(), self._stops)
        return self._show(piece if self.stop_reason is not None else piece + self._stops.release())

    def _push_one(self, token: int, stops: _StopStrings) -> str:
        if self.stop_reason is not None:
            return ""
        self._count += 1
        return self._search(self._stream.push((token,)), stops)

    def _search(self, piece: str, stops: _StopStrings) -> str:
        shown, self.stop_reason = stops.push(piece, armed=self._count > self._min_tokens)
        if self.stop_reason is not None:
            self.stop_token_count = self._count
        return shown

    def _show(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


class _StopStrings:
    """Looks for stop strings in a stream of text, holding back the longest suffix that could still become one."""

    def __init__(self, stops: list[str], include: bool) -> None:
        self._stops, self._include, self._held = stops, include, ""
        self._beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        self._longest = max(len(stop) for stop in stops) - 1

    def push(self, piece: str, armed: bool) -> tuple[str, str | None]:
        """(text to show, the stop string found or None). `armed=False`: matches do not count, but may begin here."""
        window, old = self._held + piece, len(self._held)
        hit = self._find(window, old) if armed and piece else None
        if hit is not None:
            start, stop = hit
            self._held = ""
            return window[: start + len(stop) if self._include else start], stop
        cut = len(window) - self._suffix(window)
        self._held = window[cut:]
        return window[:cut], None

    def release(self) -> str:
        held, self._held = self._held, ""
        return held

    def _find(self, window: str, old: int) -> tuple[int, str] | None:
        """The match that is complete first (the longest of them): so the answer does not depend on how text came in pieces."""
        hits = [(at + len(s), at, s) for s in self._stops if (at := window.find(s, max(0, old - len(s) + 1))) >= 0]
        return min(hits)[1:] if hits else None

    def _suffix(self, window: str) -> int:
        for n in range(min(self._longest, len(window)), 0, -1):
            if window[-n:] in self._beginnings:
                return n
        return 0


# --- ids to text, whole characters only --------------------------------------------------------------------------------


class _Stream(Protocol):
    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


def _stream(tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int]) -> _Stream:
    if not params.detokenize:
        return _NoText()
    hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
    context = [i for i in prompt[-CONTEXT:] if i not in hidden]
    if tokenizer.byte_kind == "byte_level":
        return _ByteLevel(tokenizer, params.skip_special_tokens)
    if tokenizer.byte_kind == "byte_fallback":
        return _ByteFallback(tokenizer, params.skip_special_tokens, at_start=not context)
    return _Window(tokenizer, hidden, context)


class _NoText:
    """detokenize=False: nobody wants text."""

    def push(self, ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _ByteLevel:
    """Every token is some bytes; Python's incremental UTF-8 decoder joins them to characters (0.3 us a token)."""

    errors = "replace"

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.byte_table(skip_special_tokens).__getitem__
        self._decode = codecs.getincrementaldecoder("utf-8")(self.errors).decode

    def push(self, ids: Sequence[int]) -> str:
        return self._decode(b"".join(map(self._bytes_of, ids)))

    def flush(self) -> str:
        return self._decode(b"", True)


class _ByteFallback(_ByteLevel):
    """SentencePiece's spelling: each invalid byte is one U+FFFD, and one space at the very start is a dummy."""

    errors = "surrogateescape"  # marks invalid bytes one by one, where "replace" would join a few

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, at_start: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._strip = at_start and tokenizer.strips_first_space

    def push(self, ids: Sequence[int]) -> str:
        return self._clean(super().push(ids))

    def flush(self) -> str:
        return self._clean(super().flush())

    def _clean(self, text: str) -> str:
        if self._strip and text:
            text, self._strip = text.removeprefix(" "), False
        return text if text.isascii() else _ESCAPED.sub("\ufffd", text)


class _Window:
    """Any other decoder: decode a few tokens with and without the new ones; the difference is the new text."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], context: list[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden
        self._ids, self._shown = context, len(context)  # ids in the window, and how many of them are already text

    def push(self, ids: Sequence[int]) -> str:
        self._ids += [i for i in ids if i not in self._hidden]
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], False)
        now = self._tokenizer.decode(self._ids, False)
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):  # nothing new, or half a character
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]
