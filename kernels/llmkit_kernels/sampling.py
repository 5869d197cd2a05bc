"""Choosing tokens on the device: the plain cases, greedy and temperature, without a softmax and without a sort.

argmax(logits / T + Gumbel noise) draws exactly from softmax(logits / T) (Gumbel-max trick). The noise is a counter-based hash
(Philox) of the request's seed, the token's position and the vocabulary entry, so a draw repeats whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, cdiv, pdl

_BLOCK = 4096
NO_TOKEN = tl.constexpr(-1)  # nothing could be chosen: the logits were NaN


@triton.jit
def _best_of_part(
    logits, rows, temperatures, seeds, positions, best, best_at, V, PARTS, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    b, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + b)
    temperature = tl.load(temperatures + row)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    entry = part * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    score = tl.load(logits + b.to(tl.int64) * V + entry, mask=entry < V, other=-float("inf"))
    if temperature > 0.0:
        noise = tl.rand(seed + position * 0x1E3779B97F4A7C15, entry)
        noise = tl.minimum(tl.maximum(noise, 1e-20), 0.99999994)  # the ends would be infinitely good or bad
        score = score / temperature - tl.log(-tl.log(noise))
    score = tl.where((entry < V) & (score == score), score, -float("inf"))  # a NaN is never chosen
    high, at = tl.max(score, axis=0, return_indices=True)
    tl.store(best + b * PARTS + part, high)
    tl.store(best_at + b * PARTS + part, part * BLOCK + at)


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
    scratch: SampleScratch, live: int,
) -> Tensor:  # fmt: skip
    """One token for each of `logits` fp32 [B, V]: greedy where the temperature is 0.

    rows: int64 [B], the persistent row of each, by which temperatures (fp32), seeds and positions (int64, where the newest token
    stands) are found. Writes token_ids int64 [B]; for rows below `live` (others are padding) also last_token, and moves their
    position on.
    """
    batch, vocab = logits.shape
    _best_of_part[(batch, scratch.parts)](
        logits, rows, temperatures, seeds, positions, scratch.best, scratch.best_at, vocab, scratch.parts,
        BLOCK=_BLOCK, num_warps=8, **pdl(),
    )  # fmt: skip
    _best_of_all[(batch,)](
        rows, scratch.best, scratch.best_at, token_ids, last_token, positions, scratch.parts, live,
        WIDTH=triton.next_power_of_2(scratch.parts), num_warps=1, **pdl(),
    )  # fmt: skip
    return token_ids
