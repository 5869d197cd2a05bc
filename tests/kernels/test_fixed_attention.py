"""Attention for `deterministic=True`: it is attention, and a row's bits depend on its query and keys alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from kernel_cases import DEVICE, DTYPE, ON_GPU, Guarded, attend, cache_of, guarded_allocations, normal, slots_of
from llmkit_kernels import fixed_attention, reference
from llmkit_kernels.prefill_attention import cache_descriptor, query_tiles

DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
Descriptors = tuple[Any, Any] | None


@dataclass(frozen=True)
class Layer:
    """size: tokens of a block."""

    kv_heads: int
    share: int
    dim: int
    size: int
    window: int | None = None
    dtype: torch.dtype = DTYPE
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.share

    def cache(self, contexts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        return cache_of(contexts, self.kv_heads, self.dim, self.size, self.dtype, garbage=30.0)

    def queries(self, tokens: int) -> Tensor:
        """[tokens, H, D], beside keys and values as `rope_cache` leaves them."""
        return normal(tokens, self.heads + 2 * self.kv_heads, self.dim, dtype=self.dtype)[:, : self.heads]

    def oracle(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lens: list[int], contexts: list[int]) -> Tensor:
        slots = slots_of(tables, lens, contexts, self.size)
        k, v = (c.transpose(1, 2).flatten(0, 1)[slots] for c in (k_cache, v_cache))
        wide = [x.double() for x in (q, k, v, k_cache, v_cache)]
        return attend(*wide, tables, lens, contexts, self.dim**-0.5, self.window)  # type: ignore[arg-type]

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lens: list[int], contexts: list[int],
        descriptors: Descriptors = None,
    ) -> Tensor:  # fmt: skip
        cu = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=DEVICE)
        context = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
        sequence, first = torch.from_numpy(query_tiles(np.array(lens))).to(DEVICE).unbind(0)
        with guarded_allocations():
            return fixed_attention.prefill(
                q, k_cache, v_cache, cu, context, tables, (sequence, first), self.dim**-0.5, self.window, None, descriptors
            )

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, positions: Tensor, splits: int,
        rows: Tensor | None = None, descriptors: Descriptors = None,
    ) -> Tensor:  # fmt: skip
        most = int(positions.max()) + 1
        scratch = fixed_attention.Scratch(len(q), self.heads, self.kv_heads, self.dim, most, DEVICE, splits)
        for part in (scratch.out, scratch.high, scratch.total):
            part.fill_(float("nan"))
        out = Guarded(len(q), self.heads * self.dim, dtype=self.dtype)
        fixed_attention.decode(
            q, k_cache, v_cache, tables, positions, rows, self.dim**-0.5, self.window, scratch, out.inside, descriptors
        )
        out.check()
        assert not scratch.arrivals.any(), "a counter was not reset"
        return out.inside.view(len(q), self.heads, self.dim)


def transports(*caches: Tensor) -> list[Descriptors]:
    """By pointers, and by TMA where there is one."""
    k, v = (cache_descriptor(c) for c in caches)
    return [None] if k is None else [None, (k, v)]


def examples(count: int) -> Any:
    return settings(max_examples=3 * count if ON_GPU else count, derandomize=not ON_GPU, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.too_slow])  # fmt: skip


LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129]))
CONTEXTS = st.one_of(LENGTHS, st.integers(400, 1600), st.sampled_from([511, 512, 513, 576, 1023, 1024, 1025, 1537]))


def layers(kv_heads: int, share: int) -> st.SearchStrategy[Layer]:
    return st.builds(
        Layer, st.integers(1, kv_heads), st.integers(1, share), st.sampled_from([32, 64, 128, 256]),
        st.sampled_from([16, 32, 64, 96, 128]), st.one_of(st.none(), st.sampled_from([1, 2, 16, 33, 64, 65, 100, 512, 700])),
        st.sampled_from(DTYPES), st.integers(0, 9999),
    )  # fmt: skip


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@examples(12)
@given(layers(2, 2), st.lists(st.tuples(LENGTHS, st.one_of(st.just(0), CONTEXTS)), min_size=1, max_size=3))
def test_prompt_runs(layer: Layer, runs: list[tuple[int, int]]) -> None:
    lens, contexts = [n for n, _ in runs], [n + done for n, done in runs]
    k_cache, v_cache, tables = layer.cache(contexts)
    q = layer.queries(sum(lens))
    want = layer.oracle(q, k_cache, v_cache, tables, lens, contexts)
    for descriptors in transports(k_cache, v_cache):
        near(layer.prefill(q, k_cache, v_cache, tables, lens, contexts, descriptors), want, layer.dtype)


@examples(25)
@given(layers(2, 17), st.lists(CONTEXTS, min_size=1, max_size=3), st.sampled_from([1, 2, 3, 8]), st.booleans())
def test_one_token_a_sequence(layer: Layer, contexts: list[int], splits: int, indexed: bool) -> None:
    batch = len(contexts)
    k_cache, v_cache, tables = layer.cache(contexts)
    q, positions, rows = layer.queries(batch), torch.tensor(contexts, device=DEVICE) - 1, None
    want = layer.oracle(q, k_cache, v_cache, tables, [1] * batch, contexts)
    if indexed:
        rows = torch.randperm(batch + 2, device=DEVICE)[:batch]
        positions = torch.zeros(batch + 2, dtype=torch.int64, device=DEVICE).index_copy(0, rows, positions)
        tables = torch.zeros(batch + 2, tables.shape[1], dtype=torch.int32, device=DEVICE).index_copy(0, rows, tables)
    for descriptors in transports(k_cache, v_cache):
        near(layer.decode(q, k_cache, v_cache, tables, positions, splits, rows, descriptors), want, layer.dtype)


@pytest.fixture
def tensor_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose rows don't depend on a tile's shape, which tensor cores were measured to have. numpy's do depend on it, so
    that in the interpreter products are added up one k after the other."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        total = acc.data
        for x, y in zip(a.data.T.astype(np.float32), b.data.astype(np.float32)):
            total = total + x[:, None] * y
        return interpreter.TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


class Whole:
    """`LENGTH` tokens of a sequence, the first of three in the cache. rows: [LENGTH, H, D], its attention as one run."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.contexts = layer, [LENGTH, 70, 600]
        self.k_cache, self.v_cache, self.tables = layer.cache(self.contexts)
        self.q = layer.queries(LENGTH)
        self.rows = layer.prefill(self.q, self.k_cache, self.v_cache, self.tables[:1], [LENGTH], [LENGTH])

    def moved(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Caches with blocks of another size and other tokens beside, and its block table [1, blocks] there."""
        k_cache, v_cache, tables = replace(self.layer, size=size, seed=1).cache(self.contexts)
        here, there = (slots_of(t, [LENGTH], [LENGTH], n) for t, n in ((self.tables, self.layer.size), (tables, size)))
        k, v = (c.transpose(1, 2).flatten(0, 1)[here] for c in (self.k_cache, self.v_cache))
        reference.write_kv(k, v, k_cache, v_cache, reference.kv_rows(there, self.layer.kv_heads, size))
        return k_cache, v_cache, tables[:1]


whole_of = functools.cache(Whole)
LAYERS = [Layer(2, 2, 32, 64), Layer(1, 2, 64, 16, window=600), Layer(1, 17, 32, 32, window=33)]
LENGTH, ENDS = 1100, [0, 1, 62, 63, 64, 511, 512, 639, 1023, 1024, 1099]
if ON_GPU:
    LAYERS += [Layer(2, 4, 128, 64), Layer(1, 4, 64, 64, dtype=torch.float16), Layer(2, 7, 128, 16, window=700)]
    LAYERS += [Layer(1, 2, 256, 64), Layer(1, 40, 128, 64)]
    LENGTH, ENDS = 5000, [*ENDS, 2047, 2048, 3333, 4095, 4096, 4999]


@pytest.mark.usefixtures("tensor_core")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_prompt_in_pieces_has_the_bits_of_the_whole(layer: Layer) -> None:
    whole = whole_of(layer)
    for start, end in [(0, 1), (1, 70), (450, 577), (1030, LENGTH)]:
        n = end - start
        q = torch.cat((layer.queries(5), whole.q[start:end], layer.queries(9)))  # the others come with it, in another order
        got = layer.prefill(q, whole.k_cache, whole.v_cache, whole.tables[[2, 0, 1]], [5, n, 9], [600, end, 70])
        assert torch.equal(got[5 : 5 + n], whole.rows[start:end])


@pytest.mark.usefixtures("tensor_core")
@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_new_token_has_the_bits_it_has_in_a_prompt(layer: Layer, splits: int) -> None:
    whole, ends = whole_of(layer), torch.tensor(ENDS, device=DEVICE)
    for batch in (ends, ends[-1:], ends[4:7].flip(0)):
        tables = whole.tables[:1].expand(len(batch), -1)
        got = layer.decode(whole.q[batch], whole.k_cache, whole.v_cache, tables, batch, splits)
        assert torch.equal(got, whole.rows[batch])


@pytest.mark.usefixtures("tensor_core")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_where_keys_lie_and_what_lies_beside_them_changes_no_bit(layer: Layer) -> None:
    whole = whole_of(layer)
    k_cache, v_cache, tables = whole.moved(16 if layer.size > 16 else 128)
    ends = torch.tensor([LENGTH - 1, 640, 100], device=DEVICE)
    for descriptors in transports(k_cache, v_cache):
        got = layer.prefill(whole.q[1000:], k_cache, v_cache, tables, [LENGTH - 1000], [LENGTH], descriptors)
        assert torch.equal(got, whole.rows[1000:])
        got = layer.decode(whole.q[ends], k_cache, v_cache, tables.expand(3, -1), ends, 2, None, descriptors)
        assert torch.equal(got, whole.rows[ends])


@pytest.mark.parametrize(
    ("batch", "kv_heads", "max_chunks", "splits"), [(1, 8, 256, 64), (1, 8, 4, 4), (64, 4, 9, 2), (33, 8, 9, 1)]
)
def test_programs_about_fill_the_gpu(
    monkeypatch: pytest.MonkeyPatch, batch: int, kv_heads: int, max_chunks: int, splits: int
) -> None:
    monkeypatch.setattr(fixed_attention, "num_sms", lambda: 132)
    assert fixed_attention.plan(batch, kv_heads, max_chunks) == splits
    scratch = fixed_attention.Scratch(batch, 16, kv_heads, 64, max_chunks * fixed_attention.CHUNK, DEVICE)
    assert len(scratch.out) == (batch * max_chunks * 16 if splits > 1 else 0)


@pytest.mark.parametrize(
    ("most", "kv_heads", "context"), [(256, 4, 40_000), (256, 8, 1500), (16, 4, 4096), (1024, 3, 513), (64, 2, 512)]
)
def test_no_scratch_is_larger_than_is_planned_for(most: int, kv_heads: int, context: int) -> None:
    heads, dim = 2 * kv_heads, 64
    sizes = [fixed_attention.Scratch(batch, heads, kv_heads, dim, context, torch.device("meta")) for batch in range(1, most + 1)]
    needed = max(4 * (s.out.numel() + s.high.numel() + s.total.numel()) for s in sizes)
    assert needed == fixed_attention.scratch_bytes(most, heads, kv_heads, dim, context)
