"""A step in seven or eight kernels a layer: the same numbers as `Decoder.forward` and `Decoder.logits`, for few tokens, be they
one of each sequence or prompts.

norm (sums the partial products before it, adds them to the residual) · qkv product · attention (sums, bias, q/k norm, rotation,
KV write, attention; for prompts two kernels) · output product · norm · gate/up product with SiLU · down product. Products of few
tokens are read-bound and use our kernels, whose partial results the next kernel sums; of many, cuBLAS. Every kernel of the chain
begins while the one before it ends, which is why a short prompt, too, is quicker this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from llmkit_kernels import gemm, norm
from llmkit_kernels.prepared import PreparedWeight
from torch import Tensor

from llmkit.attention import fits_kernels
from llmkit.attention.triton import TritonStep
from llmkit.layers.attention import Attention
from llmkit.layers.linear import Linear
from llmkit.layers.norm import RMSNorm
from llmkit.models.decoder import Decoder

_MOST_PROMPT_TOKENS = gemm.MOST_TOKENS  # of a step; `Decoder.forward` is quicker with more
Attend = Callable[[Attention, Tensor, Tensor, Tensor | None], Tensor]


class FusedForward:
    """Runs the steps of one decoder, small ones fused; holds no weights of its own."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.layers = [
            (layer, *(_prepared(m) for m in (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)))
            for layer in model.layers
        ]
        self.head = _prepared(model.lm_head.project)

    @staticmethod
    def supports(model: Decoder) -> bool:
        """Whether the decoder has the shape of these kernels: whole heads rotated, gate/up in pairs, biases only in q/k/v."""
        c = model.config
        return not (c.o_bias or c.mlp_bias) and model.layers[0].mlp.pairs and fits_kernels(c.head_dim, model.rotary)

    @contextmanager
    def one_layer_of_each_kind(self) -> Iterator[None]:
        """In this block passes go through so few layers: they mean nothing, but use every kernel."""
        mine, all_of_them = self.layers, self.model.layers
        firsts: dict[tuple[int | None, bool], int] = {}
        for i, layer in enumerate(all_of_them):
            firsts.setdefault((layer.attention.window, layer.attention.rotary), i)
        self.layers, self.model.layers = [mine[i] for i in firsts.values()], [all_of_them[i] for i in firsts.values()]
        try:
            yield
        finally:
            self.layers, self.model.layers = mine, all_of_them

    def decode(self, tokens: Tensor, rows: Tensor, step: TritonStep, out: Tensor) -> Tensor:
        """tokens int64 [R], the newest of each row; rows int64 [B], those that take part -> logits in `out`, fp32
        [B, vocabulary]."""
        return self.logits(self._layers(tokens, rows, step.decode), out)

    def forward(self, input_ids: Tensor, step: TritonStep) -> Tensor:
        """As `Decoder.forward`."""
        if step.decodes or len(input_ids) > _MOST_PROMPT_TOKENS:
            return self.model.forward(input_ids, step)
        return self._layers(input_ids, None, step.prefill)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, hidden] -> fp32 [R, vocabulary]."""
        return gemm.logits(hidden, self.head, out) if len(hidden) <= gemm.MOST_OF_HEAD else self.model.logits(hidden, out)

    def _layers(self, tokens: Tensor, rows: Tensor | None, attend: Attend) -> Tensor:
        first = self.layers[0][0].input_norm
        residual, x = norm.embed_rms_norm(self.model.embedding.weight, tokens, rows, first.weight, first.eps)
        out = torch.empty(len(x), self.model.attention_width, dtype=residual.dtype, device=residual.device)
        for layer, qkv, o, gate_up, down in self.layers:
            if layer.input_norm is not first:
                x = self._norm(layer.input_norm, x, residual)
            attend(layer.attention, self._product(x, qkv), out, layer.attention.qkv.bias)
            x = self._norm(layer.post_norm, self._product(out, o), residual)
            x = self._product(self._gate_up(x, gate_up), down)
        return self._norm(self.model.norm, x, residual)

    @staticmethod
    def _norm(layer: RMSNorm, x: Tensor, residual: Tensor) -> Tensor:
        return norm.add_rms_norm(x, residual, layer.weight, layer.eps)

    @staticmethod
    def _gate_up(x: Tensor, weight: PreparedWeight) -> Tensor:
        return gemm.gate_up_silu(x, weight)

    @staticmethod
    def _product(x: Tensor, weight: PreparedWeight) -> Tensor:
        """Partial products fp32 [S, B, N], or the product [B, N]; a bias is left to the next kernel."""
        return gemm.partial_products(x, weight) if gemm.beats_cublas(weight, len(x)) else F.linear(x, weight.weight)


def _prepared(linear: Linear) -> PreparedWeight:
    if linear.weight is None:
        raise TypeError("a packed weight cannot be read by GPU kernels")
    return PreparedWeight(linear.weight)
