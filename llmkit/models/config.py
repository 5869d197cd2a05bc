"""config.json, read into the one shape that the decoder understands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError, UnsupportedModelError, did_you_mean


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `scaling` holds config.json's own words (`factor`, `low_freq_factor`, ...), `kind` its rope_type.

    stretch: the model's longest context over the one it was first trained with, the factor where config.json names none.
    """

    theta: float
    dim: int
    kind: str
    scaling: dict[str, Any]
    original_max_position: int
    stretch: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder, described by sizes and switches. Sizes are counts; `dtype` is the one the weights were made in."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    fused_checkpoint: bool  # q/k/v and gate/up already merged in the file (Phi-3)
    windows: tuple[int | None, ...]  # per layer: sliding window in tokens, None = full attention
    rotary_layers: tuple[bool, ...]  # per layer: False = no rotary embedding (SmolLM3)
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """Elements of keys and values one token stores, all layers (multiply by the dtype's size for bytes)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights, embeddings counted once when tied."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + self.hidden_size

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read folder/config.json; ConfigError or UnsupportedModelError name the file and the field."""
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], path: Path | str = "config.json") -> ModelConfig:
        """Read an already parsed config.json; `path` is named in errors."""
        return _Reader(raw, str(path)).read()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError that names the file when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(f"{path} does not exist", "a model folder needs config.json, tokenizer.json and *.safetensors") from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}", "fetch the model again; the file is damaged") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, not a JSON object", "fetch the model again; the file is damaged")
    return value


# What the families differ in. Everything else is read from config.json; `silent` is what a family means where that says nothing
# (transformers' own defaults: a config.json may leave them out).
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"bias": "attention"},
    "MistralForCausalLM": {
        "window": "all",
        "silent": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    },
    "Qwen2ForCausalLM": {
        "bias": "qkv",
        "window": "upper",
        "silent": {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
    },
    "Qwen3ForCausalLM": {
        "bias": "attention",
        "window": "upper",
        "qk_norm": True,
        "silent": {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
    },
    "SmolLM3ForCausalLM": {
        "bias": "attention",
        "window": "unrotated",
        "silent": {"tie_word_embeddings": True, "rope_theta": 2e6, "num_key_value_heads": 4, "max_position_embeddings": 32768},
    },
    "Phi3ForCausalLM": {
        "window": "all",
        "fused": True,
        "silent": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    },
}
ARCHITECTURES = tuple(_FAMILIES)
_MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3", "phi3": "Phi3"}


class _Reader:
    """Reads one config.json, field by field, with errors that say which."""

    def __init__(self, raw: dict[str, Any], path: str) -> None:
        self.raw, self.path = raw, path
        self.architecture = self._architecture()
        self.family = _FAMILIES[self.architecture]
        self.raw = self.family.get("silent", {}) | raw

    def _architecture(self) -> str:
        names = self.raw.get("architectures") or []
        if not names and self.raw.get("model_type") in _MODEL_TYPES:
            names = [f"{_MODEL_TYPES[self.raw['model_type']]}ForCausalLM"]
        name = names[0] if isinstance(names, list) and names else None
        if name in _FAMILIES:
            return name
        near = did_you_mean(str(name), ARCHITECTURES)
        raise UnsupportedModelError(
            f"{self.path}: architecture {name!r} is not supported" if name else f"{self.path} names no architecture",
            f"llmkit runs {', '.join(ARCHITECTURES)}" + (f"; {near} is the nearest" if near and name else ""),
        )

    def number(self, name: str, default: Any = None, low: float = 1) -> Any:
        """A number field; `default=None` makes it obligatory. Whole floats are accepted for counts."""
        value = self.raw.get(name, default)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.path}: {name!r} is missing", "the file is incomplete; fetch the model again")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
            raise ConfigError(f"{self.path}: {name!r} must be a number of at least {low:g}; it is {value!r}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if value != int(value):
            raise ConfigError(f"{self.path}: {name!r} must be a whole number; it is {value!r}")
        return int(value)

    def read(self) -> ModelConfig:
        raw, family = self.raw, self.family
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedModelError(f"{self.path}: weights are quantised ({method}), which llmkit cannot read",
                                        "use the model's unquantised version or a GGUF file of it")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModelError(f"{self.path}: activation {raw['hidden_act']!r} is not supported", "llmkit has silu")
        hidden, heads, layers = self.count("hidden_size"), self.count("num_attention_heads"), self.count("num_hidden_layers")
        kv_heads = self.count("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(f"{self.path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = self.count("head_dim", hidden // heads)
        attention_bias = bool(raw.get("attention_bias", False)) and family.get("bias") == "attention"
        return ModelConfig(
            architecture=self.architecture, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, intermediate_size=self.count("intermediate_size"), vocab_size=self.count("vocab_size"),
            max_position=self.count("max_position_embeddings", 2048), norm_eps=float(self.number("rms_norm_eps", 1e-6, 0)),
            rope=self._rope(head_dim),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family.get("bias") == "qkv", o_bias=attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)), qk_norm=bool(family.get("qk_norm", False)),
            fused_checkpoint=bool(family.get("fused", False)), windows=self._windows(layers),
            rotary_layers=self._rotary_layers(layers), dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            eos_token_ids=_ids(raw.get("eos_token_id")),
        )  # fmt: skip

    def _rope(self, head_dim: int) -> RopeConfig:
        """transformers 5 writes rope_parameters, older files rope_theta and rope_scaling."""
        scaling = dict(self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {})
        kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
        kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
        theta = scaling.get("rope_theta") or self.raw.get("rope_theta") or 10000.0
        partial = scaling.get("partial_rotary_factor") or self.raw.get("partial_rotary_factor") or 1.0
        longest = self.count("max_position_embeddings", 2048)
        original = self.raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings") or longest
        return RopeConfig(float(theta), int(head_dim * partial), kind, scaling, int(original), longest / original)

    def _windows(self, layers: int) -> tuple[int | None, ...]:
        window, kind = self.raw.get("sliding_window"), self.family.get("window")
        if not window or kind is None or (kind != "all" and not self.raw.get("use_sliding_window", False)):
            return (None,) * layers
        if kind == "all":
            slides = [True] * layers
        elif self.raw.get("layer_types"):
            slides = [t == "sliding_attention" for t in self.raw["layer_types"]]
        elif kind == "unrotated":
            slides = [not rotated for rotated in self._rotary_layers(layers)]
        else:
            slides = [i >= int(self.raw["max_window_layers"]) for i in range(layers)]
        return tuple(int(window) if s else None for s in slides)

    def _rotary_layers(self, layers: int) -> tuple[bool, ...]:
        if self.architecture != "SmolLM3ForCausalLM":
            return (True,) * layers
        given = self.raw.get("no_rope_layers")  # despite its name, 1 means "rotary"
        interval = self.raw.get("no_rope_layer_interval", 4)
        return tuple(bool(g) for g in given) if given else tuple((i + 1) % interval != 0 for i in range(layers))


def _ids(value: Any) -> tuple[int, ...]:
    """A token id, a list of them, or null -> a tuple."""
    return () if value is None else tuple(int(v) for v in (value if isinstance(value, list) else [value]))
