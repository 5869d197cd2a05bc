"""Penalties for what was said before: repetition (CTRL, arXiv:1909.05858), frequency and presence, on the device.

Every persistent row counts its tokens there: a step that is launched ahead draws tokens of which the host does not know yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit_kernels.launch import begin, cdiv, pdl

_BLOCK = 4096
_MOST = tl.constexpr(32766)  # a token counts as said at most half as often


@dataclass
class Penalties:
    """One entry a persistent row: repetition (1 when off), frequency, presence (0 when off), fp32 [R]. counts: int16 [R, V],
    twice how often a token was generated, plus 1 where the prompt has it."""

    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    counts: Tensor


def counted(prompt: Tensor, generated: Tensor, vocab: int) -> Tensor:
    """A row of counts, int16 [V], of two lists of tokens, int64."""
    times = torch.zeros(vocab, dtype=torch.int64, device=generated.device)  # bincount would wait for the device
    times = times.scatter_add_(0, generated, torch.ones_like(generated)).clamp_max(_MOST.value // 2) * 2
    times[prompt] += 1
    return times.to(torch.int16)


@triton.jit
def _is_on(row, repetitions, frequencies, presences):
    repetition, frequency, presence = tl.load(repetitions + row), tl.load(frequencies + row), tl.load(presences + row)
    return (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0), repetition, frequency, presence


@triton.jit
def _penalise(logits, rows, repetitions, frequencies, presences, counts, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    b, part = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + b)
    on, repetition, frequency, presence = _is_on(row, repetitions, frequencies, presences)
    begin(PDL)
    if on:
        entry = part * BLOCK + tl.arange(0, BLOCK)
        count = tl.load(counts + row * V + entry, mask=entry < V, other=0)
        at = logits + b.to(tl.int64) * V + entry
        x = tl.load(at, mask=entry < V, other=0.0)
        times = (count >> 1).to(tl.float32)
        x = tl.where(count > 0, tl.where(x > 0.0, x / repetition, x * repetition), x)
        x = x - frequency * times - tl.where(times > 0.0, presence, 0.0)
        tl.store(at, x, mask=(entry < V) & (count > 0))


@triton.jit
def _count_said(token_ids, rows, repetitions, frequencies, presences, counts, V, LIVE, PDL: tl.constexpr):
    b = tl.program_id(0)
    row = tl.load(rows + b)
    on, _, _, _ = _is_on(row, repetitions, frequencies, presences)
    begin(PDL)
    token = tl.load(token_ids + b)
    said = on & (row < LIVE) & (token >= 0)
    at = counts + row * V + token
    count = tl.load(at, mask=said, other=0)
    tl.store(at, tl.where(count < _MOST, count + 2, count), mask=said)


def penalise(logits: Tensor, rows: Tensor, penalties: Penalties) -> None:
    """Edit `logits` fp32 [B, V] in place, each by the row (rows int64 [B]) that it belongs to."""
    batch, vocab = logits.shape
    p = penalties
    _penalise[(batch, cdiv(vocab, _BLOCK))](
        logits, rows, p.repetition, p.frequency, p.presence, p.counts, vocab, BLOCK=_BLOCK, num_warps=4, **pdl()
    )


def count(token_ids: Tensor, rows: Tensor, penalties: Penalties, live: int) -> None:
    """Note that these tokens, int64 [B], were drawn for rows int64 [B]; not for those from `live` on, which are padding."""
    p = penalties
    _count_said[(len(rows),)](
        token_ids, rows, p.repetition, p.frequency, p.presence, p.counts, p.counts.shape[1], live, num_warps=1, **pdl()
    )
