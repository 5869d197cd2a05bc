"""`llmkit serve`: flags, failures that say what is wrong, what the starter is told."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from llmkit import cli
from llmkit.cli.parser import UsageError
from llmkit.cli.serve import plan_of
from llmkit.config import DEFAULT_MODEL
from llmkit.errors import ConfigError


def plan(*words: str):
    return plan_of(cli.parse(["serve", *words]))


def test_the_tutorials_command_line():
    asked = plan("--model", "/models/Qwen2-7B-Instruct", "--served-model-name", "Qwen2-7B-Instruct", "--max-model-len=2048",
                 "--host", "0.0.0.0", "--port", "8000", "--chat-template", "t.jinja")  # fmt: skip
    assert (asked.engine.model, asked.engine.max_model_len) == ("/models/Qwen2-7B-Instruct", 2048)
    assert asked.names == ("Qwen2-7B-Instruct",)
    assert (asked.serving.host, asked.serving.port, asked.server.chat_template) == ("0.0.0.0", 8000, "t.jinja")


def test_nothing_asked_is_the_default_model_on_this_machine_only():
    asked = plan()
    assert (asked.engine.model, asked.names) == (DEFAULT_MODEL, (DEFAULT_MODEL,))
    assert (asked.serving.host, asked.serving.port, asked.serving.api_server_count) == ("127.0.0.1", 8000, 1)


@pytest.mark.parametrize(("words", "seen"), [
    (["m", "--tensor-parallel-size", "1", "--disable-log-requests", "--swap-space", "4", "--gpu_memory_utilization", "0.8"],
     lambda p: p.engine.gpu_memory_utilization == 0.8),
    (["m", "--dtype", "half"], lambda p: p.engine.dtype == "float16"),
    (["m", "--generation-config", "vllm"], lambda p: p.engine.generation_config == p.server.generation_config == "none"),
    (["m", "--num-gpu-blocks-override", "64", "-tp", "1", "-pp", "1", "-dp", "1"], lambda p: p.engine.num_kv_blocks == 64),
    (["m", "--max-model-len", "4K", "--max-num-batched-tokens=8k"],
     lambda p: (p.engine.max_model_len, p.engine.max_num_batched_tokens) == (4096, 8000)),
    (["m", "--served_model_name", "x", "--log_level", "info"], lambda p: (p.names, p.serving.log_level) == (("x",), "info")),
    (["m", "--enable-chunked-prefill", "--no-enable-prefix-caching"], lambda p: not p.engine.enable_prefix_caching),
    (["m", "--api-key", "a", "b", "--api-key", "c"], lambda p: p.server.api_keys == ("a", "b", "c")),
    (["m", "--allowed-origins", '["https://a.b"]'], lambda p: p.server.allowed_origins == ("https://a.b",)),
    (["m", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"], lambda p: p.server.tool_call_parser == "hermes"),
    (["m", "--override-generation-config", '{"top_k": 3}'], lambda p: p.server.override_generation_config == {"top_k": 3}),
    (["m", "--uvicorn-log-level", "info", "--disable-frontend-multiprocessing"], lambda p: p.serving.log_level == "info"),
])  # fmt: skip
def test_vllms_spelling_is_understood(words, seen):
    assert seen(plan(*words))


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["m", "--max-model-length", "5"], "no option --max-model-length", "did you mean --max-model-len?"),
    (["m", "--enable-lora"], "no option --enable-lora", "merge the adapter"),
    (["m", "-O3"], "no option -O 3", "enforce_eager"),
    (["m", "--swap-space", "16"], "no option --swap-space 16", "never swapped"),
    (["m", "--tool-call-parser", "hermess"], "cannot be 'hermess'", "did you mean hermes?"),
    (["m", "--middleware", "x.y"], "no option --middleware x.y", "proxy"),
    (["m", "--override-generation-config", "[1]"], "invalid JSON object value", "--help"),
    (["--api-key", "k", "Qwen/Qwen2"], "there is no MODEL", "name the model first"),
    (["m", "--config", "/no/such.yaml"], "cannot read", ""),
])  # fmt: skip
def test_what_is_not_there_is_refused_by_name(words, what, hint):
    with pytest.raises(UsageError) as e:
        plan(*words)
    assert what in e.value.message
    assert hint in (e.value.hint or "")


@pytest.mark.parametrize("words", [["--tensor-parallel-size", "2"], ["--port", "70000"], ["--ssl-keyfile", "k"],
                                   ["--request-timeout", "0"], ["--max-model-len", "0"]])  # fmt: skip
def test_values_that_cannot_work_are_refused_before_anything_starts(words):
    with pytest.raises(ConfigError):
        plan("m", *words)


def test_flags_from_a_file_count_less_than_typed_ones(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\nport: 1234\nserved_model_name: [a, b]\nenable-prefix-caching: false\ndisable-log-requests: true\n"
                    "override-generation-config: {top_k: 3}\nmax-model-len: 100\n")  # fmt: skip
    asked = plan("--config", str(file), "--max-model-len", "200")
    assert (asked.engine.model, asked.serving.port, asked.names) == ("m", 1234, ("a", "b"))
    assert (asked.engine.max_model_len, asked.engine.enable_prefix_caching) == (200, False)
    assert asked.server.override_generation_config == {"top_k": 3}


@pytest.mark.parametrize(("text", "message"), [("prot: 1", "no option --prot"), ("- a", "needs lines like"),
                                               ("enable-docs: 7", "is a switch"), ("a: [", "is no YAML")])  # fmt: skip
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        plan("--config", str(file))


# ---- a real server


def test_the_tutorials_module_serves_and_the_starter_is_told(start, dummy_folder):
    early = start("--model", str(dummy_folder), "--served-model-name", "one", "two", "--max-model-len=2048",
                  command=("llmkit.entrypoints.openai.api_server",))  # fmt: skip
    url = early.until("an address", lambda: early.state.get("url"))
    answer = early.http.get(f"{url}/health")
    if answer.status_code != 200:  # the port answers before anything is loaded
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert answer.json()["stage"]
    server = early.ready()
    state = server.state
    assert state["pid"] == server.process.pid
    assert (state["served_model_names"], state["error"], state["stage"]) == (["one", "two"], None, None)
    assert {"find the model", "import torch", "weights", "until ready"} <= set(state["stages"])
    assert state["log"] == str(server.log)
    assert server.log.read_text().startswith(f"llmkit: one is served at {url}; KV cache ")
    assert server.log.read_text().count("\n") == 1
    assert len(server.complete(max_tokens=5, model="two")["choices"][0]["text"]) > 0
    assert server.info()["facts"]["max_model_len"] == 2048


def test_no_front_imports_torch(server):
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in mapped
    assert "tokenizers" in mapped
    (engine,) = server.remember()
    assert "libtorch" in Path(f"/proc/{engine.pid}/maps").read_text()


@pytest.mark.parametrize(("words", "kind", "message"), [
    (["--max-model-len", "999999"], "ConfigError", "longer than the model's"),
    (["--kv-cache-memory", "0.0000001"], "OutOfMemoryError", "no room for a KV cache"),
    (["--host", "no.such.host.invalid"], "ConfigError", "is no address"),
    (["--chat-template", "/no/such.jinja"], "TokenizerError", "/no/such.jinja"),
    (["--ssl-certfile", "/no/such", "--ssl-keyfile", "/no/such"], "ConfigError", "the certificate or its key cannot be used"),
    (["--tokenizer", "/no/such/tokenizer"], "ModelNotFoundError", "/no/such/tokenizer"),
])  # fmt: skip
def test_a_start_that_fails_says_why_and_exits_1(start, words, kind, message):
    server = start(*words)
    assert server.wait(60) == 1
    error = server.state["error"]
    assert (server.state["state"], error["type"]) == ("failed", kind)
    assert message in error["message"]
    said = server.log.read_text()
    assert f"error: {error['message']}" in said
    assert error["hint"] in said
    assert "Traceback" not in said


def test_a_model_that_is_not_there(start, tmp_path):
    server = start(model=tmp_path / "nothing")
    assert server.wait(60) == 1
    assert server.state["error"]["type"] == "ModelNotFoundError"


def test_a_port_that_is_taken(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start("--port", str(port))
        assert server.wait(30) == 1
    error = server.state["error"]
    assert error["message"].startswith(f"port {port} on 127.0.0.1 cannot be listened on: Address already in use (process ")
    assert error["hint"] == "--port 0 takes a free one"


def test_a_unix_socket(start, tmp_path):
    import httpx

    path = tmp_path / "s"
    server = start("--uds", str(path)).ready()
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
        assert client.get("http://x/health").json() == {"status": "ok"}
    server.process.terminate()
    assert server.wait() == 0
    assert not path.exists()


def test_the_run_file_is_whole_at_any_moment(start):
    server = start()
    states = set()
    while server.process.poll() is None and "ready" not in states:
        states.add(json.loads(server.run_file.read_text())["state"] if server.run_file.exists() else None)
    assert states - {None} == {"starting", "ready"}
    server.ready()


def test_https(start, tmp_path):
    import shutil
    import ssl
    import subprocess

    import httpx

    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make a certificate with")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, *subject],
                   check=True, capture_output=True)  # fmt: skip
    server = start("--ssl-certfile", str(cert), "--ssl-keyfile", str(key)).ready()
    assert server.url.startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context(cafile=str(cert))
    assert httpx.get(f"{server.url}/health", verify=trusting, trust_env=False).json() == {"status": "ok"}


def test_the_default_model_answers(start):
    server = start("--dtype", "float32", model=DEFAULT_MODEL, weights="auto").ready()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"model": DEFAULT_MODEL, "messages": question, "max_tokens": 30, "temperature": 0}
    answer = server.http.post(f"{server.url}/v1/chat/completions", json=asked).raise_for_status().json()
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_localhost_is_the_address_that_clients_try(start):
    server = start("--host", "localhost").ready()
    assert server.url.startswith("http://127.0.0.1:")
    assert server.healthy()
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5]
    assert int(soft) >= min(65536, int(hard) if hard.isdigit() else 65536)


def test_while_a_model_is_fetched_that_is_the_stage(tmp_path):
    from llmkit.server.processes.launch import Launcher
    from llmkit.server.processes.run_file import RunFile
    from llmkit.server.processes.wire import Stage

    file = RunFile(str(tmp_path / "run.json"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        launcher = Launcher(plan("m"), sock, file)
        launcher._on_stage(Stage("import torch", {}))
        assert file.facts["stage"] == "find the model"
        launcher._stages["find the model"] = 9.0
        launcher._on_stage(Stage("weights", {"import torch": 1.0}))
    assert (file.facts["stage"], file.facts["stages"]) == ("weights", {"import torch": 1.0, "find the model": 9.0})
