"""GGUF -> a folder in Hugging Face's layout, once: config, tokenizer, and dequantised weights as model.safetensors.

The folder is cached under llmkit's cache root, appears whole or not at all, and is written row block by row block: memory
stays at some MB however large the model is. Quantised weights become bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import UnsupportedModelError, WeightsError
from llmkit.hub.cache import building, cache_root, locked, require_space
from llmkit.hub.progress import Bar, progress
from llmkit.models.gguf_file import GGUFFile, GGUFTensor
from llmkit.models.gguf_tokenizer import save_tokenizer

LAYOUT = 1  # part of the cache key: raise it when the written folder changes
CHUNK = 1 << 22  # values dequantised at a time
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is called in Hugging Face's world. `interleaved`: q/k rows are stored in rotary pairs."""

    model_type: str
    class_name: str
    interleaved: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "phi3": Architecture("phi3", "Phi3ForCausalLM"),
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FACTORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)  # go into config.json, not into the weights


def convert_gguf(path: Path, out: Path | None = None) -> Path:
    """The Hugging Face folder of a .gguf file: `out`, or a cached one keyed by name, size, time and content (first and last MiB).

    Converts when the folder is not there yet; two processes never convert at once, a killed one leaves nothing that loads.
    Raises WeightsError (unsound file, type that cannot be dequantised) or UnsupportedModelError (architecture).
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    folder = Path(out) if out is not None else cached_folder(path, cache_root())
    if (folder / "config.json").is_file():
        return folder
    with locked(folder):
        if not (folder / "config.json").is_file():
            file = GGUFFile(path)
            with building(folder) as partial:
                _write(file, partial)
    return folder


def cached_folder(path: Path, root: Path) -> Path:
    """Where under the cache folder `root` the conversion of `path` belongs."""
    path = Path(path).resolve()
    return root / "gguf" / f"{path.stem}-{_fingerprint(path)}"


def _fingerprint(path: Path) -> str:
    """Twelve hex digits that change with the file's size, modification time, first and last MiB, and with LAYOUT."""
    stat = path.stat()
    digest = hashlib.sha256(f"{LAYOUT}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, stat.st_size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()[:12]


def _write(file: GGUFFile, folder: Path) -> None:
    architecture = _architecture(file)
    dtype = _dtype(file)
    config = _config(file, architecture, dtype)
    save_tokenizer(file, folder)
    _write_weights(file, folder / "model.safetensors", _plan(file, architecture, config), dtype)
    _save_json(folder / "generation_config.json", _generation_config(file))
    _save_json(folder / "config.json", config)


def _save_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _architecture(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: architecture {name!r} cannot be read from a GGUF file",
            f"those that can: {', '.join(sorted(ARCHITECTURES))}; or use the model's safetensors",
        )
    if file.metadata.get(f"{name}.expert_count"):
        raise UnsupportedModelError(
            f"{file.path}: {name} with experts (mixture of experts) cannot be read from a GGUF file",
            "use the model's safetensors",
        )
    return ARCHITECTURES[name]


def _dtype(file: GGUFFile) -> str:
    """One dtype for the whole file: float16 or float32 when every matrix is that, bfloat16 otherwise."""
    kinds = {file.type_name(t) for t in file.tensors.values() if len(t.shape) > 1}
    return PLAIN.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


# config.json ---------------------------------------------------------------------------------------------------------


def _config(file: GGUFFile, architecture: Architecture, dtype: str) -> dict[str, Any]:
    get = _getter(file)
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "torch_dtype": dtype,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "vocab_size": _tensor(file, "token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": get("rope.freq_base", 10000.0),
        **_rope(file, get, head_dim),
        **_biases(file),
        **_window(architecture, get),
        **_token_ids(file),
        **({"no_rope_layer_interval": 4} if architecture.model_type == "smollm3" else {}),
    }


def _getter(file: GGUFFile) -> Callable[..., Any]:
    """Read `{architecture}.{key}`; without a default a missing key is an error, and so is a value per layer."""
    prefix = file.metadata["general.architecture"]

    def get(key: str, *default: Any) -> Any:
        value = file.metadata.get(f"{prefix}.{key}", *default)
        if value is None and not default:
            raise WeightsError(
                f"{file.path}: the metadata lack {prefix}.{key}", "convert the model again with a current llama.cpp"
            )
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(
                    f"{file.path}: {prefix}.{key} differs from layer to layer: {value}", "use the model's safetensors"
                )
            return value[0]
        return _short(value) if isinstance(value, float) else value

    return get


def _short(value: float) -> float:
    """A stored float32 as the number its author wrote: 9.999999747e-06 -> 1e-05."""
    return float(f"{value:.7g}")


def _tensor(file: GGUFFile, name: str) -> GGUFTensor:
    if name not in file.tensors:
        raise WeightsError(f"{file.path}: tensor {name!r} is missing", "download the file again")
    return file.tensors[name]


def _biases(file: GGUFFile) -> dict[str, bool]:
    return {
        "attention_bias": any(n.endswith("attn_q.bias") for n in file.tensors),
        "mlp_bias": any(n.endswith("ffn_gate.bias") for n in file.tensors),
    }


def _window(architecture: Architecture, get: Callable[..., Any]) -> dict[str, Any]:
    window = get("attention.sliding_window", None)
    if not window:
        return {}
    if architecture.model_type == "llama":  # Mistral is stored as llama; the window is what tells them apart
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return {"sliding_window": window, "use_sliding_window": True}


def _token_ids(file: GGUFFile) -> dict[str, int | None]:
    """Null where the file is silent: a missing key would mean the default of the architecture's config class."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    """Ids that end an answer: EOS, and end-of-turn where the file names another one."""
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(e for e in ends if e is not None))
    known = {key: value for key, value in _token_ids(file).items() if value is not None}
    return known | ({"eos_token_id": unique} if len(unique) > 1 else {})


def _rope(file: GGUFFile, get: Callable[..., Any], head_dim: int) -> dict[str, Any]:
    rotated = get("rope.dimension_count", head_dim)
    partial = {"partial_rotary_factor": rotated / head_dim} if rotated != head_dim else {}
    if FACTORS[0] in file.tensors:
        return partial | {"rope_scaling": _llama3_scaling(file, get)}
    if FACTORS[1] in file.tensors:
        return partial | _long_rope(file, get)
    kind = get("rope.scaling.type", "none")
    if kind in ("none", ""):
        return partial
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path}: rope scaling {kind!r} cannot be read from a GGUF file", "those that can: linear, yarn"
        )
    original = get("rope.scaling.original_context_length", None)
    return partial | {
        "rope_scaling": {"rope_type": kind, "factor": get("rope.scaling.factor", 1.0)}
        | ({"original_max_position_embeddings": original} if original else {})
    }


def _long_rope(file: GGUFFile, get: Callable[..., Any]) -> dict[str, Any]:
    long, short = (_values(file, name) for name in FACTORS[1:])
    scaling = {"rope_type": "longrope", "type": "longrope", "long_factor": long, "short_factor": short}
    return {"rope_scaling": scaling, "original_max_position_embeddings": get("rope.scaling.original_context_length")}


def _values(file: GGUFFile, name: str) -> list[float]:
    import numpy as np

    return [_short(v) for v in np.concatenate([block.ravel() for block in _blocks(file, _tensor(file, name), None)]).tolist()]


def _llama3_scaling(file: GGUFFile, get: Callable[..., Any]) -> dict[str, Any]:
    """Llama 3's scaling is stored as one divisor per frequency. Its parameters are always 1, 4 and 8192 with some factor:
    take the factor, compute the divisors anew, and refuse the file when they are not the same."""
    stored = _values(file, FACTORS[0])
    factor, low, high, original = max(stored), 1.0, 4.0, 8192
    theta, divisors = get("rope.freq_base", 10000.0), []
    for i in range(len(stored)):
        wavelength = 2 * math.pi * theta ** (i / len(stored))
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    if any(abs(a - b) > 1e-3 * b for a, b in zip(stored, divisors)):
        raise UnsupportedModelError(
            f"{file.path}: the rotary factors in rope_freqs.weight are not Llama 3's", "use the model's safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# model.safetensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One tensor to write: its name there, where it comes from, and how many heads' q/k rows to put back in order (0: none)."""

    name: str
    tensor: GGUFTensor
    heads: int = 0


def _plan(file: GGUFFile, architecture: Architecture, config: dict[str, Any]) -> list[Job]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if architecture.interleaved else {}
    tensors = [t for t in file.tensors.values() if t.name not in FACTORS]
    return [Job(_hf_name(file, t.name), t, heads.get(t.name.split(".")[-2], 0)) for t in tensors]


def _hf_name(file: GGUFFile, name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is None or layer[2] not in LAYER_NAMES:
        raise UnsupportedModelError(
            f"{file.path}: tensor {name!r} has no place in {file.metadata['general.architecture']}", "use the model's safetensors"
        )
    merged = layer[2] == "ffn_up" and f"blk.{layer[1]}.ffn_gate.{kind}" not in file.tensors
    target = "mlp.gate_up_proj" if merged else LAYER_NAMES[layer[2]]  # Phi-3 stores gate and up as one
    return f"model.layers.{layer[1]}.{target}.{kind}"


def _write_weights(file: GGUFFile, target: Path, jobs: list[Job], dtype: str) -> None:
    """Header first, all lengths being known, then every tensor at its own offset, several at a time."""
    item = 4 if dtype == "float32" else 2
    offsets, end = [], 0
    for job in jobs:
        file.rows(job.tensor)  # raises now, before anything is written, if the file is cut off
        offsets.append(end)
        end += math.prod(job.tensor.shape) * item
    header = _header(jobs, offsets, item, dtype)
    require_space(target.parent, len(header) + end, f"converting {file.path.name}")
    with progress(end, f"converting {file.path.name}") as bar, target.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + end)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            done = [pool.submit(_write_tensor, file, job, target, len(header) + at, dtype, bar) for job, at in zip(jobs, offsets)]
            try:
                for future in done:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _header(jobs: list[Job], offsets: list[int], item: int, dtype: str) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for job, at in zip(jobs, offsets):
        table[job.name] = {
            "dtype": SAFETENSORS_DTYPE[dtype],
            "shape": list(job.tensor.shape),
            "data_offsets": [at, at + math.prod(job.tensor.shape) * item],
        }
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: GGUFFile, job: Job, target: Path, at: int, dtype: str, bar: Bar) -> None:
    import torch

    order = unpermuted_rows(job.tensor.shape[0], job.heads) if job.heads else None
    with target.open("r+b") as stream:
        stream.seek(at)
        for block in _blocks(file, job.tensor, order):
            data = torch.from_numpy(block).to(getattr(torch, dtype)).view(torch.uint8).numpy()
            stream.write(data.data)
            bar.update(data.nbytes)


def _blocks(file: GGUFFile, tensor: GGUFTensor, order: Any) -> Iterator[Any]:
    """Dequantised rows of `tensor`, as float32 numpy arrays [some rows, columns], in `order` (row numbers) or as stored."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind, raw = GGMLQuantizationType(tensor.type_id), file.rows(tensor)
    if order is not None and len(tensor.shape) == 1:
        raw = raw.reshape(tensor.shape[0], -1)  # a bias: its values are the rows
    step = max(1, CHUNK // max(1, tensor.shape[-1]))
    for begin in range(0, len(raw), step):
        rows = raw[begin : begin + step] if order is None else raw[order[begin : begin + step]]
        try:
            values = dequantize(rows, kind)
        except NotImplementedError as error:
            raise file.unusable(tensor) from error
        yield np.array(values, np.float32, copy=not values.flags.writeable)  # torch wants memory that may be written to


def unpermuted_rows(rows: int, heads: int) -> Any:
    """Which stored row is row i of Hugging Face's q_proj/k_proj: GGUF pairs row j of a head's first half with j of its second."""
    import numpy as np

    half = rows // heads // 2
    return np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).ravel()
