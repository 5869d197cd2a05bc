"""Every interruption a transfer can meet, at both hubs, with their real clients: it ends in verified files, and the server counts
how much it had to send."""

import json
import random
import signal
import time

import pytest
from conftest import MODEL, NEEDED, WANTED_BYTES, check, everything, start
from fake_hubs import FakeHub, safetensors

from llmkit.hub import download_report, resolve
from llmkit.hub.manifest import Manifest

CUTS = sorted(random.Random(7).sample(range(1, 1 << 20), 20))


def verified(folder) -> bool:
    manifest = Manifest.read(folder)
    assert manifest is not None
    return set(manifest.asked) == NEEDED and all(manifest.is_verified(folder, f) for f in manifest.asked_files())


def fetch_whole(kind, hub, at_most=1.05):
    """Resolve, check every byte, and that the server sent no more than `at_most` times the model's size."""
    model = hub.models["org/model"]
    size = sum(len(model[name]) for name in NEEDED)
    folder = resolve(f"{kind}:org/model")
    check(folder, model=model)
    assert verified(folder)
    print(f"{kind}: server sent {hub.sent:,} of {size:,} bytes, {hub.sent / size:.4f} x; {download_report()}")
    assert hub.sent <= at_most * size
    return folder


def test_whole(kind, hub, capsys):
    fetch_whole(kind, hub, at_most=1.0)
    report = download_report()
    assert (report.source, report.bytes, report.resumed_bytes, report.files) == (kind, WANTED_BYTES, 0, len(NEEDED))
    assert report.seconds > 0
    (line,) = capsys.readouterr().err.splitlines()  # one display, ours; neither bars nor warnings of the client
    assert line.startswith(f"{kind}:org/model: 1.1 MB in ")
    assert "5 files" in line


@pytest.mark.parametrize("cut", CUTS)
def test_cut_once(kind, hub, no_waiting, cut, capsys):
    hub.manners.cuts = [cut]
    fetch_whole(kind, hub)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def larger(hub):
    """16 MiB of weights: large against what lies in sockets' buffers when a process dies."""
    hub.models["org/model"]["model.safetensors"] = safetensors(random.Random(2).randbytes(16 << 20))


def test_cut_twenty_times_in_one_transfer(kind, hub, larger, no_waiting):
    hub.manners.cuts = [random.Random(n).randrange(600_000, 800_000) for n in range(20)]
    fetch_whole(kind, hub)
    assert hub.manners.cuts == []


def test_killed_and_resumed_by_another_process(kind, hub, larger, tmp_path):
    hub.manners.pace = 0.01
    with start(f"from llmkit.hub import resolve; resolve('{kind}:org/model')") as child:
        deadline = time.monotonic() + 30
        while hub.sent < 5_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert 5_000_000 <= hub.sent < 16_000_000
    hub.manners.pace = 0
    time.sleep(0.1)  # the server notices that nobody reads
    fetch_whole(kind, hub)
    assert download_report().resumed_bytes > 4_000_000
    assert not [name for name in everything(tmp_path) if "incomplete" in name]


def test_half_a_model_does_not_load(kind, hub, no_waiting):
    from llmkit.errors import LlmkitError

    hub.manners.cuts = [300_000, *[0] * 200]
    with pytest.raises(LlmkitError, match="call again"):
        resolve(f"{kind}:org/model")
    with pytest.raises(LlmkitError, match="is missing or damaged"):
        resolve(f"{kind}:org/model", local_files_only=True)
    hub.manners.cuts = []
    fetch_whole(kind, hub)
    assert download_report().resumed_bytes >= 290_000


def test_a_server_that_ignores_range(kind, hub, no_waiting):
    hub.manners.ignores_range, hub.manners.cuts = True, [500_000]
    fetch_whole(kind, hub, at_most=1.6)
    assert download_report().resumed_bytes == 0


def test_a_server_that_ignores_range_after_a_kill(kind, hub, no_waiting):
    hub.manners.cuts = [500_000, *[0] * 200]
    with pytest.raises(OSError):
        resolve(f"{kind}:org/model")
    hub.manners.cuts, hub.manners.ignores_range = [], True
    fetch_whole(kind, hub, at_most=1.6)
    assert download_report().resumed_bytes == 0
    assert download_report().bytes >= len(MODEL["model.safetensors"])


def test_busy_with_retry_after(kind, hub, no_waiting):
    hub.manners.busy, hub.manners.busy_listing = 4, 1
    fetch_whole(kind, hub)


def test_redirected_to_another_host(kind, hub, no_waiting, monkeypatch):
    """By its name another: to another port of the same host huggingface_hub 1.33 takes the token along."""
    store = FakeHub()
    store.models["org/model"] = dict(MODEL)
    store.manners.cuts = [600_000]
    hub.manners.redirect = store.address.replace("127.0.0.1", "localhost")
    monkeypatch.setenv({"modelscope": "MODELSCOPE_API_TOKEN", "hf": "HF_TOKEN"}[kind], "secret")
    try:
        check(resolve(f"{kind}:org/model"))
        assert any("authorization" in h for h in hub.headers)
        assert not any("authorization" in h for h in store.headers), "the token went to a stranger"
        assert hub.sent == 0
        assert store.sent <= 1.05 * WANTED_BYTES
    finally:
        store.close()


def test_a_line_that_falls_silent(kind, hub, no_waiting, monkeypatch):
    import huggingface_hub.constants
    import modelscope_hub._legacy_api

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(modelscope_hub._legacy_api, "DOWNLOAD_TIMEOUT", 0.5)
    hub.manners.stalls = [400_000]
    begin = time.monotonic()
    fetch_whole(kind, hub)
    assert time.monotonic() - begin < 2.9, "the stall lasts 3 s"


def test_a_slow_server(kind, hub):
    hub.manners.pace = 0.02
    fetch_whole(kind, hub, at_most=1.0)


def test_two_processes_share_the_work(kind, hub):
    hub.manners.pace = 0.1
    code = f"from llmkit.hub import resolve, download_report; resolve('{kind}:org/model'); print(download_report().bytes)"
    with start(code) as one, start(code) as two:
        outs = [p.communicate(timeout=60) for p in (one, two)]
    assert sorted(int(out) for out, _ in outs) == [0, WANTED_BYTES], outs
    assert any("another process is fetching this model; waiting for it" in err for _, err in outs)
    assert hub.sent == WANTED_BYTES


def test_patterns_then_the_whole_model_fetches_only_the_rest(kind, hub):
    folder = resolve(f"{kind}:org/model", allow_patterns="*.safetensors")
    check(folder, {"model.safetensors"})
    before = hub.sent
    assert fetch_whole(kind, hub) == folder
    assert download_report().bytes == WANTED_BYTES - before
    hub.forget()
    assert resolve(f"{kind}:org/model", allow_patterns=["*.json"]) == folder
    assert hub.requests == []
    resolve(f"{kind}:org/model", allow_patterns="*.py")
    check(folder, NEEDED | {"modeling_x.py"})


def test_two_names_of_one_content(kind, hub):
    hub.models["org/model"]["copy.bin"] = hub.models["org/model"]["pytorch_model.bin"]
    folder = resolve(f"{kind}:org/model", allow_patterns="*.bin")
    assert [(folder / name).read_bytes() for name in ("copy.bin", "pytorch_model.bin")] == [MODEL["pytorch_model.bin"]] * 2


def test_a_headless_notebook_saves_the_final_state_of_one_display(kind, hub):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    hub.manners.pace, hub.manners.cuts = 0.05, [500_000]
    cell = new_code_cell(f"import llmkit; path = llmkit.download('{kind}:org/model')")
    notebook = new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (shown,) = notebook.cells[0].outputs
    text = shown["data"]["text/plain"]
    assert text.startswith(f"{kind}:org/model: 1.1 MB in ")
    assert "5 files" in text
    assert 'max="1050838" value="1050838"' in shown["data"]["text/html"]


def test_an_interrupt_stops_and_keeps_what_came(kind, hub):
    hub.manners.pace = 0.05
    with start(f"from llmkit.hub import resolve; resolve('{kind}:org/model')") as child:
        while hub.sent < 300_000:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
    assert "KeyboardInterrupt" in err
    hub.manners.pace = 0
    fetch_whole(kind, hub, at_most=1.5)
    assert download_report().resumed_bytes > 100_000


def test_the_manifest_says_where_a_model_came_from(kind, hub):
    folder = resolve(f"{kind}:org/model")
    note = json.loads((folder / ".llmkit.json").read_text())
    assert (note["source"], note["id"], note["revision"]) == (kind, "org/model", {"modelscope": "master", "hf": "main"}[kind])
