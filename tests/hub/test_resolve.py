"""Which source a name means, and what is said when nothing is found."""

from pathlib import Path

import pytest
from conftest import start

import llmkit
from llmkit import hub
from llmkit.errors import ConfigError, ModelNotFoundError
from llmkit.hub import local, resolve
from llmkit.hub.names import Request


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, Request]]:
    """Both hubs replaced by ones that can be reached and have nothing; the list of who was asked for what."""
    calls = []

    def absent(client, request):
        calls.append((client.name, request))
        raise ModelNotFoundError(f"{client.name} has no {request.id}")

    monkeypatch.setattr(hub.fetch, "from_hub", absent)
    monkeypatch.setattr(hub.Probe, "reason", lambda self, name: None)
    return calls


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_folders_are_themselves(tmp_path):
    folder = model_folder(tmp_path / "owner" / "name")
    for name in (folder, str(folder), "owner/name", "./owner/name", "local:owner/name"):
        assert resolve(name).resolve() == folder
    assert llmkit.download("owner/name", source="local") == "owner/name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("..", "no config.json"),
        ("/no/such/folder", "no folder or file '/no/such/folder'"),
        ("./nope", "no folder or file"),
        ("a/b/c", "no folder or file"),
        ("nope.gguf", "no folder or file"),
        ("owner/..", "neither a folder here nor a hub id"),
        ("what is this?", "neither a folder here nor a hub id"),
        ("single", "neither a folder here nor a hub id"),
        ("modelscope:", "neither a folder here nor a hub id"),
        ("pypi:--index-url=x", "not a package name"),
        ("pypi:a==../b", "not a package name"),
    ],
)
def test_nonsense_is_told_before_any_hub_is_asked(asked, tmp_path, name, message):
    with pytest.raises(ModelNotFoundError, match=message):
        resolve(name)
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_near_names_and_wrong_kinds_of_path(tmp_path):
    model_folder(tmp_path / "smollm2" / "inner")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"near it: smollm2"):
        resolve("./smolm2")
    with pytest.raises(ModelNotFoundError, match=r"near it in this folder: smollm2"):
        resolve("SmolLM2x")
    with pytest.raises(ModelNotFoundError, match=r"(?s)no config\.json.*smollm2/inner"):
        resolve("smollm2")
    with pytest.raises(ModelNotFoundError, match=r"not a \.gguf file"):
        resolve("./weights.bin")


@pytest.mark.parametrize(
    ("environment", "order"),
    [
        ({}, ["modelscope", "hf"]),
        ({"LLMKIT_HUBS": "hf, modelscope"}, ["hf", "modelscope"]),
        ({"LLMKIT_HUBS": "huggingface"}, ["hf"]),
        ({"LLMKIT_USE_MODELSCOPE": "true", "LLMKIT_HUBS": "hf"}, ["modelscope"]),
        ({"VLLM_USE_MODELSCOPE": "1"}, ["modelscope"]),
        ({"VLLM_USE_MODELSCOPE": "False"}, ["hf"]),
        ({"LLMKIT_USE_MODELSCOPE": "0", "VLLM_USE_MODELSCOPE": "1"}, ["hf"]),
    ],
)
def test_environment_decides_which_hubs_are_asked(asked, monkeypatch, environment, order):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("owner/name")
    assert [kind for kind, _ in asked] == order
    assert all(f"{kind} has no owner/name" in str(caught.value) for kind in order)


def test_prefix_and_source_name_one_hub(asked):
    for name, source in (("hf:owner/name", "auto"), ("owner/name", "hf"), ("hf:owner/name", "modelscope")):
        with pytest.raises(ModelNotFoundError):
            resolve(name, source=source)
    with pytest.raises(ModelNotFoundError):
        resolve("modelscope:owner/name", revision="v1", cache_dir="c", allow_patterns="*.json")
    with pytest.raises(ModelNotFoundError, match="local_files_only"):
        resolve("modelscope:owner/name", local_files_only=True)
    assert [kind for kind, _ in asked] == ["hf", "hf", "hf", "modelscope"]
    assert asked[-1][1] == Request("owner/name", "v1", Path("c"), ("*.json",), None)


def test_old_casing_is_one_model(asked):
    with pytest.raises(ModelNotFoundError):
        resolve("qwen/Qwen2-7B-Instruct")
    assert {request.id for _, request in asked} == {"Qwen/Qwen2-7B-Instruct"}


def test_cached_models_are_proposed(asked, tmp_path):
    model_folder(tmp_path / "ms" / "models" / "Qwen--Qwen2-7B-Instruct" / "snapshots" / "master")
    model_folder(tmp_path / "hf" / "hub" / "models--org--other-name" / "snapshots" / "abc")
    assert hub.cached_ids() == ["Qwen/Qwen2-7B-Instruct", "org/other-name"]
    with pytest.raises(ModelNotFoundError, match=r"near it: Qwen/Qwen2-7B-Instruct"):
        resolve("Qwen/Qwen2-7B-Instrct")


def test_wrong_options_are_told(monkeypatch):
    with pytest.raises(ConfigError, match=r"(?s)source must be one of.*did you mean 'modelscope'"):
        resolve("owner/name", source="modelscop")
    monkeypatch.setenv("LLMKIT_HUBS", "github")
    with pytest.raises(ConfigError, match="unknown hub 'github'"):
        resolve("owner/name")
    monkeypatch.setenv("LLMKIT_USE_MODELSCOPE", "perhaps")
    with pytest.raises(ConfigError, match="must be true or false"):
        resolve("owner/name")


def test_a_folder_with_one_gguf_file_is_converted(monkeypatch, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(local, "converted", lambda path, root=None: path.with_suffix(""))
    assert resolve("m") == Path("m/a")
    assert resolve("m/a.gguf") == Path("m/a")
    (tmp_path / "m" / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"(?s)2 GGUF files.*m/a\.gguf"):
        resolve("m")


def test_resolving_a_folder_imports_no_heavy_library(tmp_path):
    folder = model_folder(tmp_path / "m")
    with start(f"import sys; from llmkit.hub import resolve; resolve({str(folder)!r}); print(*sys.modules)") as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert not {"torch", "transformers", "requests", "huggingface_hub", "modelscope_hub", "gguf", "IPython"} & set(out.split())
