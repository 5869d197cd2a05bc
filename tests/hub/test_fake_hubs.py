"""The real clients of both hubs against small hubs in this process, on 127.0.0.1."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub import resolve

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"pickle",
    "modeling_x.py": b"code",
}
WANTED = {"config.json", "tokenizer.json", "model.safetensors"}
COMMIT = "a" * 40


class FakeHub(BaseHTTPRequestHandler):
    """Knows one model, org/model, in both hubs' dialects."""

    files = FILES
    paths: list[str] = []

    def do_GET(self) -> None:
        url, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        self.paths.append(self.path)
        if "org/model" not in url.path:
            return self.reply(
                b'{"Code":10010205001,"Success":false,"Message":"not found"}', 404, {"X-Error-Code": "RepoNotFound"}
            )
        if url.path.endswith("/repo/files"):
            listing = [{"Path": n, "Name": n, "Type": "blob", "Size": len(c), "Sha256": sha(c)} for n, c in self.files.items()]
            return self.reply(json.dumps({"Code": 200, "Success": True, "Data": {"Files": listing}}).encode())
        if url.path.endswith("/repo"):
            return self.reply(self.files[query["FilePath"][0]])
        if "/resolve/" in url.path:
            return self.reply(self.files[url.path.rpartition("/")[2]])
        tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
        if "/tree/" in url.path:
            return self.reply(json.dumps(tree).encode())
        siblings = [{"rfilename": n} for n in self.files]
        return self.reply(json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def reply(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        etag = {
            "ETag": f'"{sha(body)}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
        }
        for name, value in (etag | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[type[FakeHub]]:
    class Mine(FakeHub):
        paths = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("LLMKIT_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE", "LLMKIT_HUBS"):
        monkeypatch.delenv(name, raising=False)
    environment = {
        "MODELSCOPE_ENDPOINT": address,
        "HF_ENDPOINT": address,
        "MODELSCOPE_CACHE": str(tmp_path / "ms"),
        "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    yield Mine
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.startswith(".")}


def test_modelscope_is_asked_first_and_only_needed_files_come(hub, tmp_path):
    folder = resolve("org/model")
    assert folder.is_relative_to(tmp_path / "ms")
    assert names(folder) == WANTED
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert all(path.startswith("/api/v1/") for path in hub.paths)
    assert resolve("org/model", local_files_only=True) == folder


def test_hugging_face_alone_when_told_so(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_USE_MODELSCOPE", "0")
    folder = resolve("org/model")
    assert folder.is_relative_to(tmp_path / "hf")
    assert names(folder) == WANTED
    assert not any(path.startswith("/api/v1/") for path in hub.paths)
    assert resolve("hf:org/model", local_files_only=True) == folder


def test_patterns_and_another_cache_folder(hub, tmp_path):
    folder = resolve("modelscope:org/model", allow_patterns="*.py", cache_dir=tmp_path / "else")
    assert folder.is_relative_to(tmp_path / "else")
    assert names(folder) == {"modeling_x.py"}


def test_an_absent_model_names_both_hubs_and_leaves_no_folder(hub, tmp_path):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("org/absent")
    assert "modelscope: ModelScope has no model org/absent" in str(caught.value)
    assert "hf: Hugging Face has no model org/absent" in str(caught.value)
    assert not list(tmp_path.rglob("*absent*"))


def test_a_file_name_that_leads_outside_is_refused_before_anything_is_written(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "files", FILES | {"../../../../evil.json": b"x", "tokenizer/../../evil.json": b"x"})
    with pytest.raises(DownloadError, match="outside the model's folder"):
        resolve("modelscope:org/model")
    assert not list(tmp_path.rglob("*.json"))


def test_the_cached_copy_is_used_when_the_hub_is_gone(hub, tmp_path, monkeypatch):
    folder = resolve("modelscope:org/model")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    import modelscope_hub._legacy_api as client

    monkeypatch.setattr(client.time, "sleep", lambda _: None)  # the client waits 7 s between its tries
    assert resolve("modelscope:org/model") == folder
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        resolve("modelscope:org/other")


def test_a_cached_copy_without_config_is_not_a_model(hub):
    folder = resolve("modelscope:org/model")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve("modelscope:org/model", local_files_only=True)
