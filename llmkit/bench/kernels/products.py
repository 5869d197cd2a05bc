"""Products with a model's weights, and the norm that sums their partial results."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from llmkit_kernels import activation, gemm, norm, reference
from llmkit_kernels.prepared import PreparedWeight
from torch import Tensor

from llmkit.bench.kernels.work import Inputs, Work


def product(given: Inputs, n: int, k: int, m: int) -> Work:
    """x [m, k] · W [n, k]ᵀ, as partial results that the next kernel sums."""
    return _product(given, n, k, m, gemm.partial_products, F.linear, result=lambda parts: parts.sum(0))


def gate_up(given: Inputs, m: int) -> Work:
    """silu(gate) · up."""

    def by_torch(x: Tensor, weight: Tensor) -> Tensor:
        return activation.silu_mul_pairs(F.linear(x, weight))

    def after(both: Tensor) -> Tensor:
        gate, up = both.unflatten(1, (-1, 2)).unbind(2)
        return F.silu(gate) * up

    c = given.config
    return _product(given, 2 * c.intermediate_size, c.hidden_size, m, gemm.gate_up_silu, by_torch, after)


def head(given: Inputs, m: int) -> Work:
    """Logits, in float32."""
    c = given.config
    return _product(given, c.vocab_size, c.hidden_size, m, gemm.logits, lambda x, weight: F.linear(x, weight).float())


def _product(
    given: Inputs, n: int, k: int, m: int, ours: Callable[[Tensor, PreparedWeight], Tensor],
    by_torch: Callable[[Tensor, Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda y: y,
    result: Callable[[Tensor], Tensor] = torch.clone,
) -> Work:  # fmt: skip
    """`after` of the product is what is wanted."""
    x, count = given.normal(m, k), given.copies(n * k * given.dtype.itemsize)
    weights = [PreparedWeight(given.normal(n, k, scale=k**-0.5)) for _ in range(count)]

    def want() -> Tensor:
        return after(x.float() @ weights[0].weight.float().T)

    written = result(ours(x, weights[0])).nbytes
    return Work(
        lambda i: ours(x, weights[i % count]), count, weights[0].weight.nbytes + x.nbytes + written, 2 * m * n * k, want, result,
        lambda i: by_torch(x, weights[i % count].weight),
    )  # fmt: skip


def add_norm(given: Inputs, m: int) -> Work:
    """residual += x and the norm of that; of few tokens x comes as two partial products."""
    width, few = given.config.hidden_size, m <= gemm.MOST_TOKENS
    x = given.normal(2, m, width, dtype=torch.float32) if few else given.normal(m, width)
    copies = given.copies(x.nbytes)
    xs, residuals = [x.clone() for _ in range(copies)], [given.normal(m, width) for _ in range(copies)]
    weight, out, before = given.normal(width), given.poisoned(m, width), residuals[0].clone()

    def run(i: int) -> Tensor:
        return norm.add_rms_norm(xs[i % copies], residuals[i % copies], weight, given.config.norm_eps, out)

    def want() -> Tensor:
        total = (x.sum(0) if few else x).to(given.dtype).float() + before.float()
        return reference.rms_norm(total, weight.float(), given.config.norm_eps)

    return Work(run, copies, x.nbytes + 3 * before.nbytes, want=want)
