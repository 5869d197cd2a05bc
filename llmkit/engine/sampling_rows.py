"""The sampling parameters of the running requests, as a struct of arrays: one persistent row each.

A request gets a row when it starts to run and keeps it, so a step only gathers what it needs by row id. `using` answers "which
rows of this batch use that feature" from host-side flags and counters: what nobody asked for costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmkit.sampling_params import SamplingParams, check_token_ids

if TYPE_CHECKING:
    from llmkit.engine.grammar import Grammar

_LEAST_TOP_P = 1e-30  # what is less would be 0 in float32, and leave no token at all
GREEDY_BELOW = 1e-5  # a temperature under this is greedy, as in vLLM: dividing by it would overflow float32
FEATURES: tuple[str, ...] = (
    "sampled", "filtered", "penalised", "allowed", "grammar", "banned", "phrases", "min_tokens", "bias", "logprobs",
)  # fmt: skip
_NOBODY = np.empty(0, np.int64)


@dataclass
class History:
    """What was said so far: views of the engine's persistent arrays, row-indexed.

    token_ids: int32 [rows, max_len], the prompt, then what was generated. num_prompt: int32 [rows].
    num_tokens: int32 [rows], tokens known so far (prompt + generated).
    """

    token_ids: np.ndarray
    num_prompt: np.ndarray
    num_tokens: np.ndarray


class Column:
    """One parameter of all rows: `host` to decide with, `device` to compute with. On a CPU both are the same memory; a GPU's copy
    is brought up to date as a whole, when it is next read."""

    def __init__(self, num_rows: int, off: float, device: torch.device, dtype: type = np.float32) -> None:
        self.host = np.full(num_rows, off, dtype)
        self._device = torch.from_numpy(self.host).to(device)
        self._stale = False

    def __setitem__(self, row: int, value: float) -> None:
        self.host[row] = value
        self._stale = self._device.device.type != "cpu"

    @property
    def device(self) -> torch.Tensor:
        if self._stale:
            self._device.copy_(torch.from_numpy(self.host))
            self._stale = False
        return self._device


@dataclass
class TokenLists:
    """The list-like parameters of one row, as index arrays (int64, all ids inside the vocabulary).

    banned: bad words of one token. phrases: longer bad words. stop: what may not come before min_tokens.
    """

    allowed: np.ndarray
    banned: np.ndarray
    phrases: list[np.ndarray]
    stop: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray
    grammar: Grammar | None


class SamplingRows:
    """Sampling parameters of the running requests; `set` when a request gets its row, `clear` when it leaves."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.temperature = Column(num_rows, 0.0, self.device)
        self.top_p = Column(num_rows, 1.0, self.device)
        self.min_p = Column(num_rows, 0.0, self.device)
        self.top_k = Column(num_rows, vocab_size, self.device, np.int64)
        self.repetition_penalty = Column(num_rows, 1.0, self.device)
        self.frequency_penalty = Column(num_rows, 0.0, self.device)
        self.presence_penalty = Column(num_rows, 0.0, self.device)
        self.seed = np.zeros(num_rows, np.uint64)
        self.min_tokens = np.zeros(num_rows, np.int64)
        self.num_logprobs = np.zeros(num_rows, np.int64)
        self.lists: list[TokenLists | None] = [None] * num_rows
        self._flags = {feature: np.zeros(num_rows, bool) for feature in FEATURES}
        self._live: dict[str, int] = dict.fromkeys(FEATURES, 0)

    def set(
        self,
        row: int,
        params: SamplingParams,
        *,
        seed: int,
        stop_ids: Sequence[int],
        bad_words: list[list[int]],
        grammar: Grammar | None,
    ) -> None:
        """Put a request into `row`.

        seed: any integer; equal seeds repeat. stop_ids: kept out while fewer than params.min_tokens were generated; ids outside
        the vocabulary are fine, they never come. bad_words: token ids of each. Raises InvalidRequestError as `check_token_ids`.
        """
        check_token_ids(params, self.vocab_size)
        self._set_numbers(row, params, seed)
        self.lists[row] = lists = _token_lists(params, stop_ids, bad_words, grammar, self.vocab_size)
        self._set_flags(row, _features(params, lists, self.vocab_size))

    def clear(self, row: int) -> None:
        """Forget the request of `row`; the numbers left behind are never read."""
        self.lists[row] = None
        self._set_flags(row, {})

    def using(self, feature: str, row_ids: np.ndarray) -> np.ndarray:
        """Positions in the batch (int64, ascending) of the rows that use `feature`, one of FEATURES."""
        return np.flatnonzero(self._flags[feature][row_ids]) if self._live[feature] else _NOBODY

    def most_logprobs(self, row_ids: np.ndarray) -> int:
        """The most log-probabilities that one of these rows asked for, besides the chosen token's."""
        return int(self.num_logprobs[row_ids].max(initial=0))

    def lists_of(self, row: int) -> TokenLists:
        lists = self.lists[row]
        if lists is None:
            raise IndexError(f"sampling row {row} holds no request")
        return lists

    def _set_numbers(self, row: int, params: SamplingParams, seed: int) -> None:
        self.temperature[row] = params.temperature
        self.top_p[row], self.min_p[row] = max(params.top_p, _LEAST_TOP_P), params.min_p
        self.top_k[row] = min(params.top_k or self.vocab_size, self.vocab_size)
        self.repetition_penalty[row] = params.repetition_penalty
        self.frequency_penalty[row], self.presence_penalty[row] = params.frequency_penalty, params.presence_penalty
        self.seed[row] = seed & 0xFFFF_FFFF_FFFF_FFFF
        self.min_tokens[row] = params.min_tokens
        wanted = self.vocab_size if params.logprobs == -1 else params.logprobs or 0
        self.num_logprobs[row] = min(wanted, self.vocab_size)

    def _set_flags(self, row: int, used: dict[str, bool]) -> None:
        for feature, flags in self._flags.items():
            now = used.get(feature, False)
            self._live[feature] += int(now) - int(flags[row])
            flags[row] = now


def _token_lists(
    params: SamplingParams, stop_ids: Sequence[int], bad_words: list[list[int]], grammar: Grammar | None, vocab_size: int
) -> TokenLists:
    bias = params.logit_bias or {}
    return TokenLists(
        allowed=np.unique(_ids(params.allowed_token_ids or ())),
        banned=_ids([word[0] for word in bad_words if len(word) == 1]),
        phrases=[_ids(word) for word in bad_words if len(word) > 1],
        stop=_ids([t for t in stop_ids if 0 <= t < vocab_size]),
        bias_ids=_ids(bias),
        bias=np.asarray(list(bias.values()), np.float32),
        grammar=grammar,
    )


def _ids(tokens: Sequence[int] | dict[int, float]) -> np.ndarray:
    return np.asarray(list(tokens), np.int64)


def _features(params: SamplingParams, lists: TokenLists, vocab_size: int) -> dict[str, bool]:
    sampled = params.temperature >= GREEDY_BELOW
    cut = params.top_p < 1.0 or params.min_p > 0.0 or 0 < params.top_k < vocab_size
    penalties = (params.repetition_penalty != 1.0, params.frequency_penalty != 0.0, params.presence_penalty != 0.0)
    return {
        "sampled": sampled,
        "filtered": sampled and cut,
        "penalised": any(penalties),
        "allowed": lists.allowed.size > 0,
        "grammar": lists.grammar is not None,
        "banned": lists.banned.size > 0,
        "phrases": bool(lists.phrases),
        "min_tokens": params.min_tokens > 0 and lists.stop.size > 0,
        "bias": lists.bias_ids.size > 0,
        "logprobs": params.logprobs is not None,
    }
