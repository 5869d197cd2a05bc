"""Attention for `deterministic=True`: our kernels that add up in an order of their own, whatever the batch."""

from __future__ import annotations

from llmkit_kernels import fixed_attention
from llmkit_kernels.rope_cache import rope_cache
from torch import Tensor

from llmkit.attention.triton import Decodes, PromptRuns, TritonBackend, TritonStep
from llmkit.layers.attention import Attention


class FixedBackend(TritonBackend):
    """As its parent; its steps attend for all their tokens at once."""

    name = "fixed"

    def prepare_decode(self, positions: Tensor, block_tables: Tensor, rows: Tensor) -> TritonStep:
        """As its parent; says of each token, too, where it stands and where its key belongs."""
        size = self.kv_cache.shape[4]
        own = positions[rows]
        slots = block_tables[rows, own // size].long() * size + own % size
        return self.step(own, slots, self.decodes(positions, block_tables, rows), None)

    def step(self, positions: Tensor, slots: Tensor, decodes: Decodes | None, runs: PromptRuns | None) -> FixedStep:
        """As its parent."""
        return FixedStep(self.kv_cache, self.rotary, self.descriptors, positions, slots, decodes, runs)

    def _scratch(self, count: int, tables: Tensor) -> fixed_attention.Scratch:
        kv_heads, size, dim = self.kv_cache.shape[3:]
        return fixed_attention.Scratch(count, self.heads, kv_heads, dim, tables.shape[1] * size, tables.device)


class FixedStep(TritonStep):
    """One call attends for all tokens."""

    def attend_all(self, layer: Attention, qkv: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        """qkv: fp32 partial products [S, T, (H+2G)·D]. out: [T, H·D]."""
        dim, scale = layer.head_dim, layer.head_dim**-0.5
        k_cache, v_cache = self.kv_cache[layer.layer].unbind(0)
        parts = qkv.unflatten(-1, (-1, dim))
        places = self.positions, self.slots, k_cache, v_cache
        q = rope_cache(parts, layer.norms, self._tables(layer), *places, bias, out.dtype)
        descriptors = self.descriptors[layer.layer] if self.descriptors else None
        if d := self.decodes:
            assert isinstance(d.scratch, fixed_attention.Scratch)  # made by `FixedBackend`
            fixed_attention.decode(
                q[: d.count], k_cache, v_cache, d.block_tables, d.positions, d.rows, scale, layer.window, d.scratch,
                out[: d.count], descriptors,
            )  # fmt: skip
        if r := self.runs:
            fixed_attention.prefill(
                q[r.first :], k_cache, v_cache, r.cu_seqlens, r.context_lens, r.block_tables, r.tiles, scale, layer.window,
                out[r.first :].unflatten(-1, (-1, dim)), descriptors,
            )  # fmt: skip
        return out
