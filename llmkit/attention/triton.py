"""Attention with our Triton kernels: one fused kernel for sequences that decode, two for runs of prompt tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from llmkit_kernels import decode_attention, fixed_attention, prefill_attention
from llmkit_kernels.rope_cache import rope_cache
from torch import Tensor

from llmkit.engine.batch import Batch
from llmkit.layers.attention import Attention
from llmkit.layers.rotary import RotaryEmbedding
from llmkit.transfer import send


class TritonBackend:
    """Prepares steps on the GPU; a step mixes `num_decodes` single tokens, which come first, and runs of prompt tokens.

    heads: query heads of a layer.
    """

    name = "triton"

    def __init__(self, kv_cache: Tensor, rotary: RotaryEmbedding, heads: int) -> None:
        self.kv_cache, self.rotary, self.heads = kv_cache, rotary, heads
        pairs = [[prefill_attention.cache_descriptor(c) for c in layer] for layer in kv_cache]
        self.descriptors = None if pairs[0][0] is None else [(k, v) for k, v in pairs]

    def prepare(self, batch: Batch, positions: Tensor, slot_mapping: Tensor) -> TritonStep:
        device, n = self.kv_cache.device, batch.num_decodes
        runs, tables = None, send(batch.block_tables, device)
        if n < len(batch.rows):
            cu_seqlens = send((batch.cu_seqlens[n:] - n).astype(np.int32), device)
            contexts = send(batch.context_lens[n:].astype(np.int32), device)
            sequence, first = send(prefill_attention.query_tiles(batch.num_new[n:]), device).unbind(0)
            runs = PromptRuns(n, cu_seqlens, contexts, (sequence, first), tables[n:])
        return self.step(positions, slot_mapping, self.decodes(positions[:n], tables, None) if n else None, runs)

    def prepare_decode(self, positions: Tensor, block_tables: Tensor, rows: Tensor) -> TritonStep:
        """One token of each of `rows` int64 [B], which find their positions and block tables by row. The host sends nothing."""
        return self.step(positions, positions, self.decodes(positions, block_tables, rows), None)

    def step(self, positions: Tensor, slots: Tensor, decodes: Decodes | None, runs: PromptRuns | None) -> TritonStep:
        """Of what is already on the device."""
        return TritonStep(self.kv_cache, self.rotary, self.descriptors, positions, slots, decodes, runs)

    def decodes(self, positions: Tensor, tables: Tensor, rows: Tensor | None) -> Decodes:
        """Of what is already on the device; as the fields of `Decodes`."""
        count = len(positions if rows is None else rows)
        return Decodes(count, positions, tables, rows, self._scratch(count, tables))

    def _scratch(self, count: int, tables: Tensor) -> Scratch:
        """Where `count` sequences that decode leave partial results."""
        kv_heads, dim = self.kv_cache.shape[3], self.kv_cache.shape[5]
        cut = decode_attention.plan_decode(count, kv_heads, self.kv_cache.itemsize)
        return decode_attention.DecodeScratch(count, self.heads, kv_heads, dim, tables.device, cut)


Scratch = decode_attention.DecodeScratch | fixed_attention.Scratch


@dataclass(slots=True)
class Decodes:
    """The first `count` tokens of a step. positions int64 [R], block_tables int32 [R, blocks]; rows int64 [count], None: as they
    stand. Layers share the scratch."""

    count: int
    positions: Tensor
    block_tables: Tensor
    rows: Tensor | None
    scratch: Scratch


@dataclass(slots=True)
class PromptRuns:
    """Runs of prompt tokens, among a step's tokens from `first` on, from where cu_seqlens int32 [P+1] counts. context_lens: int32
    [P]. tiles: as `prefill` wants them. block_tables: int32 [P, blocks]. With `first` 0 decodes may stand before the first run:
    no run reads or writes their places."""

    first: int
    cu_seqlens: Tensor
    context_lens: Tensor
    tiles: tuple[Tensor, Tensor]
    block_tables: Tensor


@dataclass(slots=True)
class TritonStep:
    """positions, slots: int64 [T]. decodes, runs: None where there are none."""

    kv_cache: Tensor
    rotary: RotaryEmbedding
    descriptors: list[tuple[object, object]] | None
    positions: Tensor
    slots: Tensor
    decodes: Decodes | None
    runs: PromptRuns | None

    def attend(self, layer: Attention, qkv: Tensor) -> Tensor:
        """As `Step.attend`."""
        out = torch.empty(qkv.shape[0], layer.num_heads * layer.head_dim, dtype=qkv.dtype, device=qkv.device)
        if d := self.decodes:
            self.decode(layer, qkv[: d.count], out[: d.count])
        if r := self.runs:
            self.prefill(layer, qkv[r.first :], out[r.first :])
        return out

    def decode(self, layer: Attention, qkv: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """One token a sequence; qkv may be fp32 partial products [S, M, (H+2G)·D] whose bias is still to be added."""
        d = self.decodes
        assert d is not None  # the caller has looked
        assert isinstance(d.scratch, decode_attention.DecodeScratch)  # of the back end that made the step
        k_cache, v_cache = self.kv_cache[layer.layer].unbind(0)
        return decode_attention.fused_decode(
            qkv, bias, layer.norms, self._tables(layer), k_cache, v_cache, d.block_tables, d.positions, d.rows,
            layer.head_dim**-0.5, layer.window, d.scratch, out,
        )  # fmt: skip

    def prefill(self, layer: Attention, qkv: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """The prompt tokens; qkv may be fp32 partial products [S, T, (H+2G)·D] whose bias is still to be added. out: [T, H·D]."""
        assert self.runs is not None  # the caller has looked
        first, dim = self.runs.first, layer.head_dim
        k_cache, v_cache = self.kv_cache[layer.layer].unbind(0)
        places = self.positions[first:], self.slots[first:], k_cache, v_cache
        q = rope_cache(qkv.unflatten(-1, (-1, dim)), layer.norms, self._tables(layer), *places, bias, out.dtype)
        self._attend_runs(layer, q, k_cache, v_cache, out.view(-1, layer.num_heads, dim))
        return out

    def _attend_runs(self, layer: Attention, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> None:
        """Prompt tokens q [n, H, D], rotated, over the cache, which holds their own keys too -> out [n, H, D]."""
        runs = self.runs
        assert runs is not None
        prefill_attention.prefill(
            q, k_cache, v_cache, runs.cu_seqlens, runs.context_lens, runs.block_tables, runs.tiles,
            layer.head_dim**-0.5, layer.window, out, self.descriptors[layer.layer] if self.descriptors else None,
        )  # fmt: skip

    def _tables(self, layer: Attention) -> tuple[Tensor, Tensor] | None:
        return (self.rotary.cos, self.rotary.sin) if layer.rotary else None
