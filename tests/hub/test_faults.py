"""What hubs and disks do wrong: a typed error that names the fix, nothing outside the folder, no half model that loads later."""

import contextlib
import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
from conftest import MODEL, NEEDED, check, everything, start

from llmkit.errors import DownloadError, LlmkitError, ModelNotFoundError
from llmkit.hub import download_report, resolve
from llmkit.hub.faults import Interrupted


def refused(kind, error, *words):
    """The error that `resolve` raises, all of whose words are there; and nothing that could load afterwards."""
    with pytest.raises(error) as caught:
        resolve(f"{kind}:org/model")
    text = str(caught.value)
    assert not [w for w in words if w not in text], text
    assert caught.value.hint
    with pytest.raises(ModelNotFoundError):
        resolve(f"{kind}:org/model", local_files_only=True)
    return text


def test_wrong_hash(kind, hub, no_waiting, tmp_path):
    wrong = bytearray(MODEL["model.safetensors"])
    wrong[5000] ^= 1
    hub.manners.served = {"model.safetensors": bytes(wrong)}
    refused(kind, DownloadError, "model.safetensors", "not what the hub's list promises", "the file was removed", "source='hf'")
    assert not [n for n in everything(tmp_path) if "model.safetensors" in n]
    hub.manners.served = {}
    check(resolve(f"{kind}:org/model"))


def test_wrong_content_of_a_small_file(kind, hub, no_waiting):
    hub.manners.served = {"tokenizer_config.json": b"[]"}
    refused(kind, DownloadError, "tokenizer_config.json", "not what the hub's list promises")
    hub.manners.served = {}
    check(resolve(f"{kind}:org/model"))


def test_what_an_earlier_run_left_is_spoilt(kind, hub, no_waiting):
    hub.manners.cuts = [300_000, *[0] * 200]
    with pytest.raises(Interrupted):
        resolve(f"{kind}:org/model")
    (half,) = [p for p in Path().rglob("*.incomplete") if p.stat().st_size > 1000]
    half.write_bytes(b"x" * 300_000)
    hub.manners.cuts = []
    check(resolve(f"{kind}:org/model"))


def test_truncated_at_the_hub(kind, hub, no_waiting):
    hub.manners.served = {"model.safetensors": MODEL["model.safetensors"][:700_000]}
    refused(kind, DownloadError, "model.safetensors", "not what the hub's list promises")


@pytest.mark.parametrize("lie", [-1000, 1000])
def test_a_listing_that_lies_about_a_size(kind, hub, no_waiting, lie):
    hub.manners.sizes = {"model.safetensors": len(MODEL["model.safetensors"]) + lie}
    refused(kind, DownloadError, "model.safetensors", "not what the hub's list promises")


@pytest.mark.parametrize("path", ["../../../../evil.json", "/evil.json", "token/../../evil.json", "..\\evil.json", "C:evil.json"])
def test_a_name_that_leads_outside(kind, hub, tmp_path, path):
    entry = {"Path": path, "Name": path, "Type": "blob", "Size": 3, "path": path, "size": 3, "type": "file", "oid": "0" * 40}
    hub.manners.extra = [entry]
    refused(kind, DownloadError, repr(path), "lies outside the model's folder; nothing was written", "forged")
    assert everything(tmp_path) == set()
    assert hub.file_requests() == []


def test_a_symbolic_link_in_the_listing(kind, hub, tmp_path):
    entry = {"Path": "tokenizer.model", "Type": "blob", "Mode": "120000", "Size": 11}
    hub.manners.extra = [entry] if kind == "modelscope" else []
    if kind == "modelscope":
        refused(kind, DownloadError, "'tokenizer.model', which is a link", "forged")
        assert everything(tmp_path) == set()
    else:  # this hub serves a link as a small file that holds the target's name: it stays one
        hub.models["org/model"]["tokenizer.model"] = b"/etc/passwd"
        assert (resolve("hf:org/model") / "tokenizer.model").read_bytes() == b"/etc/passwd"


def test_a_linked_folder_in_the_cache_is_not_followed(modelscope, tmp_path):
    folder, outside = tmp_path / "ms/models/org--model/snapshots/master", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    (folder / "sub").symlink_to(outside)
    modelscope.models["org/model"]["sub/x.json"] = b"{}"
    with pytest.raises(DownloadError, match=r"(?s)sub is a link that leads out of the model's folder.*rm "):
        resolve("modelscope:org/model", allow_patterns="sub/*")
    assert list(outside.iterdir()) == []


def test_a_missing_model_leaves_nothing(kind, hub, tmp_path):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(f"{kind}:org/modle")
    assert f"no model 'org/modle'; tried:\n  {kind}: {kind}:org/modle does not exist, or is private" in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if "org" in p.name]
    resolve(f"{kind}:org/model")
    with pytest.raises(ModelNotFoundError, match="near it: org/model"):
        resolve(f"{kind}:org/modle")


def test_a_missing_revision_is_named(kind, hub, tmp_path):
    with pytest.raises(ModelNotFoundError, match="has no revision 'v9'"):
        resolve(f"{kind}:org/model", revision="v9")
    assert not [p for p in tmp_path.rglob("*") if "v9" in p.name]
    check(resolve(f"{kind}:org/model", revision={"modelscope": "main", "hf": "master"}[kind]))  # the other hub's word


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["refuse", "refuse_listing"])
def test_a_gated_model(kind, hub, no_waiting, status, where):
    setattr(hub.manners, where, status)
    token, page = {"modelscope": ("MODELSCOPE_API_TOKEN", "/models/org/model"), "hf": ("HF_TOKEN", "/org/model")}[kind]
    refused(kind, ModelNotFoundError, "may not be read with this account", f"on {hub.address}{page}", f"set {token}")


def test_tokens_go_to_their_hub_and_nowhere_else(kind, hub, monkeypatch):
    monkeypatch.setenv({"modelscope": "MODELSCOPE_API_TOKEN", "hf": "HF_TOKEN"}[kind], "secret")
    resolve(f"{kind}:org/model")
    assert all(h.get("authorization") == "Bearer secret" for h in hub.headers)


def test_the_disk_is_too_small_and_that_is_known_before(kind, hub, monkeypatch):
    monkeypatch.setattr("llmkit.hub.cache.free_space", lambda folder: 500_000)
    variable = {"modelscope": "MODELSCOPE_CACHE", "hf": "HF_HUB_CACHE"}[kind]
    refused(kind, DownloadError, "needs 1.1 MB", "only 500.0 kB are free", variable)
    assert hub.file_requests() == []


@contextlib.contextmanager
def disk(folder: Path, size: str):
    """A file system of this size at `folder`; skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_disk_fills_up(kind, hub, tmp_path, monkeypatch, no_waiting):
    with disk(tmp_path / "small", "700k") as small:
        monkeypatch.setattr("llmkit.hub.fetch.require_space", lambda *_: None)  # another program takes the space meanwhile
        with pytest.raises(DownloadError, match=r"(?s)the disk is full .* free\); what came is kept.*cache_dir="):
            resolve(f"{kind}:org/model", cache_dir=small)
        with pytest.raises(ModelNotFoundError):
            resolve(f"{kind}:org/model", cache_dir=small, local_files_only=True)
        kept = sum(p.stat().st_size for p in small.rglob("*.incomplete"))
        assert kept > 500_000
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        check(resolve(f"{kind}:org/model", cache_dir=small))
        assert download_report().resumed_bytes == kept


def test_a_file_may_not_grow_further(kind, hub, monkeypatch):
    """As a full disk, for users who may not mount."""
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "1")  # the client takes it for a bad line and would wait 30 s
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = (f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, {hard}))\n"
            f"from llmkit.hub import resolve; resolve('{kind}:org/model')")  # fmt: skip
    with start(code) as child:
        _, err = child.communicate(timeout=60)
    assert "DownloadError" in err
    assert "the disk is full" in err
    assert "what came is kept" in err
    with pytest.raises(ModelNotFoundError, match="is missing or damaged"):
        resolve(f"{kind}:org/model", local_files_only=True)
    check(resolve(f"{kind}:org/model"))
    assert download_report().resumed_bytes > 500_000


def test_a_cache_that_may_only_be_read(kind, hub, tmp_path):
    with disk(tmp_path / "shared", "8m") as shared:
        subprocess.run(["mount", "-o", "remount,ro", str(shared)], check=True)
        with pytest.raises(DownloadError, match=r"(?s)cannot be written: Read-only file system.*(MODELSCOPE_CACHE|HF_HUB_CACHE)"):
            resolve(f"{kind}:org/model", cache_dir=shared)
        subprocess.run(["mount", "-o", "remount,rw", str(shared)], check=True)
        folder = resolve(f"{kind}:org/model", cache_dir=shared)
        os.utime(folder / "config.json", (1, 1))  # touched: read again, though that cannot be remembered
        subprocess.run(["mount", "-o", "remount,ro", str(shared)], check=True)
        hub.forget()
        check(resolve(f"{kind}:org/model", cache_dir=shared))
        assert hub.requests == []


def test_a_file_that_changed_is_fetched_again(kind, hub, no_waiting):
    folder = resolve(f"{kind}:org/model")
    (folder / "tokenizer.json").write_bytes(b"[2]" * 700)
    with pytest.raises(ModelNotFoundError, match="is missing or damaged"):
        resolve(f"{kind}:org/model", local_files_only=True)
    hub.forget()
    check(resolve(f"{kind}:org/model"))
    assert hub.sent == len(MODEL["tokenizer.json"])


def test_only_pickled_weights(kind, hub):
    del hub.models["org/model"]["model.safetensors"]
    refused(kind, ModelNotFoundError, "has pickled weights only", "allow_patterns")
    assert resolve(f"{kind}:org/model", allow_patterns="*.bin").is_dir()


def test_the_same_weights_twice_are_fetched_once(kind, hub):
    hub.models["org/model"] |= {"consolidated.safetensors": b"x" * 2000, "onnx/model.safetensors": b"x" * 2000}
    check(resolve(f"{kind}:org/model"), NEEDED)


def test_an_index_without_its_shard_from_another_tool_is_no_model(tmp_path):
    folder = tmp_path / "ms/models/org--model/snapshots/master"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes(MODEL[name])
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model-1.safetensors").write_bytes(MODEL["model.safetensors"])
    with pytest.raises(ModelNotFoundError, match=r"model-2\.safetensors is missing"):
        resolve("modelscope:org/model", local_files_only=True)
    (folder / "model-2.safetensors").write_bytes(MODEL["model.safetensors"][:-1])
    with pytest.raises(ModelNotFoundError, match=r"model-2\.safetensors is cut"):
        resolve("modelscope:org/model", local_files_only=True)
    (folder / "model-2.safetensors").write_bytes(MODEL["model.safetensors"])
    assert resolve("modelscope:org/model", local_files_only=True) == folder
    (folder / "x.incomplete").touch()
    with pytest.raises(LlmkitError, match="unfinished"):
        resolve("modelscope:org/model", local_files_only=True)
