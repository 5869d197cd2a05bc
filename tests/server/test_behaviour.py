"""How the server behaves when things go wrong: wrong bodies, wrong keys, clients that leave, engines that die."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from llmkit.errors import EngineError, EngineUnavailableError, QueueFullError
from llmkit.server.options import ServerOptions

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


def is_openai_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


# ---- what is asked


def test_an_unknown_model_is_a_404_with_those_served(server):
    for path, body in (("chat/completions", CHAT), ("completions", {"prompt": "a"})):
        error = is_openai_error(httpx.post(f"{server.v1}/{path}", json={"model": "gpt-4", **body}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "smollm2, another-name" in error["message"]
    assert httpx.get(f"{server.v1}/models/smollm2").json()["max_model_len"] == 1024
    is_openai_error(httpx.get(f"{server.v1}/models/org/nix"), 404)
    assert [m["id"] for m in httpx.get(f"{server.v1}/models").json()["data"]] == ["smollm2", "another-name"]


def test_health_version_and_paths_that_are_not_there(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.post(f"{server.url}/ping").status_code == 200
    assert set(httpx.get(f"{server.url}/version").json()) == {"version"}
    is_openai_error(httpx.get(f"{server.v1}/nothing"), 404)
    is_openai_error(httpx.get(f"{server.v1}/chat/completions"), 405)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"null", "application/json", 400),
        (b'"text"', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json", 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "a", "user": "\\udfff"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": ' + b"[" * 150 + b"]" * 150 + b"}", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b"prompt=a", "application/x-www-form-urlencoded", 415),
        (b"a", "multipart/form-data", 415),
        (b'{"prompt": "a", "max_tokens": 1}', "application/json; charset=utf-8", 200),
        (b'{"prompt": "a", "max_tokens": 1}', "application/vnd.api+json", 200),
    ],
)
def test_no_body_breaks_the_server(server, content, kind, status):
    told = httpx.post(f"{server.v1}/completions", content=content, headers={"Content-Type": kind})
    assert told.status_code == status
    if status != 200:
        is_openai_error(told, status)


def test_a_body_too_large_is_a_413(serve):
    server = serve(max_body_bytes=1000)
    large = {"prompt": "a" * 2000}
    assert "1000" in is_openai_error(httpx.post(f"{server.v1}/completions", json=large), 413)["message"]

    def unmeasured():
        for _ in range(20):
            yield b" " * 100

    headers = {"Content-Type": "application/json"}
    is_openai_error(httpx.post(f"{server.v1}/completions", content=unmeasured(), headers=headers), 413)


def test_keys(serve):
    server = serve(api_keys=("one", "two"))
    wrong = ("Bearer three", "one", "Bearer", "Bearer ö", "Basic one")
    for headers in ({}, {"x-api-key": ""}, *({"Authorization": value} for value in wrong)):
        refused = httpx.get(f"{server.v1}/models", headers={k: v.encode() for k, v in headers.items()})
        assert is_openai_error(refused, 401)["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
    for headers in ({"Authorization": "Bearer one"}, {"authorization": "bearer two"}, {"x-api-key": "two"}):
        assert httpx.get(f"{server.v1}/models", headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 401


def test_browsers_may_call_from_where_the_operator_says(serve):
    server = serve(allowed_origins=("http://a.example",), api_keys=("k",))
    asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization"}  # fmt: skip
    assert httpx.options(f"{server.v1}/models", headers=asked).headers["access-control-allow-origin"] == "http://a.example"
    refused = httpx.get(f"{server.v1}/models", headers={"Origin": "http://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://a.example")
    other = httpx.options(f"{server.v1}/models", headers=asked | {"Origin": "http://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_request_ids_go_in_and_out(server):
    assert httpx.get(f"{server.url}/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    own = httpx.get(f"{server.v1}/nothing", headers={"X-Request-Id": "x" * 500}).headers["x-request-id"]
    assert len(own) == 32
    twice = [httpx.post(f"{server.v1}/chat/completions", json=CHAT, headers={"X-Request-Id": "same"}).json()["id"] for _ in "ab"]
    assert twice[0] != twice[1]


def test_the_docs_load_without_a_cdn(server):
    page = httpx.get(f"{server.url}/docs").text
    assert "://" not in page
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/health"} <= set(schema["paths"])
    assert not any("422" in o["responses"] for p in schema["paths"].values() for o in p.values())
    assert "messages" in schema["components"]["schemas"]["ChatRequest"]["required"]


def test_docs_can_be_switched_off(serve):
    server = serve(enable_docs=False)
    assert [httpx.get(f"{server.url}{p}").status_code for p in ("/docs", "/openapi.json")] == [404, 404]


# ---- clients that leave


def idle(llm: Any, seconds: float = 2.0) -> bool:
    """Whether the engine comes to rest, with all its blocks free, within so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = llm.stats()
        if stats["running"] == stats["waiting"] == 0:
            return stats["kv_blocks_free"] == stats["kv_blocks_total"]
        time.sleep(0.02)
    return False


def test_a_cut_stream_frees_its_blocks(server, llm):
    async def cut(client: httpx.AsyncClient) -> None:
        body = CHAT | {"max_tokens": 900, "ignore_eos": True, "stream": True}
        async with client.stream("POST", f"{server.v1}/chat/completions", json=body) as answer:
            async for _ in answer.aiter_bytes():
                break

    async def cut_all() -> None:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            await asyncio.gather(*(cut(client) for _ in range(50)))

    asyncio.run(cut_all())
    assert idle(llm)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_gives_up_waiting_frees_its_blocks(server, llm, path):
    body = (CHAT if path == "chat/completions" else {"prompt": ["Hi", "Ho"]}) | {"max_tokens": 900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.v1}/{path}", json=body, timeout=0.5)
    assert idle(llm)


# ---- engines that misbehave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [EngineUnavailableError("it died"), QueueFullError("too many wait")])
def test_an_engine_that_cannot_answer_is_a_503_to_come_again(stub, error, stream):
    server = stub(error=error, error_after=0)
    refused = httpx.post(f"{server.v1}/chat/completions", json=CHAT | {"stream": stream}, headers={"X-Request-Id": "me"})
    assert str(error) in is_openai_error(refused, 503)["message"]
    assert (refused.headers["retry-after"], refused.headers["x-request-id"]) == ("5", "me")


def test_an_engine_that_is_not_ready_is_a_503_with_its_stage(stub):
    server = stub()
    server.engine.healthy, server.engine.stage = False, "weights"
    for told in (httpx.post(f"{server.v1}/chat/completions", json=CHAT), httpx.get(f"{server.v1}/models")):
        assert "weights" in is_openai_error(told, 503)["message"]
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["stage"], health.headers["retry-after"]) == (503, "weights", "5")


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", {"prompt": "a"})])
def test_an_error_in_the_middle_of_a_stream_is_its_last_event(stub, path, body):
    server = stub(error=EngineUnavailableError("it died"))
    lines = httpx.post(f"{server.v1}/{path}", json=body | {"stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(lines[-3].removeprefix("data: "))["error"]["message"] == "it died"


def test_a_broken_step_is_a_500_that_says_so_and_an_unforeseen_error_one_that_does_not(stub):
    said = is_openai_error(httpx.post(f"{stub(error=EngineError('step broke')).v1}/chat/completions", json=CHAT), 500)
    assert said["message"] == "step broke"
    silent = httpx.post(f"{stub(error=ZeroDivisionError('secret')).v1}/chat/completions", json=CHAT)
    assert "secret" not in is_openai_error(silent, 500)["message"]
    assert len(silent.headers["x-request-id"]) == 32


def test_silence_is_filled_with_comments(stub):
    server = stub({"keep_alive_interval": 0.05}, delay=0.2)
    text = httpx.post(f"{server.v1}/chat/completions", json=CHAT | {"stream": True}).text
    assert text.startswith(": keep-alive\n\n")
    assert text.count(": keep-alive\n\n") >= 4
    assert text.endswith("data: [DONE]\n\n")


def test_a_request_that_takes_too_long_is_ended(stub):
    server = stub({"request_timeout": 0.1}, delay=0.08)
    assert is_openai_error(httpx.post(f"{server.v1}/chat/completions", json=CHAT), 504)["code"] == "request_timeout"
    text = httpx.post(f"{server.v1}/chat/completions", json=CHAT | {"stream": True}).text
    assert '"content":"a"' in text
    assert '"code":"request_timeout"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_options_are_checked():
    with pytest.raises(ValueError, match="tool_call_parser"):
        ServerOptions(tool_call_parser="xml")
    with pytest.raises(TypeError, match="api_keys"):
        ServerOptions.from_options(api_keyz=["a"])
    assert ServerOptions.from_options(served_model_name="a", api_key=["b"]) == ServerOptions(("a",), ("b",))


def test_nothing_is_asked_of_an_engine_that_is_still_starting():
    from llmkit.server.app import create_app

    create_app(SimpleNamespace(healthy=False))  # type: ignore[arg-type]


def test_two_hundred_streams_at_once_are_all_complete_and_none_corrupt(serve, dummy_folder):
    from llmkit import LLM, SamplingParams
    from llmkit.server.in_process import InProcessEngine

    prompts = [f"{i} bottles and {i * 7} glasses" for i in range(200)]
    with LLM(dummy_folder, load_format="dummy", dtype="float32", max_model_len=128) as llm:
        wanted = [o.text for o in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)]
        server = serve(InProcessEngine(llm))

        async def read(client: httpx.AsyncClient, prompt: str) -> str:
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 20, "stream": True}
            async with client.stream("POST", f"{server.v1}/completions", json=body) as answer:
                events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
            assert events.pop() == "[DONE]"
            return "".join(json.loads(e)["choices"][0]["text"] for e in events)

        async def read_all() -> list[str]:
            async with httpx.AsyncClient(limits=httpx.Limits(max_connections=200), timeout=60) as client:
                return await asyncio.gather(*(read(client, p) for p in prompts))

        assert asyncio.run(read_all()) == wanted
        assert idle(llm)
