"""Kernels against their plain-torch meaning over drawn shapes, dtypes and ragged lengths. What a kernel should write is NaN
before; beside it, and in cache blocks of others, nothing may change. Without a GPU: few, small, and always the same cases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from kernel_cases import (
    DEVICE,
    ON_GPU,
    Guarded,
    Norms,
    Tables,
    attend,
    cache_of,
    guarded_allocations,
    normal,
    rotary,
    slots_of,
    unfused,
)
from llmkit_kernels import (
    activation,
    band_gemm,
    decode_attention,
    fixed_gemm,
    gemm,
    norm,
    prefill_attention,
    reference,
    rope_cache,
    wide_gemm,
)
from llmkit_kernels.launch import shared_memory
from llmkit_kernels.prepared import PreparedWeight

# The kernels' own dtypes; Triton's interpreter has no products of bfloat16, and on a GPU those of fp32 are TF32's.
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
GARBAGE = 30.0


def examples(count: int) -> Any:
    """`count` of them, the same every time; more, and new ones, on a GPU, where each new shape is compiled."""
    return settings(max_examples=3 * count if ON_GPU else count, derandomize=not ON_GPU, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.too_slow])  # fmt: skip


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Place by place; a NaN never passes."""
    torch.testing.assert_close(got.double(), want.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def by_slot(cache: Tensor) -> Tensor:
    """[num_blocks, G, block_size, D] -> [slots, G, D]."""
    return cache.transpose(1, 2).flatten(0, 1)


def stored(cache: Guarded, before: Tensor, slots: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
    """The cache holds rows [T, G, D] at slots, and what it held before everywhere else."""
    cache.check()
    now, others = by_slot(cache.inside), torch.ones(len(by_slot(before)), dtype=torch.bool, device=DEVICE)
    others[slots] = False
    assert torch.equal(now[others], by_slot(before)[others]), "another's slot was written"
    near(now[slots], rows, dtype)


@dataclass
class Layer:
    """What the sequences of an attention case share. size: tokens of a block."""

    kv_heads: int
    share: int
    dim: int
    size: int
    window: int | None
    soft_cap: float | None
    normed: bool
    rotated: bool
    dtype: torch.dtype
    seed: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.share

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def norms(self) -> Norms | None:
        return (normal(self.dim, dtype=self.dtype), normal(self.dim, dtype=self.dtype), 1e-6) if self.normed else None

    def tables(self) -> Tables | None:
        return rotary(512, self.dim, self.dtype) if self.rotated else None

    def oracle(
        self, qkv: tuple[Tensor, Tensor, Tensor], caches: list[Tensor], tables: Tensor, lens: list[int], contexts: list[int]
    ) -> Tensor:
        """Attention in float64, which the kernels need not round like; caches stay as they are."""
        wide = [x.double() for x in (*qkv, *caches)]
        return attend(*wide, tables, lens, contexts, self.scale, self.window, self.soft_cap)  # type: ignore[arg-type]


DIMS = st.sampled_from([32, 64, 128, 256])
SEEDS = st.integers(0, 9999)
HALVES = st.sampled_from(DTYPES)
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129]))


@st.composite
def layers(draw: st.DrawFn, kv_heads: int, share: int) -> Layer:
    return Layer(
        kv_heads=draw(st.integers(1, kv_heads)),
        share=draw(st.integers(1, share)),
        dim=draw(DIMS),
        size=draw(st.sampled_from([16, 32, 64])),
        window=draw(st.one_of(st.none(), st.sampled_from([1, 2, 16, 33, 64, 65, 100]))),
        soft_cap=draw(st.sampled_from([None, 1.0, 30.0])),
        normed=draw(st.booleans()),
        rotated=draw(st.booleans()),
        dtype=draw(HALVES),
        seed=draw(SEEDS),
    )


@dataclass
class Decode:
    """One new token for each of `contexts`, itself counted. partials: of the qkv product, 0: one product in the layer's dtype."""

    layer: Layer
    contexts: list[int]
    cut: decode_attention.Cut
    partials: int
    biased: bool
    indexed: bool


PARTS = st.sampled_from([1, 2, 4, 8])
CUTS = st.builds(
    decode_attention.Cut, PARTS, st.sampled_from([16, 64]), st.sampled_from([1, 3]), st.sampled_from([2, 3]), st.booleans()
)


@st.composite
def decodes(draw: st.DrawFn) -> Decode:
    return Decode(
        layer=draw(layers(2, 17)),
        contexts=draw(st.lists(LENGTHS, min_size=1, max_size=3)),
        cut=draw(CUTS),
        partials=draw(st.integers(0, 3)),
        biased=draw(st.booleans()),
        indexed=draw(st.booleans()),
    )


def scattered(rows: int, index: Tensor, values: Tensor, other: int) -> Tensor:
    """[rows, ...]: values at index, `other` elsewhere."""
    return torch.full((rows, *values.shape[1:]), other, dtype=values.dtype, device=DEVICE).index_copy_(0, index, values)


@examples(25)
@given(decodes())
def test_decode_attention(case: Decode) -> None:
    torch.manual_seed(case.layer.seed)
    c, batch = case.layer, len(case.contexts)
    width = (c.heads + 2 * c.kv_heads) * c.dim
    *before, tables = cache_of(case.contexts, c.kv_heads, c.dim, c.size, c.dtype, GARBAGE)
    shape, kind = ((case.partials, batch, width), torch.float32) if case.partials else ((batch, width), c.dtype)
    qkv, bias = normal(*shape, dtype=kind), normal(width, dtype=c.dtype) if case.biased else None
    norms, rope = c.norms(), c.tables()
    positions = torch.tensor(case.contexts, device=DEVICE) - 1
    whole = qkv.sum(0) if case.partials else qkv.float()
    q, k, v = unfused(whole, bias, norms, rope, positions, c.heads, c.kv_heads, c.dim, c.dtype)
    want = c.oracle((q, k, v), before, tables, [1] * batch, case.contexts)
    slots = slots_of(tables, [1] * batch, case.contexts, c.size)
    rows = None
    if case.indexed:
        rows = torch.randperm(batch + 2, device=DEVICE)[:batch]
        positions, tables = scattered(batch + 2, rows, positions, 3), scattered(batch + 2, rows, tables, 0)
    k_cache, v_cache = (Guarded.copy(x) for x in before)
    scratch = decode_attention.DecodeScratch(batch, c.heads, c.kv_heads, c.dim, DEVICE, case.cut)
    for part in (scratch.out, scratch.high, scratch.total):
        part.fill_(float("nan"))
    out = Guarded(batch, c.heads * c.dim, dtype=c.dtype)
    decode_attention.fused_decode(
        Guarded.copy(qkv).inside, bias, norms, rope, k_cache.inside, v_cache.inside, tables, positions, rows, c.scale, c.window,
        scratch, out.inside, c.soft_cap,
    )  # fmt: skip
    out.check()
    near(out.inside.view_as(want), want, c.dtype)
    stored(k_cache, before[0], slots, k, c.dtype)
    stored(v_cache, before[1], slots, v, c.dtype)
    assert not scratch.arrivals.any(), "a counter was not reset"


@dataclass
class Prompts:
    """Runs of `new` tokens, each after so many cached ones."""

    layer: Layer
    runs: list[tuple[int, int]]

    @property
    def new(self) -> list[int]:
        return [n for n, _ in self.runs]

    @property
    def contexts(self) -> list[int]:
        return [n + done for n, done in self.runs]

    def positions(self) -> Tensor:
        return torch.cat([torch.arange(done, done + n) for n, done in self.runs]).to(DEVICE)


@st.composite
def prompts(draw: st.DrawFn, kv_heads: int, share: int, new: st.SearchStrategy[int]) -> Prompts:
    runs = st.lists(st.tuples(new, st.one_of(st.just(0), LENGTHS)), min_size=1, max_size=3)
    return Prompts(draw(layers(kv_heads, share)), draw(runs))


@examples(12)
@given(prompts(2, 2, LENGTHS))
def test_prefill_attention(case: Prompts) -> None:
    torch.manual_seed(case.layer.seed)
    c, tokens = case.layer, sum(case.new)
    k_cache, v_cache, tables = cache_of(case.contexts, c.kv_heads, c.dim, c.size, c.dtype, GARBAGE)
    slots = slots_of(tables, case.new, case.contexts, c.size)
    q = normal(tokens, c.heads + 2 * c.kv_heads, c.dim, dtype=c.dtype)[:, : c.heads]  # as rope_cache gives it: beside k and v
    own = by_slot(k_cache)[slots], by_slot(v_cache)[slots]
    want = c.oracle((q, *own), [k_cache, v_cache], tables, case.new, case.contexts)
    cu = torch.tensor([0, *np.cumsum(case.new)], dtype=torch.int32, device=DEVICE)
    contexts = torch.tensor(case.contexts, dtype=torch.int32, device=DEVICE)
    tiles = torch.from_numpy(prefill_attention.query_tiles(np.array(case.new))).to(DEVICE).unbind(0)
    by_tma = [prefill_attention.cache_descriptor(x) for x in (k_cache, v_cache)]
    for descriptors in [None] if by_tma[0] is None else [None, (by_tma[0], by_tma[1])]:
        with guarded_allocations():
            got = prefill_attention.prefill(
                q, k_cache, v_cache, cu, contexts, tables, tiles, c.scale, c.window, None, descriptors, c.soft_cap
            )
        near(got, want, c.dtype)


@examples(20)
@given(prompts(3, 9, st.integers(1, 5)), st.integers(0, 2))
def test_rope_cache(case: Prompts, gap: int) -> None:
    """gap: rows of qkv lie so many heads apart."""
    torch.manual_seed(case.layer.seed)
    c, tokens = case.layer, sum(case.new)
    *before, tables = cache_of(case.contexts, c.kv_heads, c.dim, c.size, c.dtype, GARBAGE)
    total, norms, rope = c.heads + 2 * c.kv_heads, c.norms(), c.tables()
    held = normal(tokens, total + gap, c.dim, dtype=c.dtype)
    positions, slots = case.positions(), slots_of(tables, case.new, case.contexts, c.size)
    q, k, v = unfused(held[:, :total].flatten(1), None, norms, rope, positions, c.heads, c.kv_heads, c.dim, c.dtype)
    k_cache, v_cache, qkv = Guarded.copy(before[0]), Guarded.copy(before[1]), Guarded.copy(held)
    got = rope_cache.rope_cache(qkv.inside[:, :total], norms, rope, positions, slots, k_cache.inside, v_cache.inside)
    near(got, q, c.dtype)
    assert got.data_ptr() == qkv.inside.data_ptr()
    qkv.check()
    assert torch.equal(qkv.inside[:, c.heads :], held[:, c.heads :]), "only q is written in place"
    stored(k_cache, before[0], slots, k, c.dtype)
    stored(v_cache, before[1], slots, v, c.dtype)
    assert torch.equal(by_slot(v_cache.inside)[slots], v)


@examples(20)
@given(prompts(3, 9, st.integers(1, 5)), st.integers(1, 4), st.booleans())
def test_rope_cache_of_partial_products(case: Prompts, parts: int, biased: bool) -> None:
    torch.manual_seed(case.layer.seed)
    c, tokens = case.layer, sum(case.new)
    *before, tables = cache_of(case.contexts, c.kv_heads, c.dim, c.size, c.dtype, GARBAGE)
    total, norms, rope = c.heads + 2 * c.kv_heads, c.norms(), c.tables()
    qkv = normal(parts, tokens, total, c.dim, scale=parts**-0.5, dtype=torch.float32)
    bias = normal(total * c.dim, dtype=c.dtype) if biased else None
    positions, slots = case.positions(), slots_of(tables, case.new, case.contexts, c.size)
    q, k, v = unfused(qkv.sum(0).flatten(1), bias, norms, rope, positions, c.heads, c.kv_heads, c.dim, c.dtype)
    k_cache, v_cache = Guarded.copy(before[0]), Guarded.copy(before[1])
    with guarded_allocations():
        got = rope_cache.rope_cache(
            Guarded.copy(qkv).inside, norms, rope, positions, slots, k_cache.inside, v_cache.inside, bias
        )
    near(got, q, c.dtype)
    stored(k_cache, before[0], slots, k, c.dtype)
    stored(v_cache, before[1], slots, v, c.dtype)


TOKENS = st.integers(1, 200 if ON_GPU else 12)  # one program each: none knows of the others
WIDTHS = st.one_of(st.integers(1, 300), st.sampled_from([512, 1023, 1024, 1025]))


@examples(25)
@given(TOKENS, WIDTHS, st.integers(0, 4), st.booleans(), HALVES, SEEDS)
def test_add_rms_norm(tokens: int, width: int, partials: int, first: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = normal(partials, tokens, width, dtype=torch.float32) if partials else normal(tokens, width, dtype=dtype)
    weight, stream = normal(width, dtype=dtype), None if first else normal(tokens, width, dtype=dtype)
    total = x.sum(0) if partials else x.float()
    if stream is not None:
        total = (total.to(dtype).float() + stream.float()).to(dtype).float()
    residual = None if stream is None else Guarded.copy(stream)
    with guarded_allocations():
        got = norm.add_rms_norm(Guarded.copy(x).inside, residual.inside if residual else None, Guarded.copy(weight).inside, 1e-5)
    assert got.dtype == dtype
    near(got, reference.rms_norm(total.double(), weight.double(), 1e-5), dtype)
    if residual is not None:
        residual.check()
        near(residual.inside, total, dtype)


@examples(15)
@given(TOKENS, WIDTHS, st.booleans(), HALVES, SEEDS)
def test_embed_rms_norm(tokens: int, width: int, indexed: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    table, weight = normal(50, width, dtype=dtype), normal(width, dtype=dtype)
    ids = torch.randint(50, (tokens + 3,), device=DEVICE)
    rows = torch.randint(tokens + 3, (tokens,), device=DEVICE) if indexed else None
    with guarded_allocations():
        residual, got = norm.embed_rms_norm(Guarded.copy(table).inside, ids, rows, Guarded.copy(weight).inside, 1e-5)
    want = table[ids if rows is None else ids[rows]]
    assert torch.equal(residual, want)
    near(got, reference.rms_norm(want.double(), weight.double(), 1e-5), dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Of columns gate 0, up 0, gate 1, up 1, ..., in float64."""
    return reference.silu_mul(torch.cat(gate_up.double().unflatten(1, (-1, 2)).unbind(2), dim=1))


@examples(20)
@given(TOKENS, WIDTHS, HALVES, st.sampled_from([1.0, 20.0]), SEEDS)
def test_silu_mul_pairs(tokens: int, width: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = normal(tokens, 2 * width, scale=scale, dtype=dtype)
    with guarded_allocations():
        got = activation.silu_mul_pairs(Guarded.copy(x).inside)
    near(got, silu_mul(x), dtype)


FEW = st.one_of(st.integers(1, 20), st.integers(1, 300), st.sampled_from([32, 33, 64, 65, 96, 97, 128, 129, 192, 193, 256]))
COLUMNS = st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 512, 1024]))
ROWS = st.one_of(st.integers(1, 150), st.sampled_from([64, 128, 256]))
SIDES = st.sampled_from([32, 64, 128])
TILES = st.builds(gemm.Tile, SIDES, SIDES, st.just(4), st.integers(1, 4), st.integers(1, 4))
WIDE_TILES = st.builds(wide_gemm.WideTile, st.sampled_from([64, 128]), SIDES, SIDES, st.just(4), st.integers(1, 4)).filter(
    lambda t: in_shared_memory(t.block_m, t.block_n, t.block_k, t.stages)
)
BANDS = st.builds(
    band_gemm.Band, st.sampled_from([64, 128]), st.sampled_from([64, 128]), st.sampled_from([0, 16, 32, 64]), SIDES, st.just(4),
    st.integers(2, 4), st.integers(1, 4),
).filter(lambda b: in_shared_memory(b.tokens, b.rows, b.block_k, b.stages))  # fmt: skip


def in_shared_memory(tokens: int, rows: int, columns: int, stages: int) -> bool:
    """Whether tiles of half precision fit, and a result of fp32 beside them."""
    return 2 * stages * columns * (tokens + rows) + 4 * tokens * rows <= shared_memory()


@dataclass
class Product:
    """x [m, k] and weight [n, k], such that products are about 1."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight, their product in float64; x and weight guarded."""
        torch.manual_seed(self.seed)
        x, w = normal(self.m, self.k, dtype=self.dtype), normal(self.n, self.k, scale=self.k**-0.5, dtype=self.dtype)
        return Guarded.copy(x).inside, Guarded.copy(w).inside, x.double() @ w.double().T


def products(rows: st.SearchStrategy[int] = ROWS) -> st.SearchStrategy[Product]:
    return st.builds(Product, FEW, rows, COLUMNS, HALVES, SEEDS)


@examples(30)
@given(products(), st.one_of(st.none(), TILES))
def test_partial_products(case: Product, tile: gemm.Tile | None) -> None:
    x, w, want = case.tensors()
    with guarded_allocations():
        got = gemm.partial_products(x, PreparedWeight(w), None, tile)
    near(got.sum(0), want, case.dtype)


@examples(30)
@given(products(ROWS.map(lambda n: 2 * n)), st.one_of(st.none(), TILES))
def test_gate_up_silu(case: Product, tile: gemm.Tile | None) -> None:
    x, w, want = case.tensors()
    with guarded_allocations():
        got = gemm.gate_up_silu(x, PreparedWeight(w), None, tile)
    near(got, silu_mul(want), case.dtype)


@examples(20)
@given(products(), st.sampled_from([1, 2, 4]), WIDE_TILES)
def test_wide_product(case: Product, splits: int, tile: wide_gemm.WideTile) -> None:
    case.k = max(case.k, 1) if splits == 1 else splits * tile.block_k * (1 + case.k % 3)
    x, w, want = case.tensors()
    with guarded_allocations():
        got = wide_gemm.product(x, PreparedWeight(w), tile, splits)
    near(got, want, case.dtype)


@examples(20)
@given(products(ROWS.map(lambda n: 2 * n)), BANDS)
def test_bands(case: Product, band: band_gemm.Band) -> None:
    x, w, want = case.tensors()
    weight = PreparedWeight(w)
    with guarded_allocations():
        parts = band_gemm.partial_products(x, weight, band)
        activated = band_gemm.gate_up_silu(x, weight, replace(band, splits=1))
    near(parts.sum(0), want, case.dtype)
    near(activated, silu_mul(want), case.dtype)


@examples(25)
@given(products(), st.sampled_from([None, 512, 8192]))
def test_fixed_products(case: Product, k: int | None) -> None:
    """Whatever the number of tokens, and whether K is cut or not."""
    case.k, case.n = k or case.k, 2 * case.n
    x, w, want = case.tensors()
    weight = PreparedWeight(w)
    with guarded_allocations():
        parts, activated, logits = (f(x, weight) for f in (fixed_gemm.product, fixed_gemm.gate_up_silu, fixed_gemm.logits))
    near(parts.sum(0), want, case.dtype)
    near(activated, silu_mul(want), case.dtype)
    near(logits, want, case.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="an interpreter's sums have another order")
@pytest.mark.parametrize(
    ("run", "n", "k"),
    [(fixed_gemm.product, 5120, 27648), (fixed_gemm.product, 1536, 8960), (fixed_gemm.product, 3584, 18944),
     (fixed_gemm.product, 4608, 3584), (fixed_gemm.gate_up_silu, 37888, 3584), (fixed_gemm.gate_up_silu, 9728, 896),
     (fixed_gemm.logits, 32000, 1024)],
)  # fmt: skip
def test_a_row_has_the_same_bits_among_any_number(run: Any, n: int, k: int) -> None:
    """At the shapes of models, each of which takes other tiles at other numbers of tokens."""
    torch.manual_seed(0)
    x, weight = normal(800, k, dtype=torch.bfloat16), PreparedWeight(normal(n, k, scale=k**-0.5, dtype=torch.bfloat16))

    def first(m: int) -> Tensor:
        y = run(x[:m], weight)
        total = y[0].clone() if y.dim() == 2 else y[0, 0].clone()
        for part in y[1:] if y.dim() == 3 else ():  # in order, as the next kernel adds them
            total += part[0]
        return total

    alone = first(1)
    for m in (2, 16, 17, 33, 64, 65, 96, 128, 129, 200, 800):
        assert torch.equal(first(m), alone), m


@examples(25)
@given(products())
def test_logits(case: Product) -> None:
    x, w, want = case.tensors()
    with guarded_allocations():
        got = gemm.logits(x, PreparedWeight(w))
    near(got, want, case.dtype)


@examples(20)
@given(products(ROWS.map(lambda n: 2 * n)), WIDE_TILES)
def test_gate_up_silu_of_many(case: Product, tile: wide_gemm.WideTile) -> None:
    x, w, want = case.tensors()
    with guarded_allocations():
        got = wide_gemm.gate_up_silu(x, PreparedWeight(w), tile)
    near(got, silu_mul(want), case.dtype)
