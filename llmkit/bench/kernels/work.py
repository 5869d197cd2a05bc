"""What a measured kernel is: how it is launched, what must come out, and what that needs at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmkit.layers.rotary import RotaryEmbedding
from llmkit.models.config import ModelConfig

LONGEST = 8192  # tokens of a sequence
_MOST_COPIES = 512


@dataclass
class Work:
    """One kernel at one size.

    run: launches it on copy i of its inputs. copies: how many there are, so many that the second-level cache keeps none from one
    launch to the next, as in a step of a whole model. size: bytes that must be read and written; flops: that must be computed.
    want: what must come out, by plain torch in float32; None where chance decides. result: of what `run` gave the first time,
    that which is compared with it. by_torch: torch's own way to the same.
    """

    run: Callable[[int], Tensor]
    copies: int
    size: int
    flops: int = 0
    want: Callable[[], Tensor] | None = None
    result: Callable[[Tensor], Tensor] = torch.clone
    by_torch: Callable[[int], Tensor] | None = None

    def error(self) -> float | None:
        """Relative distance of what the first launch left from what is wanted; NaN where a place was never written."""
        got = self.result(self.run(0)).double()
        if self.want is None:
            return None
        want = self.want().double()
        return float((got - want).norm() / want.norm().clamp_min(1e-12))


@dataclass
class Inputs:
    """Random inputs of one model's shape. rotate: bytes over which they rotate."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    rotate: int

    def copies(self, size: int) -> int:
        """Of something of `size` bytes."""
        return max(1, min(_MOST_COPIES, -(-self.rotate // size)))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype).mul_(scale)

    def poisoned(self, *shape: int) -> Tensor:
        """NaN until it is written."""
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    @property
    def float8(self) -> bool:
        """Whether the device rounds to it: a GPU of compute capability 8.9 or more. Triton's interpreter cuts off."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 9)

    @property
    def qkv_width(self) -> int:
        return self.config.head_dim * (self.config.num_heads + 2 * self.config.num_kv_heads)

    @cached_property
    def bias(self) -> Tensor | None:
        """Of the merged q/k/v."""
        return self.normal(self.qkv_width) if self.config.qkv_bias else None

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor, float] | None:
        """q and k norm weights, eps."""
        c = self.config
        return (self.normal(c.head_dim), self.normal(c.head_dim), c.norm_eps) if c.qk_norm else None

    @cached_property
    def rope(self) -> tuple[Tensor, Tensor]:
        """cos and sin [LONGEST, D]."""
        table = RotaryEmbedding(self.config.rope, LONGEST, self.dtype, self.device)
        return table.cos, table.sin
