"""Which tokens a row may draw from: min-p, then top-k, then top-p, on the device and without a sort.

Whatever narrows a distribution keeps the tokens whose logit is at least some threshold; so it is enough to find that threshold.
Distances (largest logit - logit) / temperature, in nats, are counted in 512 coarse bins, and the one that a limit falls into once
more in 512 fine ones: 2^-13 nat, tokens nearer than that to each other count as equal, and equals stay or go together. What is
more than 32 nats away weighs less than 1e-13 of the first and belongs to no bin. Counts and probabilities are added up as
integers, so that their order does not matter: a row's tokens are the same in every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, cdiv, next_power_of_2, pdl

_BLOCK = 4096
_BINS = tl.constexpr(512)
_FINE = tl.constexpr(8192)  # fine bins a nat; a 512th of them are coarse ones
_WINDOW = tl.constexpr(32.0)  # nats that the bins cover: 512 * 512 / 8192
_ONE = tl.constexpr(2.0**40)  # the integer weight of the likeliest token
NO_LIMIT = 2**31 - 1
_NO_LIMIT = tl.constexpr(NO_LIMIT)


@dataclass
class Cuts:
    """One entry a persistent row [R]. top_k: int32, NO_LIMIT when off. top_p: fp32, 1 when off. furthest: int32, from min_p by
    `furthest`."""

    top_k: Tensor
    top_p: Tensor
    furthest: Tensor


def furthest(min_p: float) -> int:
    """min_p as a distance in fine bins; NO_LIMIT where it cuts nothing that could be drawn."""
    distance = -math.log(min_p) if min_p > 0 else math.inf
    return int(distance * _FINE.value) if distance < _WINDOW.value else NO_LIMIT


@dataclass
class Kept:
    """What each row [B] of a batch may draw: tokens at most `limit` int32 fine bins from its largest logit, `top` fp32."""

    limit: Tensor
    top: Tensor


@triton.jit
def fine_bin(distance):
    """The fine bin of a distance in nats, int32; everything outside the window is in one beyond the last."""
    return (tl.minimum(distance, _WINDOW) * _FINE).to(tl.int32)


@triton.jit
def _cuts_of(row, top_ks, top_ps, furthests):
    return tl.load(top_ks + row), tl.load(top_ps + row), tl.load(furthests + row)


@triton.jit
def _reach(values, target):
    """(the first of values int64 [BINS] up to which they sum up to target at least, the sum before it); BINS if there is none."""
    total = tl.cumsum(values, axis=0)
    short = total < target
    return tl.sum(short.to(tl.int32), axis=0), tl.max(tl.where(short, total, 0), axis=0)


@triton.jit
def _bins(histograms, b, which: tl.constexpr):
    """One of a row's six: counts and weights of coarse bins; of the fine ones of the bin that top-k, and that top-p, ends in."""
    return tl.load(histograms + (b.to(tl.int64) * 6 + which) * _BINS + tl.arange(0, _BINS))


@triton.jit
def _limit_of_k(histograms, b, top_k):
    """(the last fine bin that top-k keeps, the weight of all that it keeps)."""
    bin, before = _reach(_bins(histograms, b, 0), top_k.to(tl.int64))
    fine, _ = _reach(_bins(histograms, b, 2), top_k - before)
    at, weights = tl.arange(0, _BINS), _bins(histograms, b, 1)
    kept = tl.sum(tl.where(at < bin, weights, 0), axis=0) + tl.sum(tl.where(at <= fine, _bins(histograms, b, 3), 0), axis=0)
    return tl.where(bin < _BINS, bin * _BINS + fine, _NO_LIMIT), kept


@triton.jit
def _wanted(kept, top_p):
    """The weight that the nucleus must have, int64."""
    return tl.maximum((kept.to(tl.float64) * top_p).to(tl.int64), 1)


@triton.jit
def _begin_counting(logits, maxima, histograms, V, PARTS, BLOCK: tl.constexpr, ZEROED: tl.constexpr, PDL: tl.constexpr):
    b, part = tl.program_id(0), tl.program_id(1)
    entry = part * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    x = tl.load(logits + b.to(tl.int64) * V + entry, mask=entry < V, other=-float("inf"))
    tl.store(maxima + b * PARTS + part, tl.max(x, axis=0))
    bin = part * ZEROED + tl.arange(0, ZEROED)
    tl.store(histograms + b.to(tl.int64) * 6 * _BINS + bin, tl.zeros((ZEROED,), tl.int64), mask=bin < 6 * _BINS)


@triton.jit
def _count_bins(
    logits, rows, temperatures, top_ks, top_ps, furthests, maxima, histograms, V, PARTS, STAGE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """STAGE 0: coarse bins of all. 1: fine bins where top-k ends. 2: fine bins where top-p ends."""
    b, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + b)
    temperature = tl.load(temperatures + row)
    top_k, top_p, furthest = _cuts_of(row, top_ks, top_ps, furthests)
    begin(PDL)
    if STAGE == 0:
        wanted = (top_k < _NO_LIMIT) | (top_p < 1.0)
    elif STAGE == 1:
        wanted = top_k < _NO_LIMIT
    else:
        wanted = top_p < 1.0
    if wanted & (temperature > 0.0):
        bin = tl.zeros((), tl.int32)
        if STAGE == 1:
            bin, _ = _reach(_bins(histograms, b, 0), top_k.to(tl.int64))
        if STAGE == 2:
            _, kept = _limit_of_k(histograms, b, top_k)
            bin, _ = _reach(_bins(histograms, b, 1), _wanted(kept, top_p))
        lane = tl.arange(0, WIDTH)
        top = tl.max(tl.load(maxima + b * PARTS + lane, mask=lane < PARTS, other=-float("inf")), axis=0)
        entry = part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + b.to(tl.int64) * V + entry, mask=entry < V, other=-float("inf"))
        distance = (top - x) / temperature
        at = fine_bin(distance)
        inside = (distance < _WINDOW) & (at <= furthest)
        if STAGE == 0:
            at = at // _BINS
        else:
            inside = inside & (at // _BINS == bin)
            at = at % _BINS
        own = histograms + (b.to(tl.int64) * 6 + 2 * STAGE) * _BINS
        tl.atomic_add(own + at, tl.full((BLOCK,), 1, tl.int64), mask=inside, sem="relaxed")
        tl.atomic_add(own + _BINS + at, (tl.exp(-distance) * _ONE).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def _settle(
    rows, temperatures, top_ks, top_ps, furthests, maxima, histograms, limits, tops, PARTS, WIDTH: tl.constexpr, PDL: tl.constexpr
):
    b = tl.program_id(0)
    row = tl.load(rows + b)
    top_k, top_p, furthest = _cuts_of(row, top_ks, top_ps, furthests)
    lane = tl.arange(0, WIDTH)
    begin(PDL)
    limit = tl.full((), _NO_LIMIT, tl.int32)
    if tl.load(temperatures + row) > 0.0:
        limit, kept = _limit_of_k(histograms, b, top_k)
        limit = tl.minimum(limit, furthest)
        if top_p < 1.0:
            wanted = _wanted(kept, top_p)
            bin, before = _reach(_bins(histograms, b, 1), wanted)
            fine, _ = _reach(_bins(histograms, b, 5), wanted - before)
            limit = tl.minimum(limit, bin * _BINS + fine)
    tl.store(limits + b, limit)
    tl.store(tops + b, tl.max(tl.load(maxima + b * PARTS + lane, mask=lane < PARTS, other=-float("inf")), axis=0))


class FilterScratch:
    """Maxima of the parts of a vocabulary and the bins of `batch` rows."""

    def __init__(self, batch: int, vocab: int, device: torch.device) -> None:
        self.parts = cdiv(vocab, _BLOCK)
        self.maxima = torch.empty(batch, self.parts, dtype=torch.float32, device=device)
        self.histograms = torch.empty(batch, 6, _BINS.value, dtype=torch.int64, device=device)
        self.kept = Kept(torch.empty(batch, dtype=torch.int32, device=device), torch.empty(batch, device=device))


def keep(logits: Tensor, rows: Tensor, temperatures: Tensor, cuts: Cuts, scratch: FilterScratch) -> Kept:
    """What each of `logits` fp32 [B, V] may be drawn from. rows: int64 [B], by which temperatures fp32 [R] and cuts are found;
    rows that are greedy or cut nothing keep everything."""
    (batch, vocab), s = logits.shape, scratch
    grid, width = (batch, s.parts), next_power_of_2(s.parts)
    each = (rows, temperatures, cuts.top_k, cuts.top_p, cuts.furthest, s.maxima, s.histograms)
    _begin_counting[grid](
        logits, s.maxima, s.histograms, vocab, s.parts, BLOCK=_BLOCK,
        ZEROED=next_power_of_2(cdiv(6 * _BINS.value, s.parts)), num_warps=4, **pdl(),
    )  # fmt: skip
    for stage in range(3):
        _count_bins[grid](logits, *each, vocab, s.parts, STAGE=stage, WIDTH=width, BLOCK=_BLOCK, num_warps=4, **pdl())
    _settle[(batch,)](*each, s.kept.limit, s.kept.top, s.parts, WIDTH=width, num_warps=4, **pdl())
    return s.kept
