"""Two fake hubs, an environment in which nothing else exists, and one small model."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_hubs import FakeHub, safetensors

import llmkit

WEIGHTS = random.Random(1).randbytes(1 << 20)
MODEL = {
    "config.json": b'{"model_type": "llama", "dtype": "bfloat16"}',
    "tokenizer.json": b"[1]" * 700,
    "tokenizer_config.json": b"{}",
    "model.safetensors": safetensors(WEIGHTS),
    "README.md": b"---\nlicense: apache-2.0\n---\n# model\n",
    "pytorch_model.bin": b"pickle" * 1000,
    "modeling_x.py": b"code",
}
NEEDED = set(MODEL) - {"pytorch_model.bin", "modeling_x.py"}
WANTED_BYTES = sum(len(MODEL[n]) for n in NEEDED)
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN")
SWITCHES = ("LLMKIT_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE", "LLMKIT_HUBS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
CACHES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "MODELSCOPE_DOMAIN")


@pytest.fixture(autouse=True)
def nothing_but_here(tmp_path, monkeypatch) -> Path:
    """Homes and caches in tmp_path, no token, no hub: whoever asks one without a fake gets `connection refused`."""
    for name in (*TOKENS, *SWITCHES, *CACHES):
        monkeypatch.delenv(name, raising=False)
    places = {"LLMKIT_HOME": "home", "MODELSCOPE_CACHE": "ms", "HF_HOME": "hf", "MODELSCOPE_HOME": "ms-home"}
    for name, folder in places.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_INTRA_CLOUD", "false")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def modelscope(monkeypatch) -> Iterator[FakeHub]:
    yield from _served(monkeypatch, "MODELSCOPE_ENDPOINT")


@pytest.fixture
def hf(monkeypatch) -> Iterator[FakeHub]:
    yield from _served(monkeypatch, "HF_ENDPOINT")


def _served(monkeypatch, variable: str) -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.models["org/model"] = dict(MODEL)
    monkeypatch.setenv(variable, hub.address)
    yield hub
    hub.close()


@pytest.fixture(params=["modelscope", "hf"])
def kind(request) -> str:
    """Each hub in turn."""
    return request.param


@pytest.fixture
def hub(kind, request) -> FakeHub:
    """The fake of this kind."""
    return request.getfixturevalue(kind)


@pytest.fixture
def no_waiting(monkeypatch) -> None:
    """The clients' pauses between two tries take no time."""
    import huggingface_hub.file_download
    import modelscope_hub._download_control as control

    import llmkit.hub.network

    for module in (huggingface_hub.file_download, llmkit.hub.network):
        monkeypatch.setattr(module, "time", _Hurry())
    monkeypatch.setattr(control._DownloadControl, "sleep", lambda self, seconds: self.check())


class _Hurry:
    """The module `time` with a short sleep."""

    def __getattr__(self, name: str):
        import time

        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        import time

        time.sleep(min(seconds, 0.001))


def check(folder: Path, files: set[str] = NEEDED, model: dict[str, bytes] = MODEL) -> None:
    """The folder holds exactly these files of the model, byte for byte."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}
    assert found == {name: model[name] for name in files}


def everything(folder: Path) -> set[str]:
    """All files below a folder, locks, notes and the hubs' own bookkeeping left out."""
    hidden = (".lock", ".llmkit.json", "CACHEDIR.TAG")
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(hidden) and "ms-home" not in p.parts]
    return {p.relative_to(folder).as_posix() for p in paths if not {"trees", "refs", "blobs"} & set(p.parts)}


def start(code: str) -> subprocess.Popen[str]:
    """A process of its own that runs `code` in this environment."""
    house = Path(llmkit.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(house), str(house / "kernels")])}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=env)
