"""Which kernels at which sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from llmkit_kernels.gemm import MOST_OF_HEAD

from llmkit.bench.kernels import attention, choosing, products
from llmkit.bench.kernels.work import Inputs, Work


@dataclass(frozen=True)
class Sizes:
    """batches: sequences that decode. contexts: tokens of each. prompts: (count, length). many: tokens of a step of prompts.
    rotate: bytes over which inputs rotate."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]
    many: tuple[int, ...]
    rotate: int


FULL = Sizes((1, 8, 32, 128, 256), (256, 2048), ((1, 1024), (1, 8192), (16, 1024)), (1024, 8192), 256 << 20)
SMALL = Sizes((1, 3), (70,), ((2, 40),), (150,), 1)


def cases(given: Inputs, sizes: Sizes) -> dict[str, Callable[[], Work]]:
    """Name -> how to make the work, of every kernel and size, in the order of a step."""
    c, batches = given.config, sizes.batches
    found: dict[str, Callable[[], Work]] = {}
    shapes = {"qkv": (given.qkv_width, c.hidden_size), "output": (c.hidden_size, c.num_heads * c.head_dim),
              "down": (c.hidden_size, c.intermediate_size)}  # fmt: skip
    for m in (*batches, *sizes.many):
        found[f"norm-{m}"] = lambda m=m: products.add_norm(given, m)
    for name, (n, k) in shapes.items():
        for m in batches:
            found[f"{name}-{m}"] = lambda n=n, k=k, m=m: products.product(given, n, k, m)
    for m in (*batches, *sizes.many):
        found[f"gate-up-{m}"] = lambda m=m: products.gate_up(given, m)
    for context in sizes.contexts:
        for m in batches:
            found[f"attention-decode-{m}x{context}"] = lambda m=m, n=context: attention.decode(given, m, n)
            if given.float8:
                narrow = lambda m=m, n=context: attention.decode(given, m, n, torch.float8_e4m3fn)
                found[f"attention-decode-float8-{m}x{context}"] = narrow
    for m in sizes.many:
        found[f"rotate-and-store-{m}"] = lambda m=m: attention.rotate_and_store(given, m)
    for count, length in sizes.prompts:
        found[f"attention-prefill-{count}x{length}"] = lambda s=count, n=length: attention.prefill(given, s, n)
    for m in batches:
        if m <= MOST_OF_HEAD:
            found[f"head-{m}"] = lambda m=m: products.head(given, m)
    for m in batches:
        found[f"penalise-{m}"] = lambda m=m: choosing.penalise(given, m)
        found[f"keep-{m}"] = lambda m=m: choosing.keep(given, m)
        found[f"greedy-{m}"] = lambda m=m: choosing.draw(given, m, 0.0)
        found[f"draw-{m}"] = lambda m=m: choosing.draw(given, m, 0.6)
    return found
