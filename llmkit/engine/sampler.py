"""From logits to the next tokens: edit the logits, filter, draw; and the log-probabilities a request asked for.

Order (vLLM's): raw log-probabilities, then allowed_token_ids, grammar, bad_words, min_tokens, logit_bias, penalties, temperature,
min_p, top_k, top_p, draw.

Draws are repeatable and do not know their neighbours: one uniform per token, hashed from the row's seed and the token's index,
goes through the inverse CDF. Probabilities become integers first (`_weights`): integer sums are exact in any order, on any
device and in any batch, and a token of weight 0 can never be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from llmkit.engine.sampling_rows import History, SamplingRows, TokenLists
from llmkit.outputs import Logprob

__all__ = ["History", "SampledTokens", "Sampler", "SamplingRows", "TopLogprobs", "top_logprobs", "uniforms"]

NO_TOKEN = -1  # nothing may follow (all masked), or the model said NaN
_ONE = 2.0**40  # the integer weight of probability 1
_HALF = 22  # a uniform has 2 * 22 bits: total (41 bits) times a half fits int64
_WIDTHS = (256, 1024, 8192)  # how many candidates a filter looks at before it takes the whole vocabulary
_NEVER = float("-inf")


@dataclass
class TopLogprobs:
    """Log-probabilities of the model before any edit. Column 0 is the chosen token, then the k best in order.

    token_ids: int64 [N, 1+k]. logprobs: float32 [N, 1+k]. ranks: int64 [N], rank of the chosen token, 1 = most likely.
    where: int64 [R], which of the N rows belongs to a batch row (-1: it did not ask); None when they are the same.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    where: np.ndarray | None = None

    def row(self, i: int, k: int, decode: Callable[[int], str]) -> dict[int, Logprob]:
        """Batch row `i` in vLLM's form: token id -> Logprob, the chosen token first, then the k best (k=-1: all)."""
        n = i if self.where is None else int(self.where[i])
        width = self.token_ids.shape[1] if k < 0 else 1 + k
        tokens, values = self.token_ids[n, :width].tolist(), self.logprobs[n, :width].tolist()
        chosen = {tokens[0]: Logprob(values[0], int(self.ranks[n]), decode(tokens[0]))}
        best = {t: Logprob(v, rank, decode(t)) for rank, (t, v) in enumerate(zip(tokens[1:], values[1:]), 1) if t != tokens[0]}
        return chosen | best


@dataclass
class SampledTokens:
    """token_ids: int64 [R] on the device, NO_TOKEN (-1) where nothing could be chosen. logprobs: None when no row asked."""

    token_ids: torch.Tensor
    logprobs: TopLogprobs | None

    def to_host(self) -> np.ndarray:
        """token_ids as numpy int64 [R]; waits for the device."""
        return self.token_ids.cpu().numpy()


class Sampler:
    """Chooses the next token of each row of a batch."""

    def __init__(self, rows: SamplingRows) -> None:
        self.rows = rows

    def __call__(self, logits: torch.Tensor, row_ids: np.ndarray, history: History) -> SampledTokens:
        """logits: float32 [R, V], overwritten. row_ids: int64 [R], the persistent row of each, no row twice."""
        asked = self.rows.using("logprobs", row_ids)
        raw = logits[self._to_device(asked)] if asked.size else None
        token_ids = self.choose(logits, row_ids, history)
        if raw is None:
            return SampledTokens(token_ids, None)
        k = self.rows.most_logprobs(row_ids[asked])
        top = top_logprobs(raw, token_ids[self._to_device(asked)], k)
        top.where = places(asked, row_ids.size)
        return SampledTokens(token_ids, top)

    def choose(self, logits: torch.Tensor, row_ids: np.ndarray, history: History) -> torch.Tensor:
        """As a call, without log-probabilities: int64 [R]."""
        edit_logits(logits, self.rows, row_ids, history)
        return self._choose(logits, row_ids, history)

    def _choose(self, logits: torch.Tensor, row_ids: np.ndarray, history: History) -> torch.Tensor:
        sampled = self.rows.using("sampled", row_ids)
        if not sampled.size:
            return greedy(logits)
        filtered = self.rows.using("filtered", row_ids)
        if sampled.size == row_ids.size and filtered.size in (0, row_ids.size):
            return self._draw(logits, row_ids, history, filtered.size > 0)
        token_ids = greedy(logits)
        for part, is_filtered in ((np.setdiff1d(sampled, filtered), False), (filtered, True)):
            if part.size:
                at = self._to_device(part)
                token_ids[at] = self._draw(logits[at], row_ids[part], history, is_filtered)
        return token_ids

    def _draw(self, logits: torch.Tensor, row_ids: np.ndarray, history: History, filtered: bool) -> torch.Tensor:
        generated = history.num_tokens[row_ids] - history.num_prompt[row_ids]
        uniform = self._to_device(uniforms(self.rows.seed[row_ids], generated))
        rows, at = self.rows, self._to_device(row_ids)
        temperature = rows.temperature.device[at]
        if not filtered:
            return draw(logits, temperature, uniform)
        cuts = Cuts(rows.top_k.device[at], rows.top_p.device[at], rows.min_p.device[at], uniform)
        return draw_filtered(logits, temperature, cuts)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.rows.device, non_blocking=True)


# --- editing the logits -------------------------------------------------------------------------------------------------


def edit_logits(logits: torch.Tensor, rows: SamplingRows, row_ids: np.ndarray, history: History) -> None:
    """Apply, in place and in order, everything that comes before the temperature. logits: float32 [R, V]."""
    _keep_allowed(logits, rows, row_ids)
    _apply_grammars(logits, rows, row_ids)
    _forbid(logits, rows, row_ids, rows.using("banned", row_ids), lambda lists: lists.banned)
    _forbid_phrases(logits, rows, row_ids, history)
    _forbid(logits, rows, row_ids, _too_short(rows, row_ids, history), lambda lists: lists.stop)
    _add_bias(logits, rows, row_ids)
    _penalise(logits, rows, row_ids, history)


def _keep_allowed(logits: torch.Tensor, rows: SamplingRows, row_ids: np.ndarray) -> None:
    who = rows.using("allowed", row_ids)
    if who.size:
        at = _index(logits, who, [rows.lists_of(r).allowed for r in row_ids[who]])
        kept = logits[at]
        logits[torch.from_numpy(who).to(logits.device)] = _NEVER
        logits[at] = kept


def _apply_grammars(logits: torch.Tensor, rows: SamplingRows, row_ids: np.ndarray) -> None:
    who = rows.using("grammar", row_ids)
    if not who.size:
        return
    masks = np.zeros((who.size, -(-logits.shape[1] // 32)), np.int32)
    for mask, row in zip(masks, row_ids[who]):
        grammar = rows.lists_of(row).grammar
        assert grammar is not None  # the flag says so
        grammar.fill_bitmask(mask)
    at = torch.from_numpy(who).to(logits.device)
    words = torch.from_numpy(masks).to(logits.device)
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    logits[at] = logits[at].masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, _NEVER)


def _forbid(
    logits: torch.Tensor, rows: SamplingRows, row_ids: np.ndarray, who: np.ndarray, tokens: Callable[[TokenLists], np.ndarray]
) -> None:
    if who.size:
        logits[_index(logits, who, [tokens(rows.lists_of(r)) for r in row_ids[who]])] = _NEVER


def _forbid_phrases(logits: torch.Tensor, rows: SamplingRows, row_ids: np.ndarray, history: History) -> None:
    """The last token of each bad word whose other tokens are what was generated last."""
    who = rows.using("phrases", row_ids)
    if who.size:
        logits[_index(logits, who, [_next_of_phrases(rows.lists_of(r).phrases, history, r) for r in row_ids[who]])] = _NEVER


def _next_of_phrases(phrases: list[np.ndarray], history: History, row: int) -> np.ndarray:
    end = history.num_tokens[row]
    said = history.token_ids[row, history.num_prompt[row] : end]
    return np.asarray([p[-1] for p in phrases if np.array_equal(said[-(len(p) - 1) :], p[:-1])], np.int64)


def _too_short(rows: SamplingRows, row_ids: np.ndarray, history: History) -> np.ndarray:
    """Positions of the rows that have not said min_tokens yet; without those whose grammar leaves nothing else to say."""
    who = rows.using("min_tokens", row_ids)
    ids = row_ids[who]
    short = history.num_tokens[ids] - history.num_prompt[ids] < rows.min_tokens[ids]
    open_ended = [(g := rows.lists_of(r).grammar) is None or not g.finished for r in ids]
    return who[short & np.asarray(open_ended, bool)]


def _add_bias(logits: torch.Tensor, rows: SamplingRows, row_ids: np.ndarray) -> None:
    who = rows.using("bias", row_ids)
    if who.size:
        lists = [rows.lists_of(r) for r in row_ids[who]]
        bias = torch.from_numpy(np.concatenate([li.bias for li in lists])).to(logits.device)
        logits[_index(logits, who, [li.bias_ids for li in lists])] += bias  # ids of one row differ: they are dict keys


def _penalise(logits: torch.Tensor, rows: SamplingRows, row_ids: np.ndarray, history: History) -> None:
    """Repetition over prompt and generated tokens; then frequency and presence over the generated ones.

    A token that occurs often is listed as often: the first and last edits read before they write, so all its copies write the
    same value, and the middle one adds up, which is just what a frequency penalty is. No counting over the vocabulary.
    """
    who = rows.using("penalised", row_ids)
    if not who.size:
        return
    ids = row_ids[who]
    num_tokens = history.num_tokens[ids]
    line, column = np.nonzero(np.arange(num_tokens.max()) < num_tokens[:, None])
    tokens = history.token_ids[ids[line], column]
    _repetition(logits, rows, *_on(logits, who[line], tokens, ids[line]))
    generated = column >= history.num_prompt[ids[line]]
    line, tokens = line[generated], tokens[generated]
    _frequency_and_presence(logits, rows, *_on(logits, who[line], tokens, ids[line]))


def _repetition(logits: torch.Tensor, rows: SamplingRows, at: torch.Tensor, tokens: torch.Tensor, row: torch.Tensor) -> None:
    seen, penalty = logits[at, tokens], rows.repetition_penalty.device[row]
    logits[at, tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _frequency_and_presence(
    logits: torch.Tensor, rows: SamplingRows, at: torch.Tensor, tokens: torch.Tensor, row: torch.Tensor
) -> None:
    logits.index_put_((at, tokens), -rows.frequency_penalty.device[row], accumulate=True)
    logits[at, tokens] = logits[at, tokens] - rows.presence_penalty.device[row]


def _on(logits: torch.Tensor, *arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a.astype(np.int64)).to(logits.device, non_blocking=True) for a in arrays]


def _index(logits: torch.Tensor, who: np.ndarray, tokens: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
    """Index tensors of the given tokens (one array a row) of the batch rows `who`."""
    return tuple(_on(logits, np.repeat(who, [len(t) for t in tokens]), np.concatenate(tokens)))


# --- drawing ------------------------------------------------------------------------------------------------------------


@dataclass
class Cuts:
    """What narrows each row's distribution, and its draw. top_k: int64 [R], the vocabulary size when off. top_p, min_p:
    float32 [R]. uniform: int64 [R], as `uniforms` gives it."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor

    def of(self, at: torch.Tensor) -> Cuts:
        return Cuts(*(getattr(self, f.name)[at] for f in fields(self)))


def uniforms(seeds: np.ndarray, index: np.ndarray) -> np.ndarray:
    """One uniform integer in [0, 2^44) a row: int64 [R], a hash of the row's seed (uint64) and the index of its next token.

    Counter-based (splitmix64's finaliser, twice), so a request draws the same numbers alone, in a batch, and after preemption.
    """
    step = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(_mix(seeds) + step) >> np.uint64(64 - 2 * _HALF)).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row: int64 [R]; NO_TOKEN where all is masked or something is NaN."""
    best = logits.max(-1)
    return torch.where(best.values > _NEVER, best.indices, NO_TOKEN)


def draw(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample from softmax(logits / temperature), the whole vocabulary: one straight line of tensor ops. Overwrites logits."""
    probs = logits.div_(temperature[:, None]).softmax(-1)
    broken = probs[:, 0].isnan()
    weights = _weights(probs)
    return torch.where(broken, NO_TOKEN, _pick(torch.cumsum(weights, -1, out=weights), uniform))


def draw_filtered(logits: torch.Tensor, temperature: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Sample after min_p, top_k and top_p. Only rows that a few candidates cannot decide look at more. Overwrites logits."""
    logits.div_(temperature[:, None])
    probs = logits.softmax(-1)
    token_ids = torch.full_like(cuts.uniform, NO_TOKEN)
    left = (~probs[:, 0].isnan()).nonzero().squeeze(-1)
    vocab_size = logits.shape[1]
    for width in (*(w for w in _WIDTHS if w < vocab_size), vocab_size):
        everything = left.numel() == len(logits)  # then spare the copy
        token, certain = _draw_among(*((logits, probs) if everything else (logits[left], probs[left])), cuts.of(left), width)
        token_ids[left] = token
        left = left[~certain]
        if not left.numel():
            break
    return token_ids


def _draw_among(logits: torch.Tensor, probs: torch.Tensor, cuts: Cuts, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample each row among its `width` best tokens; and whether that is certain to be the draw over all of them (bool [R]).

    Certain means: the last token kept is strictly better than the last candidate, so nothing kept, tied or not, is outside.
    """
    whole = width == logits.shape[1]
    value, index = logits.sort(dim=-1, descending=True, stable=True) if whole else logits.topk(width, dim=-1)
    probs = probs.gather(-1, index)
    weight = _weights(probs.clone())
    kept, bounded = _keep_min_p_top_k(value, probs, weight, cuts, logits.shape[1])
    nucleus = kept & _keep_top_p(weight * kept, bounded, cuts.top_p)
    column = _pick((weight * nucleus).cumsum(-1), cuts.uniform)[:, None]
    if whole:
        return index.gather(-1, column).squeeze(-1), torch.ones_like(bounded)
    return _untied(value, index, column), _ends_inside(value, nucleus) & (~bounded | _ends_inside(value, kept))


def _keep_min_p_top_k(
    value: torch.Tensor, probs: torch.Tensor, weight: torch.Tensor, cuts: Cuts, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates (best first, [R, K]) pass min_p and top_k, ties with the k-th included; and which rows have either."""
    kth = value.gather(-1, cuts.top_k[:, None].clamp(max=value.shape[1]) - 1)
    kept = (weight > 0) & (probs >= cuts.min_p[:, None] * probs[:, :1]) & (value >= kth)
    return kept, (cuts.min_p > 0) | (cuts.top_k < vocab_size)


def _keep_top_p(weight: torch.Tensor, bounded: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Which candidates (best first) are in the nucleus: those before which less than top_p was gathered; the one that
    crosses stays. The whole is what min_p and top_k left, or the vocabulary."""
    whole = torch.where(bounded, weight.sum(-1), int(_ONE))
    before = weight.cumsum(-1) - weight
    return (before < (top_p * whole)[:, None]) | (top_p >= 1)[:, None]


def _ends_inside(value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    return value.gather(-1, last).squeeze(-1) > value[:, -1]


def _weights(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities as integers, int64, 2^40 being 1; overwrites them. What is below 1e-12 becomes 0."""
    return probs.mul_(_ONE).to(torch.int64)


def _pick(cdf: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first column whose cumulative weight (int64 [R, K]) exceeds uniform / 2^44 of the total: never one of weight 0."""
    total, high, low = cdf[:, -1], uniform >> _HALF, uniform & ((1 << _HALF) - 1)
    target = (total * high + (total * low >> _HALF)) >> _HALF  # floor(total * uniform / 2^44) without overflow
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)


def _untied(value: torch.Tensor, index: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The token id (int64 [R]) at `column` ([R, 1]) of candidates sorted by value. topk leaves equal values in any order; here,
    as in a stable sort, the smaller token id comes first."""
    chosen = value.gather(-1, column)
    nth = column - (value > chosen).sum(-1, keepdim=True)
    tied = torch.where(value == chosen, index, torch.iinfo(torch.int64).max).sort(-1).values
    return tied.gather(-1, nth).squeeze(-1)


# --- log-probabilities --------------------------------------------------------------------------------------------------


def top_logprobs(logits: torch.Tensor, chosen: torch.Tensor, k: int) -> TopLogprobs:
    """Log-softmax of the model's own logits (float32 [R, V]) at the chosen tokens (int64 [R]) and the k best; k=-1: all.

    Needs as much memory again as the logits: give a long prompt in pieces.
    """
    return TopLogprobs(*(t.cpu().numpy() for t in compute_top(logits, chosen, k)))


def compute_top(logits: torch.Tensor, chosen: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first three fields of TopLogprobs, on the device; the host does not wait."""
    logprobs = logits.log_softmax(-1)
    mine = logprobs.gather(-1, chosen[:, None].clamp(min=0))
    best = logprobs.topk(logits.shape[1] if k < 0 else min(k, logits.shape[1]), dim=-1)
    ranks = (logprobs > mine).sum(-1) + 1
    return torch.cat((chosen[:, None], best.indices), -1), torch.cat((mine, best.values), -1), ranks


def places(asked: np.ndarray, count: int) -> np.ndarray:
    """`TopLogprobs.where` of a batch of `count` rows, of which those at `asked` did."""
    where = np.full(count, -1, np.int64)
    where[asked] = np.arange(asked.size)
    return where
