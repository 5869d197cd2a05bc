"""Which files of a listing are needed, and one of several GGUF files."""

from fnmatch import fnmatch

import pytest

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub import files, local, resolve
from llmkit.hub.files import RemoteFile, check_names, choose, quantisation
from llmkit.hub.names import Request


def test_default_patterns_take_no_pickles_and_no_code():
    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in files.NEEDED)

    needed = ["config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "a.tiktoken", "chat_template.jinja"]
    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert all(map(wanted, [*needed, *weights, "README.md"]))
    assert not any(map(wanted, ["pytorch_model.bin", "modeling_x.py", "model.gguf", "model.onnx", "tf_model.h5"]))


@pytest.mark.parametrize(("path", "name"), [
    ("qwen2-0_5b-instruct-q4_k_m.gguf", "Q4_K_M"), ("a.Q8_0.gguf", "Q8_0"), ("m-IQ2_XS.gguf", "IQ2_XS"), ("m-fp16.gguf", "FP16"),
    ("BF16/m-BF16-00001-of-00002.gguf", "BF16"), ("m-MXFP4.gguf", "MXFP4"), ("plain.gguf", "plain"),
    ("Q4-model.gguf", "Q4-model"),
])  # fmt: skip
def test_quantisation_in_a_name(path, name):
    assert quantisation(path) == name


def listing(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 1000 * (n + 1)) for n, name in enumerate(names)]


def chosen(names: list[str], request: Request) -> list[str]:
    return [f.path for f in choose("hf:org/m", listing(*names), request)]


def test_gguf_beside_safetensors_is_left_out_unless_named():
    names = ["config.json", "model.safetensors", "m-Q4_0.gguf", "README.md"]
    assert chosen(names, Request("org/m")) == ["config.json", "model.safetensors", "README.md"]
    assert chosen(names, Request("org/m", quant="q4_0")) == ["m-Q4_0.gguf", "README.md"]
    with pytest.raises(ModelNotFoundError, match=r"(?s)no GGUF file of type Q9: it has Q4_0 \(3\.0 kB\).*org/m:Q4_0"):
        chosen(names, Request("org/m", quant="Q9"))
    with pytest.raises(ModelNotFoundError, match="has no GGUF file, so no quantisation Q4_0"):
        chosen(names[:2], Request("org/m", quant="Q4_0"))


def test_parts_of_a_split_file_and_the_picture_model_are_no_choices():
    names = ["m-Q4_0.gguf", "mmproj-m-F16.gguf"]
    assert chosen(names, Request("org/m")) == ["m-Q4_0.gguf"]
    split = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "m-Q4_0.gguf"]
    with pytest.raises(ModelNotFoundError, match=r"holds 2 GGUF models; none is named: it has Q8_0 \(3\.0 kB\), Q4_0"):
        chosen(split, Request("org/m"))
    with pytest.raises(ModelNotFoundError, match="Q8_0 is split into 2 files"):
        chosen(split, Request("org/m", quant="Q8_0"))


def test_what_matches_nothing_names_what_is_there():
    with pytest.raises(ModelNotFoundError, match=r"(?s)no file that matches \*\.bin.*it has: config\.json"):
        chosen(["config.json"], Request("org/m", patterns=("*.bin",)))
    with pytest.raises(ModelNotFoundError, match="no language model"):
        chosen(["config.json"], Request("org/m"))


@pytest.mark.parametrize("path", ["..", "a/../b", "/a", "~/a", "a\\b", "C:x", "a\nb", ""])
def test_forged_names(path):
    with pytest.raises(DownloadError, match="nothing was written"):
        check_names("hf:org/m", listing("config.json", path))
    check_names("hf:org/m", listing("a/b..c", "日本.json", "a b~.txt"))


def test_a_repository_of_gguf_files(kind, hub, monkeypatch):
    """Ask, then fetch exactly the one that is named, and convert it as a local file would be."""
    sizes = {"Q2_K": 5000, "Q4_K_M": 10_000, "Q8_0": 15_000}
    hub.models["org/model"] = {f"m-{name}.gguf": b"GGUF" + name.encode() * size for name, size in sizes.items()}
    converted = []
    monkeypatch.setattr(local, "converted", lambda path, root=None: converted.append((path, root)) or path.parent)
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(f"{kind}:org/model")
    assert "3 GGUF models; none is named: it has Q2_K (20.0 kB), Q4_K_M (60.0 kB), Q8_0 (60.0 kB)" in str(caught.value)
    assert "name one: org/model:Q4_K_M" in str(caught.value.hint)
    assert hub.file_requests() == []
    folder = resolve(f"{kind}:org/model:Q4_K_M", cache_dir="here")
    assert [p.name for p in folder.iterdir() if p.suffix == ".gguf"] == ["m-Q4_K_M.gguf"]
    hub.forget()
    assert resolve(f"{kind}:org/model:q4_k_m", cache_dir="here") == folder
    assert hub.requests == []
    assert [(p.name, str(root)) for p, root in converted] == [("m-Q4_K_M.gguf", "here")] * 2
    assert resolve(f"{kind}:org/model", allow_patterns="*Q2_K.gguf", cache_dir="here") == folder
    assert (folder / "m-Q2_K.gguf").read_bytes() == hub.models["org/model"]["m-Q2_K.gguf"]


def test_a_folder_of_gguf_files_of_another_tool(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "converted", lambda path, root=None: path)
    folder = tmp_path / "ms/models/org--model/snapshots/master"
    folder.mkdir(parents=True)
    (folder / "m-Q4_0.gguf").write_bytes(b"GGUF")
    assert resolve("org/model") == folder / "m-Q4_0.gguf"
    (folder / "m-Q8_0.gguf").write_bytes(b"GGUF")
    assert resolve("org/model:Q8_0") == folder / "m-Q8_0.gguf"
    with pytest.raises(ModelNotFoundError, match="holds 2 GGUF models"):
        resolve("org/model", local_files_only=True)
