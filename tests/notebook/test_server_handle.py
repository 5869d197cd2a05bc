"""llmkit.serve and its Server, against a server without a model: starting, finding again, waiting, failing, stopping."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

import llmkit
from llmkit.errors import EngineUnavailableError, LlmkitError, ModelNotFoundError, UnknownOptionError
from llmkit.server.handle import server as server_module
from llmkit.server.handle import start as handle
from llmkit.server.handle.list_view import servers
from llmkit.server.handle.server import Server, ServerDiedError, ServerTimeoutError, find, records, stop_servers
from llmkit.server.handle.words import command_words

pytestmark = pytest.mark.usefixtures("fake_servers")


def test_it_serves_and_stops_and_leaves_no_process(ends):
    with llmkit.serve("some-model", max_model_len=64) as server:
        assert server.state == "ready"
        assert server.model == "fake-model"
        assert server.url.startswith("http://127.0.0.1:")
        assert server.base_url == f"{server.url}/v1"
        assert server.stats() == {"requests": 1, "aborted": 0}
        assert "fake server for some-model" in server.logs()
        pid = server.pid
    assert ends(pid, 0.1)
    assert server.state == "stopped"
    server.stop()
    with pytest.raises(EngineUnavailableError, match="was stopped"):
        _ = server.url


def test_one_whose_parent_does_not_notice_its_end_is_stopped_at_once():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # a zombie once it has ended
    try:
        begin = time.monotonic()
        server_module._end(psutil.Process(child.pid), 10)
        assert time.monotonic() - begin < 5
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    finally:
        child.kill()
        child.wait()


def test_the_openai_client_is_ready_made_and_takes_no_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with llmkit.serve() as server:
        stream = server.client().chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "你好"}], stream=True
        )
        assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == "echo: 你好 (of 1)"
        assert str(server.async_client().base_url) == f"{server.base_url}/"
        assert server.stats()["requests"] == 1


def test_the_same_arguments_find_the_living_server_however_they_are_spelled():
    first = llmkit.serve("m", max_model_len=64, enforce_eager=True)
    words = ["serve", "m", "--enforce-eager", "--port", "0", "--max_model_len=64"]
    assert handle.start(words) == first
    assert handle.start([*words, "--seed", "1"]) != first
    assert handle.start(words, reuse=False) != first
    first.stop()
    again = llmkit.serve("m", max_model_len=64, enforce_eager=True)
    assert again != first


def test_without_a_port_the_usual_one_is_taken_if_it_is_free(monkeypatch):
    monkeypatch.setattr(handle, "_is_taken", lambda host, port: (host, port) == ("127.0.0.1", 8000))
    server = handle.start(["serve", "m"])
    assert handle.start(["serve", "m"]) == server
    assert records.read_json(server.folder / records.STARTED_FILE)["words"] == ["serve", "m", "--port", "0"]
    other = handle.start(["serve", "m", "--port", "8001"])
    assert records.read_json(other.folder / records.STARTED_FILE)["words"] == ["serve", "m", "--port", "8001"]


def test_a_port_is_taken_while_somebody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert handle._is_taken("127.0.0.1", port)
    assert not handle._is_taken("127.0.0.1", port)


def test_another_process_finds_it_and_does_not_end_it():
    server = llmkit.serve("m")
    code = """
import sys
from llmkit.server.handle import start as handle
handle.COMMAND = tuple(sys.argv[1:])
with handle.serve("m") as server:
    print(server.started_here, server.url, server.record.owner[0], flush=True)
"""
    done = script(code)
    assert done.stdout.split() == ["False", server.url, str(os.getpid())]
    assert server.state == "ready"


def test_it_returns_at_once_and_waits_when_it_is_used(monkeypatch):
    monkeypatch.setenv("LLMKIT_FAKE", "slow")
    begin = time.monotonic()
    server = llmkit.serve("slow", wait=False)
    assert time.monotonic() - begin < 2
    assert server.state == "starting"
    with pytest.raises(ServerTimeoutError, match=r"not ready after 0\.2 s; it is still at"):
        server.wait(0.2)
    assert server.state == "starting", "it goes on"
    assert "now: " in repr(server)
    seen = []
    assert server.wait(on_change=seen.append) is server
    assert [r.stage for r in seen][-2:] == ["weights", ""]


def test_a_failed_start_raises_the_servers_own_error(monkeypatch):
    monkeypatch.setenv("LLMKIT_FAKE", "fail")
    with pytest.raises(ModelNotFoundError, match="there is no model 'nonsense'") as error:
        llmkit.serve("nonsense")
    assert error.value.hint == "llmkit list"
    (failed,) = [s for s in servers(gone=True) if s.record.model == "nonsense"]
    assert "✗ llmkit server failed: nonsense\n  ModelNotFoundError: there is no model" in repr(failed)
    assert 'role="alert"' in failed._repr_html_()
    assert "fake server for nonsense" in failed._repr_html_()


def test_a_process_that_dies_without_a_word_is_quoted(monkeypatch):
    monkeypatch.setenv("LLMKIT_FAKE", "die")
    with pytest.raises(ServerDiedError, match="something broke before anything could be said"):
        llmkit.serve("m")


def test_a_server_that_is_killed_has_died(ends):
    server = llmkit.serve("m")
    os.kill(server.pid, signal.SIGKILL)
    assert ends(server.pid, 2)
    assert server.state == "died"
    with pytest.raises(ServerDiedError):
        server.wait()
    assert handle.start(["serve", "m"]) != server, "a dead one is not found again"


def test_an_interrupt_ends_the_waiting_not_the_server(monkeypatch):
    monkeypatch.setenv("LLMKIT_FAKE", "slow")
    server = llmkit.serve("interrupted", wait=False)

    def interrupt(record):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        server.wait(on_change=interrupt)
    assert server.state == "starting"


def test_a_forked_child_does_not_hold_the_pipe(ends):
    """multiprocessing's fork copies every descriptor: the server would live as long as the last worker."""
    code = """
import os, sys, time
from llmkit.server.handle import start as handle
handle.COMMAND = tuple(sys.argv[1:])
server = handle.serve("m")
if os.fork() == 0:
    os.close(1)
    time.sleep(60)
print(server.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    begun = subprocess.Popen([sys.executable, "-c", code, *handle.COMMAND], stdout=subprocess.PIPE, text=True, env=environment(),
                             start_new_session=True)  # fmt: skip
    assert begun.stdout is not None
    pid = int(begun.stdout.readline())
    assert ends(pid, 5)
    begun.wait()
    os.killpg(begun.pid, signal.SIGKILL)
    begun.stdout.close()


def test_a_script_that_ends_takes_its_server_along(ends):
    code = ("import sys\nfrom llmkit.server.handle import start as handle\n"
            "handle.COMMAND = tuple(sys.argv[1:])\nprint(handle.serve('m').pid)")  # fmt: skip
    done = script(code)
    assert ends(int(done.stdout), 0.1)


def script(code):
    command = [sys.executable, "-c", code, *handle.COMMAND]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment())


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


# ---- words


@pytest.mark.parametrize(("options", "words"), [
    ({}, []),
    ({"port": 8001, "max_model_len": None}, ["--port=8001"]),
    ({"enforce_eager": True, "enable_prefix_caching": False}, ["--enforce-eager", "--no-enable-prefix-caching"]),
    ({"max_model_len": 2048, "dtype": "float32"}, ["--max-model-len=2048", "--dtype=float32"]),
])  # fmt: skip
def test_keyword_arguments_are_flags(options, words):
    assert command_words("m", options) == ["serve", "m", *words]


def test_several_names_are_understood():
    from llmkit.cli import parse

    one, two = (parse(command_words("m", {"served_model_name": names})) for names in ("a", ["a", "b"]))
    names = next(name for name in vars(two) if name.startswith("served_model_name"))
    assert [list(getattr(one, names)), list(getattr(two, names))] == [["a"], ["a", "b"]]


def test_an_unknown_option_is_refused_before_anything_is_started(run_dir):
    before = len(list(run_dir.iterdir()))
    with pytest.raises(UnknownOptionError, match="did you mean 'max_model_len'"):
        llmkit.serve("m", max_modellen=3)
    assert len(list(run_dir.iterdir())) == before


# ---- records and faces


def test_cards_carry_no_memory_address_and_name_what_counts():
    server = llmkit.serve("m")
    text, html = repr(server), server._repr_html_()
    assert text.splitlines()[0] == "● llmkit server ready: fake-model"
    assert f"{server.url}/v1 · pid {server.pid} · ends with this process" in text
    assert "0x" not in text
    assert 'aria-label="llmkit server ready: fake-model"' in html
    assert "var(--jp-ui-font-color1" in html
    assert "<script" not in html
    server.stop()
    assert repr(server).startswith("○ llmkit server stopped: fake-model")


def test_the_list_shows_them_and_one_is_found_by_any_name():
    first, second = llmkit.serve("one"), llmkit.serve("two")
    assert servers() == [second, first]
    assert "● ready  fake-model  http://127.0.0.1:" in repr(servers())
    assert servers()._repr_html_().count("<tr>") == 3
    assert find() == second
    assert find("one") == find(first.pid) == find(first.record.port) == first
    with pytest.raises(EngineUnavailableError, match=r"no server is called 'three'") as error:
        find("three")
    assert f"(pid {first.pid})" in (error.value.hint or "")
    assert stop_servers("one") == [first]
    assert stop_servers("all") == [second]
    assert repr(servers()) == "no server is running"
    with pytest.raises(EngineUnavailableError, match="no server is running"):
        stop_servers(None)


def test_a_number_that_another_process_has_now_is_not_the_server(run_dir):
    folder = records.new_folder()
    me = psutil.Process()
    records.write_json(folder / records.STARTED_FILE, {"pid": me.pid, "create_time": me.create_time() - 100, "key": "k"})
    assert Server(folder).state == "died"


def test_old_folders_make_room_and_a_missing_one_is_an_error(run_dir, monkeypatch):
    monkeypatch.setattr(records, "KEPT", 2)
    for _ in range(4):
        folder = records.new_folder()
        (folder / records.STARTED_FILE).write_text(json.dumps({"pid": 2**22 + 1, "create_time": 1.0, "started": 1.0}))
    records.new_folder()
    assert len([r for r in records.all_records() if not r.alive]) == 2
    with pytest.raises(LlmkitError, match="folder is gone"):
        _ = Server(run_dir / "nothing").record


def test_logs_of_any_length(tmp_path):
    from llmkit.server.handle.logs import tail

    path = tmp_path / "log"
    assert tail(path, 3) == ""
    path.write_text("\n".join(f"line {i} " + "x" * 300 for i in range(1000)) + "\n")
    assert [line.split()[1] for line in tail(path, 3).splitlines()] == ["997", "998", "999"]
    assert tail(path, 2)._repr_html_().startswith("<pre")


def test_the_shell_has_the_same_words(capsys):
    from llmkit.cli import main

    server = llmkit.serve("m")
    assert main(["status"]) == 0
    assert main(["status", "--json"]) == 0
    assert main(["logs", "m", "-n", "1"]) == 0
    assert main(["stop", "m"]) == 0
    out = capsys.readouterr().out
    assert "● ready" in out
    assert f'"pid": {server.pid}' in out
    assert f"stopped fake-model (pid {server.pid})" in out
    assert main(["stop"]) == 1
    assert "no server is running" in capsys.readouterr().err
