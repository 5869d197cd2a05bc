"""What is on the disk already: used without asking anybody, whoever put it there."""

import builtins
import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import MODEL, NEEDED, WANTED_BYTES, check, start
from fake_hubs import COMMIT, safetensors

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub import cached_ids, download_report, manifest, resolve

TEN = {f"model-{n:05}-of-00007.safetensors": safetensors(bytes([n]) * 100_000) for n in range(1, 8)}
TEN |= {"config.json": b"{}", "tokenizer.json": b"[]"}
TEN["model.safetensors.index.json"] = json.dumps({"weight_map": {n: n for n in TEN if n.startswith("model-")}}).encode()


@pytest.fixture
def blocked(monkeypatch):
    """No socket can be opened, no name looked up."""

    def refuse(*args, **options):
        raise AssertionError(f"a socket was opened: {args}")

    def block():
        for name in ("socket", "create_connection", "getaddrinfo"):
            monkeypatch.setattr(socket, name, refuse)

    return block


@pytest.mark.parametrize("prefix", ["", "own"])
def test_the_second_call(kind, hub, blocked, monkeypatch, prefix):
    """0 bytes, 0 requests, nothing hashed, < 50 ms, sockets blocked; with and without the hub named."""
    hub.models["org/model"] = dict(TEN)
    name = f"{kind}:org/model" if prefix else "org/model"
    monkeypatch.setenv("LLMKIT_HUBS", kind)
    folder = resolve(name)
    hub.forget()
    blocked()
    opened, real = [], builtins.open
    monkeypatch.setattr(manifest, "digest", lambda path: pytest.fail(f"{path} was hashed"))
    monkeypatch.setattr(manifest, "git_digest", lambda path: pytest.fail(f"{path} was hashed"))
    monkeypatch.setattr(builtins, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        assert resolve(name) == folder
        seconds.append(time.perf_counter() - begin)
    print(f"{kind}: second call of a 10-file model: best {min(seconds) * 1e3:.2f} ms, worst {max(seconds) * 1e3:.2f} ms")
    assert min(seconds) < 0.05
    assert (hub.requests, hub.sent) == ([], 0)
    assert not [path for path in opened if path.endswith((".safetensors", "tokenizer.json"))]
    report = download_report()
    assert (report.bytes, report.resumed_bytes, report.files, report.source) == (0, 0, 0, kind)
    assert "already here, 0 bytes fetched" in str(report)
    assert resolve(name, local_files_only=True) == folder


def test_the_first_start_of_a_process_needs_neither_client_nor_socket(kind, hub):
    folder = resolve(f"{kind}:org/model")
    code = f"""
import socket, sys, time
socket.create_connection = socket.getaddrinfo = None
begin = time.perf_counter()
from llmkit.hub import resolve
print(resolve("{kind}:org/model"), time.perf_counter() - begin, *sys.modules, sep="\\n")
"""
    with start(code) as child:
        out, err = child.communicate(timeout=60)
    found, seconds, *modules = out.splitlines()
    print(f"{kind}: import and second call in a new process: {float(seconds) * 1e3:.0f} ms")
    assert (found, err) == (str(folder), "")
    assert float(seconds) < 1, "0.1 s on an idle machine"
    assert not {"requests", "httpx", "httpx2", "huggingface_hub", "modelscope_hub", "torch"} & set(modules)


def test_the_hub_that_is_not_chosen_sees_nothing(modelscope, hf, monkeypatch):
    for switch in ("LLMKIT_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"):
        with monkeypatch.context() as m:
            m.setenv(switch, "1")
            check(resolve("org/model"))
            with pytest.raises(ModelNotFoundError):
                resolve("org/absent")
    assert hf.requests == []
    asked = len(modelscope.requests)
    monkeypatch.setenv("LLMKIT_USE_MODELSCOPE", "0")
    check(resolve("org/model"))
    with pytest.raises(ModelNotFoundError):
        resolve("org/absent")
    check(resolve("hf:org/model"))
    assert len(modelscope.requests) == asked
    assert hf.sent == WANTED_BYTES


def test_auto_takes_modelscope_and_says_so(modelscope, hf, capsys):
    check(resolve("org/model"))
    assert hf.requests == []
    assert download_report().source == "modelscope"
    assert capsys.readouterr().err.startswith("modelscope:org/model: ")


def test_auto_finds_what_the_second_hub_has_brought_before_asking_the_first(modelscope, hf):
    folder = resolve("hf:org/model")
    assert resolve("org/model") == folder
    assert modelscope.requests == []
    assert resolve("org/model", update=True) != folder
    assert modelscope.sent == WANTED_BYTES


def test_update_fetches_what_has_changed(kind, hub):
    folder = resolve(f"{kind}:org/model")
    hub.forget()
    resolve(f"{kind}:org/model", update=True)
    assert hub.sent == 0
    hub.models["org/model"]["tokenizer_config.json"] = b'{"new": 1}'
    resolve(f"{kind}:org/model")
    assert json.loads((folder / "tokenizer_config.json").read_bytes()) == {}
    if kind == "modelscope":  # on Hugging Face a change is a new commit, and so a new folder; this fake has one
        resolve("modelscope:org/model", update=True)
        assert json.loads((folder / "tokenizer_config.json").read_bytes()) == {"new": 1}


def test_a_copied_cache_is_hashed_once_and_never_again(kind, hub, tmp_path, monkeypatch):
    resolve(f"{kind}:org/model", cache_dir=tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=False, copy_function=shutil.copy)
    hashed, real = [], manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda path: hashed.append(path.name) or real(path))
    hub.forget()
    for _ in range(2):
        check(resolve(f"{kind}:org/model", cache_dir=tmp_path / "two"))
    assert hub.requests == []
    assert hashed.count("model.safetensors") == 1


OLD = ["models/org/model___1", "hub/models/org/model___1", "org/model___1", "hub/org/model___1"]


@pytest.mark.parametrize("layout", [*OLD, "models/org--model.1/snapshots/master", "models/org--model.1/snapshots/v1"])
def test_folders_of_older_modelscope_clients_are_found(tmp_path, monkeypatch, blocked, layout):
    folder = tmp_path / "ms" / layout
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_bytes(MODEL[name])
    blocked()
    assert resolve("org/model.1") == folder
    assert cached_ids() == ["org/model.1"]
    assert resolve("org/model.1", cache_dir=tmp_path / "ms") == folder
    with pytest.raises(ModelNotFoundError):
        resolve("org/model.1", cache_dir=tmp_path / "elsewhere", local_files_only=True)


def test_the_old_casing_of_the_tutorials_is_the_same_model(modelscope, tmp_path, blocked):
    folder = tmp_path / "disk" / "qwen" / "Qwen2-7B-Instruct"  # what cache_dir= gave in 2024
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_bytes(MODEL[name])
    modelscope.models["Qwen/Qwen2-0.5B"] = dict(MODEL)
    assert resolve("qwen/Qwen2-0.5B") == resolve("Qwen/Qwen2-0.5B")
    assert modelscope.sent == WANTED_BYTES
    blocked()
    for name in ("qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct"):
        assert resolve(name, cache_dir=tmp_path / "disk") == folder


def test_a_hugging_face_folder_of_another_tool_is_found(hf, tmp_path, monkeypatch, blocked):
    from huggingface_hub import snapshot_download

    made = snapshot_download("org/model", cache_dir=tmp_path / "hf/hub", endpoint=hf.address)
    assert made.endswith(COMMIT)
    hf.forget()
    blocked()
    assert resolve("org/model") == Path(made)
    assert resolve("hf:org/model", revision="main") == Path(made)
    assert resolve("hf:org/model", revision=COMMIT) == Path(made)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf/hub"))  # set after the client was imported, as in a notebook
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert resolve("hf:org/model") == Path(made)


LARGE = "the modelscope package is not installed: pip install -e .[test]"
THEIRS = {
    "modelscope_hub": "from modelscope_hub.compat.snapshot_download import snapshot_download",  # what modelscope itself calls
    "modelscope": "from modelscope import snapshot_download",
}


def run(code: str) -> str:
    """The last line that a new process prints: these clients keep the first endpoint they see."""
    with start(code) as child:
        out, err = child.communicate(timeout=90)
    assert child.returncode == 0, err
    return out.splitlines()[-1]


@pytest.mark.parametrize("package", THEIRS)
def test_modelscope_and_llmkit_share_one_cache(modelscope, package):
    pytest.importorskip(package, reason=LARGE)
    ours = resolve("modelscope:org/model")
    modelscope.models["org/other"] = dict(MODEL)
    modelscope.forget()
    fetch = f"{THEIRS[package]}\nprint(snapshot_download('org/model', allow_patterns={sorted(NEEDED)}))"
    made, other = run(f"{fetch}\nprint(snapshot_download('org/other'))"), run(fetch)
    assert other == str(ours)
    assert not [path for path in modelscope.file_requests() if "org/model/" in path]
    modelscope.forget()
    assert str(resolve("org/other")) == made
    assert modelscope.requests == []


def test_modelscopes_tokenizer_loads_from_our_cache(modelscope):
    pytest.importorskip("modelscope", reason=LARGE)
    from tokenizers import Tokenizer, models

    files = modelscope.models["org/model"]
    files["tokenizer.json"] = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str().encode()
    files["tokenizer_config.json"] = b'{"tokenizer_class": "PreTrainedTokenizerFast"}'
    folder = resolve("modelscope:org/model")
    modelscope.forget()
    load = "from modelscope import AutoTokenizer as A\nprint(A.from_pretrained({!r}).encode('b', add_special_tokens=False))"
    assert run(load.format(str(folder))) == "[1]"
    assert modelscope.requests == []
    assert run(load.format("org/model")) == "[1]"
    wanted = [path for path in modelscope.file_requests() if "tokenizer" in path or "safetensors" in path]
    assert wanted == []


def test_offline_is_known_within_two_seconds(monkeypatch):
    silent = [socket.create_server(("127.0.0.1", 0), backlog=0) for _ in range(2)]  # nobody accepts: a full queue drops newcomers
    addresses = [s.getsockname() for s in silent]
    fillers = [socket.socket() for _ in range(8)]
    for n, filler in enumerate(fillers):
        filler.setblocking(False)
        filler.connect_ex(addresses[n % 2])
    for name, (host, port) in zip(("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"), addresses):
        monkeypatch.setenv(name, f"http://{host}:{port}")
    begin = time.monotonic()
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("org/model")
    seconds = time.monotonic() - begin
    print(f"both hubs silent: known after {seconds:.2f} s")
    assert seconds < 2.3
    assert str(caught.value).count("cannot be reached") == 2
    assert "MODELSCOPE_ENDPOINT" in caught.value.hint
    for s in silent + fillers:
        s.close()


def test_offline_with_half_a_copy_says_what_is_missing(modelscope, monkeypatch):
    folder = resolve("org/model")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached: .*refused.*tokenizer\.json is missing"):
        resolve("org/model")


def test_offline_with_several_quantisations_names_them(tmp_path):
    folder = tmp_path / "ms/models/org--model/snapshots/master"
    folder.mkdir(parents=True)
    for name in ("m-Q4_0.gguf", "m-Q8_0.gguf"):
        (folder / name).write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached: .*holds 2 GGUF models; none is named: it has Q4_0"):
        resolve("modelscope:org/model")


def test_a_proxy_is_what_must_be_reachable(monkeypatch):
    from llmkit.hub.network import address

    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert address("https://hub.example") == ("proxy.example", 3128)
    assert address("https://inside.example") == ("inside.example", 443)
    assert address("http://hub.example:81/x") == ("hub.example", 81)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_hugging_face_switched_off_is_not_asked(hf, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelNotFoundError, match="switched off"):
        resolve("hf:org/model")
    assert hf.requests == []


def test_llmkit_offline_asks_nobody(modelscope, hf, monkeypatch):
    monkeypatch.setenv("LLMKIT_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="LLMKIT_OFFLINE"):
        resolve("org/model")
    assert modelscope.requests == hf.requests == []
    monkeypatch.delenv("LLMKIT_OFFLINE")
    check(resolve("org/model"))


def test_the_second_hub_helps_when_the_first_fails_before_the_first_byte(modelscope, hf, no_waiting):
    modelscope.manners.busy_listing = 100
    check(resolve("org/model"))
    assert download_report().source == "hf"


def test_the_second_hub_does_not_begin_at_zero_what_the_first_has_half_brought(modelscope, hf, no_waiting):
    modelscope.manners.cuts = [500_000, *[0] * 200]
    with pytest.raises(DownloadError, match=r"(?s)modelscope:org/model: .*call again"):
        resolve("org/model")
    assert hf.requests == []
    modelscope.manners.cuts = []
    check(resolve("org/model"))
    assert download_report().resumed_bytes > 490_000


def test_damage_and_forgery_are_no_reason_to_try_elsewhere_silently(modelscope, hf, no_waiting):
    modelscope.manners.served = {"model.safetensors": MODEL["model.safetensors"][::-1]}
    with pytest.raises(DownloadError, match="source='hf'"):
        resolve("org/model")
    assert hf.requests == []
    check(resolve("org/model", source="hf"))


def test_gated_on_one_hub_and_open_on_the_other(modelscope, hf):
    modelscope.manners.refuse_listing = 403
    check(resolve("org/model"))
    assert download_report().source == "hf"


def test_when_one_hub_fails_and_the_other_lacks_it_that_is_no_missing_model(modelscope, hf, no_waiting):
    modelscope.manners.busy_listing = 100
    del hf.models["org/model"]
    with pytest.raises(DownloadError, match=r"(?s)modelscope: .*\n  hf: .*does not exist"):
        resolve("org/model")


def test_no_module_of_the_clients_is_changed_for_good(modelscope, hf):
    resolve("modelscope:org/model")
    resolve("hf:org/model")
    import logging

    from tqdm.auto import tqdm

    assert sys.modules["modelscope_hub._download"].tqdm is tqdm
    assert sys.modules["huggingface_hub.constants"].DOWNLOAD_CHUNK_SIZE >= 1 << 20
    assert logging.getLogger("modelscope_hub").level < logging.CRITICAL
    assert logging.getLogger("huggingface_hub").level < logging.CRITICAL
