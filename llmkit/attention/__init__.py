"""Attention back ends behind one interface: a back end prepares a step once, and every layer then asks that step to attend.

reference: plain torch, any device. triton: our kernels, on a GPU. varlen: torch's flash attention over blocks, on a GPU.
flash: flash_attn for prompts beside our kernels for decoding. fixed: our kernels for deterministic=True. choice: which of them,
and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from llmkit import ops

if TYPE_CHECKING:
    from llmkit.attention.choice import Choice
    from llmkit.engine.batch import Batch
    from llmkit.layers.attention import Attention
    from llmkit.layers.rotary import RotaryEmbedding


class Step(Protocol):
    """One step's attention."""

    def attend(self, layer: Attention, qkv: Tensor) -> Tensor:
        """qkv [T, (H+2G)·D], fresh from the product -> [T, H·D]. Norms and rotates q and k, stores k and v, attends."""
        ...


class Backend(Protocol):
    """Knows the KV cache [layers, 2, num_blocks, G, block_size, D], of the model's dtype or float8, and how to attend over it."""

    name: str

    def prepare(self, batch: Batch, positions: Tensor, slot_mapping: Tensor) -> Step:
        """Describe a step: its positions and slots are int64 [T], already on the device."""
        ...


def fits_kernels(head_dim: int, rotary: RotaryEmbedding) -> bool:
    """Whether our kernels can attend: heads of 32, 64, 128 or 256 numbers, wholly rotated."""
    return head_dim in (32, 64, 128, 256) and rotary.cos.shape[1] == head_dim


def create_backend(
    kv_cache: Tensor, rotary: RotaryEmbedding, heads: int, windows: set[int | None], choice: Choice | None = None
) -> Backend:
    """The back end that was chosen; without a choice, our kernels or plain torch."""
    fits = ops.has_kernels(kv_cache.device, rotary.cos.dtype) and fits_kernels(kv_cache.shape[-1], rotary)
    name = choice.name if choice else "triton" if fits else "torch"
    if name == "triton":
        from llmkit.attention.triton import TritonBackend

        return TritonBackend(kv_cache, rotary, heads)
    if name == "fixed":
        from llmkit.attention.fixed import FixedBackend

        return FixedBackend(kv_cache, rotary, heads)
    if name == "flash_attn":
        from llmkit.attention.flash import FlashBackend

        return FlashBackend(kv_cache, rotary, heads)
    if choice and choice.paged:
        from llmkit.attention.varlen import VarlenBackend

        return VarlenBackend(kv_cache, rotary, windows)
    from llmkit.attention.reference import ReferenceBackend

    return ReferenceBackend(kv_cache, rotary, windows)


__all__ = ["Backend", "Step", "create_backend", "fits_kernels"]
