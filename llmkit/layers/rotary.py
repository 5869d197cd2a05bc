"""Rotary position embedding and its scalings for long contexts.

default: RoFormer (arXiv:2104.09864). linear: positions divided by a factor. llama3: Llama 3.1's wavelength-dependent factor.
yarn: arXiv:2309.00071. longrope: arXiv:2402.13753, the Phi-3 long contexts. Oracle: transformers' ROPE_INIT_FUNCTIONS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkit.errors import ConfigError, UnsupportedModelError
from llmkit.models.config import RopeConfig


class RotaryEmbedding:
    """Tables of cos and sin for positions 0..max_len-1, [max_len, dim] in `dtype`, ready for `reference.rotate`."""

    def __init__(self, rope: RopeConfig, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        frequencies, factor = inverse_frequencies(rope, max_len)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.cos = torch.cat((cos, cos), dim=-1).to(device, dtype)
        self.sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, dim] for positions int64 [T]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def inverse_frequencies(rope: RopeConfig, max_len: int) -> tuple[Tensor, float]:
    """Angle per position of each channel pair, float32 [dim/2], and the factor on cos and sin."""
    base = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind not in _SCALINGS:
        raise UnsupportedModelError(f"rope scaling {rope.kind!r} is not supported", f"llmkit has {', '.join(_SCALINGS)}")
    try:
        return _SCALINGS[rope.kind](base, rope, max_len)
    except KeyError as e:
        raise ConfigError(f"config.json: rope scaling {rope.kind!r} needs the field {e.args[0]!r}") from e


def _default(base: Tensor, rope: RopeConfig, max_len: int) -> tuple[Tensor, float]:
    return base, 1.0


def _linear(base: Tensor, rope: RopeConfig, max_len: int) -> tuple[Tensor, float]:
    return base / rope.scaling["factor"], 1.0


def _llama3(base: Tensor, rope: RopeConfig, max_len: int) -> tuple[Tensor, float]:
    """Short wavelengths stay, long ones are divided by `factor`, those between are blended."""
    s, original = rope.scaling, rope.original_max_position
    low, high, factor = s["low_freq_factor"], s["high_freq_factor"], s["factor"]
    turns = original * base / (2 * math.pi)  # rotations within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return base / factor * (1 - smooth) + base * smooth, 1.0


def _yarn(base: Tensor, rope: RopeConfig, max_len: int) -> tuple[Tensor, float]:
    """Interpolate slow channels, keep fast ones, ramp between; cos and sin grow by the attention factor."""
    s, factor = rope.scaling, rope.scaling.get("factor") or rope.stretch

    def channel(rotations: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(s.get("beta_fast") or 32), channel(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp), _yarn_attention(s, factor)


def _yarn_attention(s: dict, factor: float) -> float:
    def mscale(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    if s.get("mscale") and s.get("mscale_all_dim"):
        return mscale(factor, s["mscale"]) / mscale(factor, s["mscale_all_dim"])
    return mscale(factor)


def _longrope(base: Tensor, rope: RopeConfig, max_len: int) -> tuple[Tensor, float]:
    """One list of factors for short contexts, one for long; the engine's context length decides, once."""
    s, original = rope.scaling, rope.original_max_position
    factors = torch.tensor(s["long_factor" if max_len > original else "short_factor"], dtype=torch.float32)
    stretch = s.get("factor") or rope.stretch
    if s.get("attention_factor") is not None:
        attention = float(s["attention_factor"])
    else:
        attention = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return base / factors, attention


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
