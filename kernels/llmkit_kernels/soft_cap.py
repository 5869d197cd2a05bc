"""Attention scores in the unit that exp2 wants, with Gemma 2's soft cap where a model has one (arXiv:2408.00118)."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log2_scores(products, scale, CAP: tl.constexpr):
    """log2(e) · scale · products; with a CAP above 0, log2(e) · CAP · tanh(scale · products / CAP), which masking comes after.

    tanh(x) = sign(x) · (1 - e) / (1 + e) for e = exp(-2|x|) <= 1: no x overflows, and a NaN stays one.
    """
    if CAP > 0:
        twice = products * (scale * (2 * _LOG2E / CAP))
        e = tl.exp2(-tl.abs(twice))
        scores = tl.where(twice < 0, e - 1, 1 - e) / (1 + e) * (CAP * _LOG2E)
    else:
        scores = products * (scale * _LOG2E)
    return scores
