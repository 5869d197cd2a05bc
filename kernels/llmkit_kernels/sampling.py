"""Choosing tokens on the device: greedy or with a temperature, among all or those that were kept, without a softmax or a sort.

argmax(logits / T + Gumbel noise) draws exactly from softmax(logits / T) (Gumbel-max trick). The noise is a counter-based hash
(Philox, seven rounds: Salmon et al., SC 2011) of the request's seed, the token's position and the vocabulary entry, so a draw
repeats whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.filters import NO_LIMIT, Kept, fine_bin
from llmkit_kernels.launch import INTERPRETED, begin, cdiv, next_power_of_2, pdl

_BLOCK = 4096
_NO_LIMIT = tl.constexpr(NO_LIMIT)
NO_TOKEN = tl.constexpr(-1)  # nothing could be chosen: the logits were NaN


@triton.jit
def _log2(x, PTX: tl.constexpr):
    """The GPU's own approximation (2^-22 absolute), a single instruction."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _gumbel(bits, PTX: tl.constexpr):
    """Gumbel noise from 32 random bits. The likeliest winners have an exponential -log(1 - u) near 0: there it must be exact, so
    it is taken from u itself, which a float32 knows best near 0."""
    LN2: tl.constexpr = 0.6931471805599453
    u = (bits.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064e-10
    series = u + u * u * (0.5 + u * (0.33333333 + u * 0.25))
    waited = tl.where(u < 0.015625, series, -LN2 * _log2(tl.maximum(1.0 - u, 5.9604645e-8), PTX))
    return -LN2 * _log2(waited, PTX)


@triton.jit
def _scores(logits, entry, V, temperature, bits, limit, top, KEPT: tl.constexpr, PTX: tl.constexpr):
    score = tl.load(logits + entry, mask=entry < V, other=-float("inf"))
    if KEPT:  # noqa: SIM102 - known to the compiler, unlike the row's own limit
        if limit < _NO_LIMIT:
            score = tl.where(fine_bin((top - score) / temperature) <= limit, score, -float("inf"))
    if temperature > 0.0:
        score = score / temperature + _gumbel(bits, PTX)
    return tl.where((entry < V) & (score == score), score, -float("inf"))  # a NaN is never chosen


@triton.jit
def _better(a, at_a, b, at_b):
    """Elementwise the better score and where it is; the first of equals."""
    return tl.maximum(a, b), tl.where(b > a, at_b, at_a)


@triton.jit
def _best_of_part(
    logits, rows, temperatures, seeds, positions, limits, tops, best, best_at, V, PARTS, KEPT: tl.constexpr, BLOCK: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b, part = tl.program_id(0), tl.program_id(1)
    QUARTER: tl.constexpr = BLOCK // 4
    row = tl.load(rows + b)
    temperature = tl.load(temperatures + row)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    lane = tl.arange(0, QUARTER)
    first = part * BLOCK + lane
    # one draw of Philox gives four numbers: for entries a quarter of a part apart
    x, y, z, w = tl.randint4x(seed + position * 0x1E3779B97F4A7C15, part * QUARTER + lane, n_rounds=7)
    begin(PDL)
    limit, top = _NO_LIMIT, 0.0
    if KEPT:
        limit, top = tl.load(limits + b), tl.load(tops + b)
    logits += b.to(tl.int64) * V
    high, at = _scores(logits, first, V, temperature, x, limit, top, KEPT, PTX), first
    at_2, at_3, at_4 = first + QUARTER, first + 2 * QUARTER, first + 3 * QUARTER
    high, at = _better(high, at, _scores(logits, at_2, V, temperature, y, limit, top, KEPT, PTX), at_2)
    high, at = _better(high, at, _scores(logits, at_3, V, temperature, z, limit, top, KEPT, PTX), at_3)
    high, at = _better(high, at, _scores(logits, at_4, V, temperature, w, limit, top, KEPT, PTX), at_4)
    highest = tl.max(high, axis=0)
    tl.store(best + b * PARTS + part, highest)
    tl.store(best_at + b * PARTS + part, tl.min(tl.where(high == highest, at, 0x7FFFFFFF), axis=0))


@triton.jit
def _best_of_all(
    rows, best, best_at, token_ids, last_token, positions, PARTS, LIVE, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    b = tl.program_id(0)
    part = tl.arange(0, WIDTH)
    begin(PDL)
    high = tl.load(best + b * PARTS + part, mask=part < PARTS, other=-float("inf"))
    at = tl.argmax(high, axis=0)
    nothing = tl.max(high, axis=0) == -float("inf")
    token = tl.where(nothing, NO_TOKEN, tl.load(best_at + b * PARTS + at).to(tl.int64))
    row = tl.load(rows + b)
    tl.store(token_ids + b, token)
    tl.store(last_token + row, tl.maximum(token, 0), mask=row < LIVE)
    tl.store(positions + row, tl.load(positions + row) + 1, mask=row < LIVE)


class SampleScratch:
    """Partial maxima of `batch` rows over a vocabulary."""

    def __init__(self, batch: int, vocab: int, device: torch.device) -> None:
        self.parts = cdiv(vocab, _BLOCK)
        self.best = torch.empty(batch, self.parts, dtype=torch.float32, device=device)
        self.best_at = torch.empty(batch, self.parts, dtype=torch.int32, device=device)


def sample(
    logits: Tensor, rows: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, last_token: Tensor, token_ids: Tensor,
    scratch: SampleScratch, live: int, kept: Kept | None = None,
) -> Tensor:  # fmt: skip
    """One token for each of `logits` fp32 [B, V]: greedy where the temperature is 0. kept: what may be drawn, None: everything.

    rows: int64 [B], the persistent row of each, by which temperatures (fp32), seeds and positions (int64, where the newest token
    stands) are found. Writes token_ids int64 [B]; for rows below `live` (others are padding) also last_token, and moves their
    position on.
    """
    batch, vocab = logits.shape
    limits, tops = (kept.limit, kept.top) if kept else (None, None)
    _best_of_part[(batch, scratch.parts)](
        logits, rows, temperatures, seeds, positions, limits, tops, scratch.best, scratch.best_at, vocab, scratch.parts,
        KEPT=kept is not None, BLOCK=_BLOCK, PTX=not INTERPRETED, num_warps=4, **pdl(),
    )  # fmt: skip
    _best_of_all[(batch,)](
        rows, scratch.best, scratch.best_at, token_ids, last_token, positions, scratch.parts, live,
        WIDTH=next_power_of_2(scratch.parts), num_warps=1, **pdl(),
    )  # fmt: skip
    return token_ids
