"""One decoder for the Llama family: Llama, Mistral, Qwen2/2.5, Qwen3, SmolLM2/3, Phi-3, by config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit import ops
from llmkit.attention import Step
from llmkit.attention.choice import Choice
from llmkit.layers.attention import Attention
from llmkit.layers.embedding import Embedding, LMHead
from llmkit.layers.linear import Linear
from llmkit.layers.mlp import GatedMLP
from llmkit.layers.norm import RMSNorm
from llmkit.layers.rotary import RotaryEmbedding
from llmkit.models.config import ModelConfig
from llmkit.models.reader import Reader
from llmkit.models.weights import WeightSource


@dataclass
class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    input_norm: RMSNorm
    attention: Attention
    post_norm: RMSNorm
    mlp: GatedMLP

    def __call__(self, x: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """x is still to be added to the residual stream; so is the first of the two results."""
        x, residual = self.input_norm.add(x, residual)
        x, residual = self.post_norm.add(self.attention(x, step), residual)
        return self.mlp(x), residual


class Decoder:
    """Embedding, layers, final norm, output matrix. Built straight from a weight source: no empty model is made first.

    reader: fills the parameters when it is run, after this; without one they are filled here.
    attention: who computes it; None is our kernels where they can, else plain torch.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        max_len: int,
        reader: Reader | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.attention: Choice | None = None
        load = _Loader(config, weights, dtype, device, reader)
        self.rotary = RotaryEmbedding(config.rope, max_len, dtype, device)
        embedding = load.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.embedding = Embedding(embedding)
        self.layers = [load.layer(i) for i in range(config.num_layers)]
        self.norm = load.norm("model.norm.weight", config.hidden_size)
        tied = config.tie_embeddings or not weights.has("lm_head.weight")
        head = embedding if tied else load.tensor("lm_head.weight", config.vocab_size, config.hidden_size)
        self.lm_head = LMHead(head)
        weights.release()
        self.weight_bytes = load.bytes
        self.attention_width = config.num_heads * config.head_dim

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the KV cache: the model's own, or what was chosen."""
        return (self.attention.kv_dtype if self.attention else None) or self.dtype

    def forward(self, input_ids: Tensor, step: Step) -> Tensor:
        """input_ids: int64 [T] -> hidden states [T, hidden], normed. Writes the step's keys and values."""
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, hidden] -> float32 [R, vocab], in `out` if it is given."""
        return self.lm_head(hidden, out)


class _Loader:
    """Pulls tensors by their checkpoint names, checks their shapes against the config, merges and places them."""

    def __init__(
        self, config: ModelConfig, weights: WeightSource, dtype: torch.dtype, device: torch.device, reader: Reader | None
    ) -> None:
        self.config, self.weights, self.dtype, self.device, self.reader = config, weights, dtype, device, reader
        self.bytes = 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._merged([name], [shape])

    def norm(self, name: str, size: int) -> RMSNorm:
        return RMSNorm(self.tensor(name, size), self.config.norm_eps)

    def linear(self, names: list[str], rows: list[int], columns: int, bias: bool, interleaved: bool = False) -> Linear:
        """One matrix from several of `rows` rows each, stacked; or, of two halves, taken row by row in turn."""
        weight = self._merged([f"{n}.weight" for n in names], [(r, columns) for r in rows], interleaved)
        return Linear(weight, self._merged([f"{n}.bias" for n in names], [(r,) for r in rows], interleaved) if bias else None)

    def _merged(self, names: list[str], shapes: list[tuple[int, ...]], interleaved: bool = False) -> Tensor:
        placed = (self._queued if self.reader else self._copied)(names, shapes, interleaved)
        self.bytes += placed.nbytes
        return placed

    def _copied(self, names: list[str], shapes: list[tuple[int, ...]], interleaved: bool) -> Tensor:
        parts = [self.weights.get(name, shape) for name, shape in zip(names, shapes)]
        merged = parts[0] if len(parts) == 1 else torch.cat([p.to(self.dtype) for p in parts])
        placed = merged.to(self.device, self.dtype)
        return torch.stack(placed.chunk(2), dim=1).flatten(0, 1) if interleaved else placed

    def _queued(self, names: list[str], shapes: list[tuple[int, ...]], interleaved: bool) -> Tensor:
        """Memory that the reader will fill: each file's tensor has its slice of it."""
        assert self.reader is not None  # the caller has looked
        rows = [shape[0] for shape in shapes]
        placed = torch.empty(sum(rows), *shapes[0][1:], dtype=self.dtype, device=self.device)
        if interleaved:
            halves = placed.view(-1, 2, *placed.shape[1:]).transpose(0, 1)
            slices = [halves] if len(names) == 1 else list(halves)
        else:
            slices = placed.split(rows)
        for name, shape, target in zip(names, shapes, slices):
            self.reader.read(name, shape, target)
        return placed

    def layer(self, i: int) -> DecoderLayer:
        c, prefix = self.config, f"model.layers.{i}."
        layer = DecoderLayer(
            input_norm=self.norm(prefix + "input_layernorm.weight", c.hidden_size),
            attention=self._attention(i, prefix + "self_attn."),
            post_norm=self.norm(prefix + "post_attention_layernorm.weight", c.hidden_size),
            mlp=self._mlp(prefix + "mlp."),
        )
        self.weights.release()  # a packed or merged matrix needs its file no more
        return layer

    def _attention(self, i: int, prefix: str) -> Attention:
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        names, rows = (["qkv_proj"], [q + 2 * kv]) if c.fused_checkpoint else (["q_proj", "k_proj", "v_proj"], [q, kv, kv])
        return Attention(
            layer=i,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            qkv=self.linear([prefix + n for n in names], rows, c.hidden_size, c.qkv_bias),
            o=self.linear([prefix + "o_proj"], [c.hidden_size], q, c.o_bias),
            q_norm=self.norm(prefix + "q_norm.weight", c.head_dim) if c.qk_norm else None,
            k_norm=self.norm(prefix + "k_norm.weight", c.head_dim) if c.qk_norm else None,
            window=c.windows[i],
            rotary=c.rotary_layers[i],
        )

    def _mlp(self, prefix: str) -> GatedMLP:
        c = self.config
        size = c.intermediate_size
        names, rows = (["gate_up_proj"], [2 * size]) if c.fused_checkpoint else (["gate_proj", "up_proj"], [size, size])
        pairs = ops.has_kernels(self.device, self.dtype)
        gate_up = self.linear([prefix + n for n in names], rows, c.hidden_size, c.mlp_bias, interleaved=pairs)
        return GatedMLP(gate_up, pairs, self.linear([prefix + "down_proj"], [c.hidden_size], size, c.mlp_bias))
