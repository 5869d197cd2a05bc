"""Attention back ends behind one interface: a back end prepares a step once, and every layer then asks that step to attend.

reference: plain torch, any device. triton: our kernels, on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from llmkit import ops

if TYPE_CHECKING:
    from llmkit.engine.batch import Batch
    from llmkit.layers.attention import Attention
    from llmkit.layers.rotary import RotaryEmbedding


class Step(Protocol):
    """One step's attention."""

    def attend(self, layer: Attention, qkv: Tensor) -> Tensor:
        """qkv [T, (H+2G)·D], fresh from the product -> [T, H·D]. Norms and rotates q and k, stores k and v, attends."""
        ...


class Backend(Protocol):
    """Knows the KV cache [layers, 2, num_blocks, G, block_size, D] and how to attend over it."""

    name: str

    def prepare(self, batch: Batch, positions: Tensor, slot_mapping: Tensor) -> Step:
        """Describe a step: its positions and slots are int64 [T], already on the device."""
        ...


def fits_kernels(head_dim: int, rotary: RotaryEmbedding) -> bool:
    """Whether our kernels can attend: heads of 32, 64, 128 or 256 numbers, wholly rotated."""
    return head_dim in (32, 64, 128, 256) and rotary.cos.shape[1] == head_dim


def create_backend(kv_cache: Tensor, rotary: RotaryEmbedding, windows: set[int | None]) -> Backend:
    """The best back end for the cache's device."""
    if ops.has_kernels(kv_cache.device, kv_cache.dtype) and fits_kernels(kv_cache.shape[-1], rotary):
        from llmkit.attention.triton import TritonBackend

        return TritonBackend(kv_cache, rotary)
    from llmkit.attention.reference import ReferenceBackend

    return ReferenceBackend(kv_cache, rotary, windows)


__all__ = ["Backend", "Step", "create_backend", "fits_kernels"]
