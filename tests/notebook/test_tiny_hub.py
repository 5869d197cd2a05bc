"""The notebooks' own hub on 127.0.0.1, asked by ModelScope's real client through llmkit."""

import pytest

from llmkit import download, download_report
from llmkit.errors import LlmkitError
from llmkit.notebook.tiny_hub import TinyHub


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model."""
    header = b'{"w":{"dtype":"U8","shape":[3000000],"data_offsets":[0,3000000]}}'
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(250)) * 12_000)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A function: hub -> arguments of `download` that lead to it."""

    def arguments(hub):
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        return {"source": "modelscope", "cache_dir": tmp_path / "cache"}

    return arguments


def test_a_model_comes_whole_over_a_cut_line_and_each_byte_once(model, here, tmp_path):
    with TinyHub(model, "tiny/model", cuts=[1_000_000]) as hub:
        folder = download("tiny/model", **here(hub))
    assert hub.cuts == []
    assert hub.sent == hub.size == download_report().bytes
    assert {p.name: p.read_bytes() for p in model.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / folder).iterdir() if not p.name.startswith(".")}


def test_another_model_is_not_there(model, here):
    with TinyHub(model, "tiny/model") as hub, pytest.raises(LlmkitError, match="tiny/modem"):
        download("tiny/modem", **here(hub))
