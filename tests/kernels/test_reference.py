"""The reference ops against what they mean, written so plainly that one can see it is right: loops over tokens, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmkit_kernels import reference as ops

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """A step: sequence i computes `new[i]` tokens after `done[i]` cached ones."""

    new: list[int]
    done: list[int]
    kv_heads: int
    share: int
    dim: int
    block_size: int
    window: int | None
    soft_cap: float | None
    dtype: torch.dtype
    seed: int

    @property
    def context(self) -> list[int]:
        return [n + d for n, d in zip(self.new, self.done)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 6))
    decodes = draw(st.integers(0, count))  # those that compute one token come first, as in a batch of the scheduler
    new = [1] * decodes + draw(st.lists(st.integers(1, 9), min_size=count - decodes, max_size=count - decodes))
    return Case(
        new=new,
        done=draw(st.lists(st.one_of(st.just(0), st.integers(0, 60)), min_size=count, max_size=count)),
        kv_heads=draw(st.integers(1, 3)),
        share=draw(st.integers(1, 4)),
        dim=draw(st.sampled_from([2, 8])),
        block_size=draw(st.sampled_from([1, 3, 4, 16])),
        window=draw(st.sampled_from([None, None, 1, 2, 5, 17, 100])),
        soft_cap=draw(st.sampled_from([None, None, 0.5, 30.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 99)),
    )


class Step:
    """A case as tensors: a cache full of garbage, but for the sequences' own slots and the padding block, which is zero."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed)
        g, d, size = case.kv_heads, case.dim, case.block_size
        self.history = [(self.normal(n, g, d), self.normal(n, g, d)) for n in case.context]
        self.q = self.normal(sum(case.new), g * case.share, d)
        self.k, self.v = (torch.cat([h[i][done:] for h, done in zip(self.history, case.done)]) for i in (0, 1))
        self.tables = self.scattered_blocks()
        num_blocks = int(self.tables.max()) + 1
        self.caches = [(self.normal(num_blocks, g, size, d) * 50).to(case.dtype) for _ in (0, 1)]
        for cache in self.caches:
            cache[0] = 0
        self.write()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random).to(self.case.dtype)

    def scattered_blocks(self) -> np.ndarray:
        """Block tables in random order; beyond what a sequence holds stand blocks of others, as a reused row leaves them."""
        counts = [-(-n // self.case.block_size) for n in self.case.context]
        order = torch.randperm(sum(counts) + 3, generator=self.random).numpy() + 1
        tables = order[torch.randint(len(order), (len(counts), max(counts) + 2), generator=self.random).numpy()]
        for i, count in enumerate(counts):
            tables[i, :count] = order[sum(counts[:i]) : sum(counts[: i + 1])]
        return tables.astype(np.int32)

    def slots(self, sequence: int, start: int, end: int) -> torch.Tensor:
        position = np.arange(start, end)
        size = self.case.block_size
        return torch.from_numpy(self.tables[sequence, position // size].astype(np.int64) * size + position % size)

    def store(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        ops.write_kv(k, v, *self.caches, ops.kv_rows(slots, self.case.kv_heads, self.case.block_size))

    def write(self) -> None:
        for i, ((k, v), done) in enumerate(zip(self.history, self.case.done)):
            self.store(k[:done], v[:done], self.slots(i, 0, done))
        spans = zip(self.case.done, self.case.context)
        self.store(self.k, self.v, torch.cat([self.slots(i, start, end) for i, (start, end) in enumerate(spans)]))

    def attend(self, scale: float) -> torch.Tensor:
        c = self.case
        layout = ops.CacheLayout(c.kv_heads, c.block_size, c.dtype, torch.device("cpu"))
        cu_seqlens = np.concatenate(([0], np.cumsum(c.new)))
        plan = ops.plan_attention(cu_seqlens, np.array(c.context, np.int32), self.tables, c.window, layout)
        return ops.paged_attention(self.q, self.k, self.v, *self.caches, plan, scale, c.soft_cap)

    def oracle(self, scale: float) -> torch.Tensor:
        """softmax(q k / sqrt(d)) v, perhaps capped, one query head of one token at a time."""
        c, out, token = self.case, torch.zeros(self.q.shape, dtype=torch.float64), 0
        for (keys, values), done, context in zip(self.history, c.done, c.context):
            for position in range(done, context):
                first = 0 if c.window is None else max(0, position - c.window + 1)
                for head in range(c.kv_heads * c.share):
                    k = keys[first : position + 1, head // c.share].double()
                    v = values[first : position + 1, head // c.share].double()
                    scores = k @ self.q[token, head].double() * scale
                    weights = torch.softmax(c.soft_cap * torch.tanh(scores / c.soft_cap) if c.soft_cap else scores, dim=0)
                    out[token, head] = weights @ v
                token += 1
        return out


@settings(max_examples=250, deadline=None)
@given(cases())
def test_paged_attention_is_softmax_over_each_tokens_own_past(case):
    step = Step(case)
    scale = case.dim**-0.5
    got = step.attend(scale)
    assert got.dtype == case.dtype
    torch.testing.assert_close(got.double(), step.oracle(scale), atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("window", [None, 30])
def test_a_mixed_step_of_very_different_lengths(window):
    """Contexts from 1 to 700 keys make several groups; prefill chunks stand beside them."""
    new = [1] * 14 + [7, 40, 1, 33]
    done = [0, 3, 699, 15, 16, 17, 128, 5, 5, 5, 5, 250, 31, 1, 0, 90, 12, 0]
    sizes = {"kv_heads": 2, "share": 3, "dim": 16, "block_size": 16}
    step = Step(Case(new, done, **sizes, window=window, soft_cap=None, dtype=torch.float32, seed=1))
    torch.testing.assert_close(step.attend(0.25).double(), step.oracle(0.25), atol=2e-5, rtol=2e-5)


def test_write_kv_touches_its_slots_only():
    step = Step(Case([3], [2], 2, 1, 4, 4, None, None, torch.float32, 0))
    before = [c.clone() for c in step.caches]
    k, v = torch.ones(2, 2, 4), torch.full((2, 2, 4), 2.0)
    slots = torch.tensor([5, 2])
    step.store(k, v, slots)
    for cache, old, value in zip(step.caches, before, (1.0, 2.0)):
        for slot in range(cache.shape[0] * 4):
            now, then = cache[slot // 4, :, slot % 4], old[slot // 4, :, slot % 4]
            assert torch.equal(now, torch.full_like(now, value) if slot in (5, 2) else then)


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 4, 8]), st.sampled_from([8, 12]))
@settings(deadline=None, max_examples=30)
def test_rotate_turns_channel_pairs_and_passes_the_rest(tokens, heads, rotated, dim):
    x = torch.randn(tokens, heads, dim)
    angles = torch.rand(tokens, rotated // 2) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((-angles.sin(), angles.sin()), -1)
    got = ops.rotate(x, cos[:, None], sin[:, None])
    half = rotated // 2
    pair = torch.complex(x[..., :half], x[..., half:rotated]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(got, torch.cat((pair.real, pair.imag, x[..., rotated:]), -1))


def test_rms_norm_and_silu_mul_mean_what_they_say():
    x, weight = torch.randn(3, 5, 8) * 4, torch.randn(8)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5).double(), expected, atol=1e-5, rtol=1e-5)
    gate, up = x[0].chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(ops.silu_mul(x[0].clone()), expected)
