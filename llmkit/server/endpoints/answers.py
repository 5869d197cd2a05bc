"""The parts that answers are made of: usage, logprobs in OpenAI's two forms, ids of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from llmkit.outputs import Logprob, RequestOutput
from llmkit.tokenizer import Tokenizer

Entry = dict[int, Logprob]
_LEAST = -9999.0  # what a log-probability of minus infinity is in JSON, as with vLLM


def usage(prompt_tokens: int, completion_tokens: int, cached: int | None = None) -> dict[str, Any]:
    """How much was read and written. cached: prompt tokens that the prefix cache had; None while unknown."""
    count: dict[str, Any] = {
        "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + completion_tokens, "completion_tokens": completion_tokens,
    }  # fmt: skip
    return count if cached is None else count | {"prompt_tokens_details": {"cached_tokens": cached}}


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """The usage of whole answers."""
    written = sum(len(a.token_ids) for o in outputs for a in o.outputs)
    return usage(sum(len(o.prompt_token_ids) for o in outputs), written, sum(o.num_cached_tokens for o in outputs))


class LogprobWriter:
    """Logprobs in JSON. top: how many likeliest tokens a position shows. as_ids: tokens are written token_id:N."""

    def __init__(self, tokenizer: Tokenizer, top: int, as_ids: bool) -> None:
        self._tokenizer, self._top, self._as_ids = tokenizer, top, as_ids

    def chat(self, tokens: Sequence[int], entries: Sequence[Entry]) -> dict[str, Any]:
        """Chat's form: {"content": [{token, logprob, bytes, top_logprobs}]}."""
        return {"content": [self._position(t, e) for t, e in zip(tokens, entries)]}

    def _position(self, token: int, entry: Entry) -> dict[str, Any]:
        top = [self._token(t, entry[t]) for t in self._likeliest(entry)]
        return {**self._token(token, entry[token]), "top_logprobs": top}

    def _token(self, token: int, said: Logprob) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": _finite(said.logprob), "bytes": list(self._bytes(token))}

    def completion(self, tokens: Sequence[int], entries: Sequence[Entry | None], offset: int) -> dict[str, Any]:
        """Completions' form: four parallel lists. offset: of the first token, in characters. An entry None: a prompt's first."""
        texts = [self.text(t) for t in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [None if e is None else _finite(e[t].logprob) for t, e in zip(tokens, entries)],
            "top_logprobs": [None if e is None else self._top_texts(t, e) for t, e in zip(tokens, entries)],
            "text_offset": _offsets(offset, [self._plain(t) for t in tokens]),
        }

    def _top_texts(self, token: int, entry: Entry) -> dict[str, float]:
        """The likeliest and, as vLLM has it, the chosen one; of two tokens with one text the likelier."""
        shown = sorted({*self._likeliest(entry), token}, key=lambda t: -entry[t].logprob)
        texts: dict[str, float] = {}
        for t in shown:
            texts.setdefault(self.text(t), _finite(entry[t].logprob))
        return texts

    def _likeliest(self, entry: Entry) -> list[int]:
        ranked = sorted(entry, key=lambda t: (-entry[t].logprob, t))
        return ranked if self._top < 0 else ranked[: self._top]

    def text(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._plain(token)

    def _plain(self, token: int) -> str:
        return self._tokenizer.token_text(token)

    def _bytes(self, token: int) -> bytes:
        own = self._tokenizer.token_bytes(token)
        return self._plain(token).encode() if own is None else own


def _offsets(start: int, texts: Sequence[str]) -> list[int]:
    return list(itertools.accumulate(map(len, texts[:-1]), initial=start)) if texts else []


def _finite(value: float) -> float:
    return max(_LEAST, value) if not math.isnan(value) else _LEAST


def prompt_logprobs(output: RequestOutput, text_of: Callable[[int], str]) -> list[dict[str, Any] | None] | None:
    """vLLM's extra field: for each prompt token {id: {logprob, rank, decoded_token}}."""
    if output.prompt_logprobs is None:
        return None

    def shown(entry: Entry) -> dict[str, Any]:
        return {
            str(t): {"logprob": _finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token or text_of(t)}
            for t, e in entry.items()
        }

    return [None if entry is None else shown(entry) for entry in output.prompt_logprobs]
