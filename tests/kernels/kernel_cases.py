"""What the tests of the Triton kernels share: random caches, the plain-torch meaning of attention, and memory that tells who
wrote beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from llmkit_kernels import reference
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if torch.bfloat16 == DTYPE else 2e-5
Norms = tuple[Tensor, Tensor, float]
Tables = tuple[Tensor, Tensor]


def close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    """Relative distance of whole tensors; a NaN never passes."""
    got, want = got.double(), want.double()
    distance = float((got - want).norm() / want.norm().clamp_min(1e-12))
    assert distance <= tolerance, f"relative distance {distance:.2e}"


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


class Guarded:
    """`inside`, NaN until it is written, between two bands of memory that belong to nobody and hold the number `band`."""

    BAND = 1024

    def __init__(self, *shape: int, dtype: torch.dtype = DTYPE, band: float = 12344.0) -> None:
        size = math.prod(shape)
        self.memory = torch.full((size + 2 * self.BAND,), band, dtype=dtype, device=DEVICE)
        self.inside = self.memory[self.BAND : self.BAND + size].view(shape).fill_(float("nan"))
        self.band = self.memory[: self.BAND].clone()

    @classmethod
    def copy(cls, values: Tensor) -> Guarded:
        """With `values` inside, to be read: the bands are NaN, so that even zero times what lies there is seen."""
        made = cls(*values.shape, dtype=values.dtype, band=float("nan"))
        made.inside.copy_(values)
        return made

    def check(self) -> None:
        """Every place inside was written, none outside."""
        assert not self.inside.isnan().any(), "not wholly written"
        for band in (self.memory[: self.BAND], self.memory[-self.BAND :]):
            assert torch.allclose(band, self.band, rtol=0, atol=0, equal_nan=True), "written outside"


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """What torch.empty gives meanwhile is guarded, and checked at the end."""
    made: list[Guarded] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device.type == DEVICE.type
        made.append(Guarded(*shape, dtype=dtype))
        return made[-1].inside

    with mock.patch.object(torch, "empty", empty):
        yield
    assert made, "nothing was allocated"
    for guarded in made:
        guarded.check()


def slots_of(tables: Tensor, lens: Sequence[int], contexts: Sequence[int], size: int) -> Tensor:
    """int64 [T]: where the last lens[i] of contexts[i] tokens of each sequence lie."""
    table, new = tables.cpu().numpy(), [np.arange(c - n, c) for n, c in zip(lens, contexts)]
    slots = np.concatenate([table[i][p // size].astype(np.int64) * size + p % size for i, p in enumerate(new)])
    return torch.from_numpy(slots).to(DEVICE)


def cache_of(
    contexts: Sequence[int], kv_heads: int, dim: int, size: int, dtype: torch.dtype = DTYPE, garbage: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random keys and values in shuffled blocks, and the block tables, which go on with blocks of others. Where no sequence has
    a token the cache holds random numbers `garbage` times as big."""
    held = [-(-c // size) for c in contexts]
    random = np.random.default_rng(0)
    order = random.permutation(np.arange(1, sum(held) + 1))
    blocks = random.choice(order, (len(contexts), max(held) + 1)).astype(np.int32)
    for i, own in enumerate(np.split(order, np.cumsum(held)[:-1])):
        blocks[i, : len(own)] = own
    tables = torch.from_numpy(blocks).to(DEVICE)
    rows = reference.kv_rows(slots_of(tables, contexts, contexts, size), kv_heads, size)
    k_cache, v_cache = (normal(sum(held) + 1, kv_heads, size, dim, scale=garbage, dtype=dtype) for _ in range(2))
    k, v = (normal(sum(contexts), kv_heads, dim, dtype=dtype) for _ in range(2))
    reference.write_kv(k, v, k_cache, v_cache, rows)
    return k_cache, v_cache, tables


def rotary(length: int, dim: int, dtype: torch.dtype = DTYPE) -> Tables:
    """cos and sin [length, dim], as `RotaryEmbedding` has them."""
    angle = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), 1).to(DEVICE, dtype), torch.cat((-sin, sin), 1).to(DEVICE, dtype)


def unfused(
    qkv: Tensor, bias: Tensor | None, norms: Norms | None, tables: Tables | None, positions: Tensor, heads: int, kv_heads: int,
    dim: int, dtype: torch.dtype = DTYPE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v [T, heads, D] by the reference ops, rounded to dtype after each."""
    total = (qkv + bias if bias is not None else qkv).to(dtype).view(qkv.shape[0], -1, dim)
    qk, v = total[:, : heads + kv_heads], total[:, heads + kv_heads :]
    if norms:
        q_norm, k_norm, eps = norms
        qk = torch.cat((reference.rms_norm(qk[:, :heads], q_norm, eps), reference.rms_norm(qk[:, heads:], k_norm, eps)), 1)
    if tables:
        cos, sin = (t[positions][:, None].float() for t in tables)
        qk = reference.rotate(qk.float(), cos, sin).to(dtype)
    return qk[:, :heads], qk[:, heads:], v


def attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lens: Sequence[int],
    contexts: Sequence[int], scale: float, window: int | None, soft_cap: float | None = None,
) -> Tensor:  # fmt: skip
    """write_kv and paged_attention of the reference."""
    kv_heads, size = k_cache.shape[1:3]
    reference.write_kv(k, v, k_cache, v_cache, reference.kv_rows(slots_of(tables, lens, contexts, size), kv_heads, size))
    layout = reference.CacheLayout(kv_heads, size, q.dtype, DEVICE)
    cu = np.concatenate(([0], np.cumsum(lens))).astype(np.int64)
    plan = reference.plan_attention(cu, np.array(contexts), tables.cpu().numpy(), window, layout)
    return reference.paged_attention(q, k, v, k_cache, v_cache, plan, scale, soft_cap)
