"""%llmkit serve, status, logs and stop in real kernels; who outlives whom when a kernel is interrupted, restarted or killed."""

import os
import subprocess
import sys
import threading
import time

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from llmkit.notebook.run import run_notebook
from llmkit.server.handle.records import all_records


@pytest.fixture(scope="module")
def kernel(start_kernel):
    """One for the tests that do not end it."""
    return start_kernel()


@pytest.fixture
def server(kernel):
    """In the kernel: `server`, ready, its card drawn for the last time. Gives its pid."""
    kernel.run("server = %llmkit serve some-model")
    pid = int(kernel.value("server.wait().pid"))
    kernel.run("import threading\nfor t in threading.enumerate():\n    if t.name == 'llmkit-card':\n        t.join()")
    yield pid
    kernel.run("%llmkit stop all")


def faces(outputs):
    """The card in its last state."""
    (first,) = [o for o in outputs if o["type"] == "display_data"]
    updates = [o for o in outputs if o["type"] == "update_display_data"]
    assert all(u["transient"] == first["transient"] for u in updates)
    return [first, *updates][-1]["data"]


def result(outputs):
    """The cell's value; a card of before may still be drawn beside it."""
    (value,) = [o["data"] for o in outputs if o["type"] == "execute_result"]
    return value


# ---- what a cell shows


def test_serve_returns_at_once_with_a_card_that_follows_the_start(kernel):
    outputs = kernel.run("import os; os.environ['LLMKIT_FAKE'] = 'slow'\n%llmkit serve slow-model")
    card = faces(outputs)
    assert [o["type"] for o in outputs if o["type"] == "execute_result"] == [], "shown once"
    assert card["text/plain"].startswith("… llmkit server starting: slow-model")
    assert "<progress" in card["text/html"]
    kernel.begin("import time; time.sleep(4)")  # busy while the server starts
    updates = []
    end = time.monotonic() + 20
    while time.monotonic() < end and not any("server ready" in u["text/plain"] for u in updates):
        message = kernel.client.get_iopub_msg(timeout=20)
        if message["msg_type"] == "update_display_data":
            updates.append(message["content"]["data"])
    assert any("now: weights" in u["text/plain"] for u in updates)
    assert updates[-1]["text/plain"].startswith("● llmkit server ready: fake-model")
    kernel.run("del os.environ['LLMKIT_FAKE']\n%llmkit stop all")


def test_the_same_line_again_finds_the_living_server(kernel, server):
    again = kernel.run("again = %llmkit serve some-model")
    assert faces(again)["text/plain"].startswith("● llmkit server ready")
    assert kernel.value("again.pid, again == server") == f"({server}, True)"
    assert int(kernel.text("other = %llmkit serve some-model --new --wait\nprint(other.pid)")) != server


def test_the_function_shows_the_card_too_and_shows_it_once(kernel):
    outputs = kernel.run("import llmkit\nllmkit.serve('by-function')")
    assert faces(outputs)["text/plain"].startswith("● llmkit server ready: fake-model")
    assert [o for o in outputs if o["type"] == "execute_result"] == []
    kernel.run("%llmkit stop all")


def test_status_logs_and_stop(kernel, server):
    table = result(kernel.run("%llmkit status"))
    assert f"{server}" in table["text/plain"]
    assert "ends with this process" in table["text/html"]
    log = result(kernel.run("%llmkit logs -n 3"))
    assert "fake server for some-model" in log["text/plain"]
    assert log["text/html"].startswith("<pre")
    stopped = result(kernel.run("%llmkit stop"))
    assert "○ stopped" in stopped["text/plain"]
    assert not psutil.pid_exists(server)
    assert "no server is running" in result(kernel.run("%llmkit status"))["text/plain"]


def test_following_a_log_ends_by_the_stop_button_and_is_no_error(kernel, server):
    cell = kernel.begin("%llmkit logs -f")
    time.sleep(1)
    kernel.interrupt()
    outputs = kernel.messages(cell)
    assert [o["type"] for o in outputs if o["type"] != "stream"] == []
    assert "the server goes on" in "".join(o["text"] for o in outputs)
    assert psutil.pid_exists(server)


def test_mistakes_are_named_before_anything_starts(kernel, run_dir):
    before = len(all_records())
    for line, fix in (("serve m --max-modellen 3", "did you mean --max-model-len?"), ("serv", "did you mean serve?"),
                      ("serve --wiat", "did you mean --wait?"), ("stop nobody", "no server is ")):  # fmt: skip
        (error,) = [o for o in kernel.run(f"%llmkit {line}") if o["type"] == "error"]
        assert fix in "".join(error["traceback"])
    assert len(all_records()) == before


def test_a_failed_start_raises_when_it_is_waited_for_and_shows_in_the_card(kernel):
    kernel.run("os.environ['LLMKIT_FAKE'] = 'fail'")
    outputs = kernel.run("%llmkit serve nonsense --wait")
    (error,) = [o for o in outputs if o["type"] == "error"]
    assert error["ename"] == "ModelNotFoundError"
    assert error["traceback"][1] == "  -> llmkit list"
    assert "✗ llmkit server failed: nonsense" in faces(outputs)["text/plain"]
    kernel.run("del os.environ['LLMKIT_FAKE']")


def test_help_and_completion_know_the_servers_words(kernel):
    said = "".join(o["text"] for o in kernel.run("%llmkit serve --help"))
    assert "--max-model-len" in said
    assert "--wait" in said
    reply = kernel.client.complete("%llmkit serve --max-mod", reply=True, timeout=60)["content"]
    assert "--max-model-len" in reply["matches"]


# ---- who outlives whom


def test_an_interrupt_keeps_the_server_idle_and_busy(kernel, server):
    kernel.interrupt()  # nothing runs
    time.sleep(0.3)
    cell = kernel.begin("import time; time.sleep(60)")
    time.sleep(0.5)
    kernel.interrupt()
    assert any(o["type"] == "error" for o in kernel.messages(cell))
    assert kernel.value("server.state") == "ready"
    assert psutil.pid_exists(server)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("how", ["restart", "shutdown", "SIGKILL"])
def test_no_server_outlives_its_kernel(start_kernel, ends, how, busy):
    kernel = start_kernel()
    pid = int(kernel.text("server = %llmkit serve some-model --wait\nprint(server.pid)"))
    if busy:
        kernel.begin("import time\nwhile True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass")
        time.sleep(0.5)
    match how:
        case "restart":
            kernel.restart()
        case "shutdown":
            kernel.manager.shutdown_kernel(now=False)
        case "SIGKILL":
            kernel.kill()
    assert ends(pid, 5)
    if how == "restart":
        assert "no server is running" in result(kernel.run("%llmkit status"))["text/plain"]
    assert pid not in [r.pid for r in all_records() if r.alive]


def test_a_kernel_takes_up_the_server_of_another(start_kernel, kernel, server):
    other = start_kernel()
    table = result(other.run("%llmkit status"))["text/plain"]
    assert f"{server}" in table
    assert f"ends with process {kernel.value('os.getpid()')}" in table
    assert other.text("found = %llmkit serve some-model\nprint(found.pid, found.started_here)") == f"{server} False"


# ---- without a browser


def notebook(path, *cells):
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in ("%load_ext llmkit", *cells)]), path)
    return path


def test_a_failed_start_fails_a_run_without_a_browser_with_the_servers_own_error(tmp_path, run_dir):
    """The real command: the model is not there, and the server says so itself."""
    begin = time.monotonic()
    result = run_notebook(notebook(tmp_path / "a.ipynb", f"%llmkit serve {tmp_path}/no-such-model", "print('not reached')"),
                          out_dir=tmp_path / "runs")  # fmt: skip
    assert result.error is not None
    assert result.error.startswith("ModelNotFoundError"), result.error
    assert "no-such-model" in result.error
    assert time.monotonic() - begin < 60
    executed = nbformat.read(result.path, as_version=4)
    assert "not reached" not in str(executed.cells[-1].outputs)


def test_a_run_without_a_browser_waits_and_saves_the_card_as_it_ends(tmp_path, run_dir, monkeypatch):
    fake = os.path.join(os.path.dirname(__file__), "fake_server.py")
    code = f"import sys, llmkit.server.handle.start; llmkit.server.handle.start.COMMAND = (sys.executable, {fake!r})"
    result = run_notebook(notebook(tmp_path / "a.ipynb", code, "%llmkit serve m"), out_dir=tmp_path / "runs")
    assert result.error is None
    (output,) = nbformat.read(result.path, as_version=4).cells[-1].outputs
    assert output.data["text/plain"].startswith("● llmkit server ready: fake-model")
    assert [r for r in all_records() if r.alive] == []


def test_a_server_of_a_terminal_is_found_used_and_stopped_from_a_notebook(kernel, dummy_folder, run_dir, ends):
    """The real command; what the model says has no meaning."""
    command = [sys.executable, "-m", "llmkit", "serve", str(dummy_folder), "--load-format", "dummy", "--port", "0",
               "--max-model-len", "256", "--kv-cache-memory", "0.05", "--served-model-name", "from-a-terminal"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    terminal = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
    threading.Thread(target=terminal.wait, daemon=True).start()  # as a shell does: what has ended is no zombie
    try:
        assert terminal.stdout is not None
        assert b"from-a-terminal is served at" in terminal.stdout.readline()
        table = result(kernel.run("%llmkit status"))["text/plain"]
        assert "from-a-terminal" in table
        assert "on its own" in table
        said = kernel.run("%%llmkit chat --new --model from-a-terminal --max-tokens 5 --ignore-eos --out answer\nhello")
        assert "from-a-terminal" in faces(said)["text/plain"]
        assert kernel.value("answer.usage[1], answer.finish_reason") == "(5, 'length')"
        kernel.run("%llmkit stop from-a-terminal")
        assert ends(terminal.pid, 1)
    finally:
        terminal.kill()
        terminal.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "shutdown", "SIGKILL"])
def test_the_real_server_and_its_engine_live_through_interrupts_and_end_with_the_kernel(start_kernel, dummy_folder, ends, how):
    """While it answers: a server that is busy must notice, too."""
    kernel = start_kernel(fake=False)
    options = "--load-format dummy --max-model-len 8192 --kv-cache-memory 0.2 --new --wait"
    pid = int(kernel.text(f"server = %llmkit serve {dummy_folder} {options}\nprint(server.pid)"))
    family = [pid, *(p.pid for p in psutil.Process(pid).children(recursive=True))]
    assert len(family) >= 2, "the engine is a process of its own"
    kernel.interrupt()
    talking = "%%llmkit chat --new --model server --max-tokens 8000 --ignore-eos\nhello"
    cell = kernel.begin(talking)
    time.sleep(2)
    assert kernel.manager.is_alive()
    kernel.interrupt()
    assert [o["ename"] for o in kernel.messages(cell) if o["type"] == "error"] == ["Stopped"]
    assert kernel.value("server.state, server.pid") == f"('ready', {pid})"
    deadline = time.monotonic() + 5
    while kernel.value("server.stats()['running']") != "0":
        assert time.monotonic() < deadline, "the request goes on in the server"
    kernel.begin(talking)
    time.sleep(1)
    match how:
        case "restart":
            kernel.restart()
        case "shutdown":
            kernel.manager.shutdown_kernel(now=False)
        case "SIGKILL":
            kernel.kill()
    assert all(ends(member, 5) for member in family)
