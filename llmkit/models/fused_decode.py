"""A decode step in seven kernels a layer: the same numbers as `Decoder.forward` and `Decoder.logits`, for one token a sequence.

norm (sums the partial products before it, adds them to the residual) · qkv product · attention (sums, bias, q/k norm, rotation,
KV write, attention) · output product · norm · gate/up product with SiLU · down product. Products of few tokens are read-bound
and use our kernels, whose partial results the next kernel sums; of many, cuBLAS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from llmkit_kernels import gemm, norm
from torch import Tensor

from llmkit.attention import fits_kernels
from llmkit.attention.triton import TritonStep
from llmkit.layers.linear import Linear
from llmkit.layers.norm import RMSNorm
from llmkit.models.decoder import Decoder


class FusedDecode:
    """Runs decode steps of one decoder; holds no weights of its own."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.layers = [
            (layer, *(_skinny(m) for m in (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)))
            for layer in model.layers
        ]
        self.head = _skinny(model.lm_head.project)

    @staticmethod
    def supports(model: Decoder) -> bool:
        """Whether the decoder has the shape of these kernels: whole heads rotated, gate/up in pairs, biases only in q/k/v."""
        c = model.config
        return not (c.o_bias or c.mlp_bias) and model.layers[0].mlp.pairs and fits_kernels(c.head_dim, model.rotary)

    def __call__(self, tokens: Tensor, rows: Tensor, step: TritonStep) -> Tensor:
        """tokens int64 [R], the newest of each row; rows int64 [B], those that take part -> logits fp32 [B, vocabulary]."""
        first = self.layers[0][0].input_norm
        residual, x = norm.embed_rms_norm(self.model.embedding.weight, tokens, rows, first.weight, first.eps)
        out = torch.empty(len(rows), self.model.attention_width, dtype=residual.dtype, device=residual.device)
        for layer, qkv, o, gate_up, down in self.layers:
            if layer.input_norm is not first:
                x = self._norm(layer.input_norm, x, residual)
            step.decode(layer.attention, self._product(x, qkv), out, layer.attention.qkv.bias)
            x = self._norm(layer.post_norm, self._product(out, o), residual)
            x = self._product(gemm.gate_up_silu(x, gate_up), down)
        return self._logits(self._norm(self.model.norm, x, residual))

    @staticmethod
    def _norm(layer: RMSNorm, x: Tensor, residual: Tensor) -> Tensor:
        return norm.add_rms_norm(x, residual, layer.weight, layer.eps)

    @staticmethod
    def _product(x: Tensor, weight: gemm.SkinnyWeight) -> Tensor:
        """Partial products fp32 [S, B, N], or the product [B, N]; a bias is left to the next kernel."""
        return gemm.partial_products(x, weight) if gemm.beats_cublas(weight, len(x)) else F.linear(x, weight.weight)

    def _logits(self, x: Tensor) -> Tensor:
        return gemm.logits(x, self.head) if len(x) <= gemm.MOST_TOKENS else self.model.logits(x)


def _skinny(linear: Linear) -> gemm.SkinnyWeight:
    if linear.weight is None:
        raise TypeError("a packed weight cannot be read by GPU kernels")
    return gemm.SkinnyWeight(linear.weight)
