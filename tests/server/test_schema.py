"""schemathesis over /openapi.json: whatever a request says, the answer is no 5xx, and every error is in its API's form."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from llmkit import LLM
from llmkit.server.app import create_app
from llmkit.server.in_process import InProcessEngine
from llmkit.server.options import ServerOptions

FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@pytest.fixture(scope="module")
def api(dummy_folder: Path) -> Iterator[Any]:
    """A model of no weight, so that answers cost nothing; its context is short, so that none is long."""
    with LLM(dummy_folder, load_format="dummy", max_model_len=320) as llm:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(InProcessEngine(llm), ServerOptions()))


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_the_server(api: Any, mode: GenerationMode) -> None:
    tried = set()
    for operation in api.get_all_operations():
        cases = operation.ok().as_strategy(generation_mode=mode)

        @FEW
        @given(case=cases)
        def ask(case: Any) -> None:
            response = case.call()
            tried.add(case.path)
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            if response.status_code >= 400 and case.method != "HEAD":
                assert "error" in response.json(), (case.as_curl_command(), response.text)

        if mode is GenerationMode.POSITIVE or operation.ok().body:
            ask()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize"} <= tried


NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324, "", "a", "\x00",
    "é" * 300, "0", "{{ 1/0 }}", "漢" * 2000, [], [[]], [[[]]], ["a"], [1], [-1], [10**30], [None], [True], [{}], {}, {"": ""},
    {"a": {"b": []}}, {"type": "object"}, {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}},
    {"json": {"$ref": "#/nix"}},
    {"regex": "(" * 50}, {"grammar": "start: start"}, {"0": 1e308}, {"1": 1}, {"type": "function", "function": {"name": "f"}},
    [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}], [{"role": "user", "content": None}],
    [{"role": "user", "content": [{}]}], [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
    [{"type": "function_call", "name": "f", "arguments": "{}"}], [{"type": "function_call_output", "call_id": "a", "output": 1}],
    [{"type": "function_call", "call_id": [], "name": "f", "arguments": "{}"}], [{"type": "message", "id": []}],
    [{"type": "reasoning", "summary": [1], "content": 1}], [{"role": "assistant", "content": [{"type": "refusal"}]}],
    [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [1]}]}],
    [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"a": [{}]}}]}],
    [{"name": "f", "input_schema": {"$ref": "#"}}], [{"type": "function", "name": "f", "parameters": {"$ref": "#"}}],
    {"type": "allowed_tools", "tools": 1}, {"format": {"type": "json_schema", "schema": {"type": "no"}}},
    [{"role": "tool", "content": 1}], [{"role": 1}], [{"role": "user", "content": "a", "name": {"x": []}}],
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
                                  "/tokenize", "/detokenize"])  # fmt: skip
def test_no_field_breaks_the_server(api: Any, path: str, stream: bool) -> None:
    import httpx

    schemas = api.raw_schema["components"]["schemas"]
    body = api.raw_schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    good: dict[str, Any] = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]},
                            "/v1/completions": {"prompt": "a"}, "/tokenize": {"prompt": "a"},
                            "/v1/responses": {"input": "a", "max_output_tokens": 2},
                            "/v1/messages": {"messages": [{"role": "user", "content": "a"}]}, "/v1/embeddings": {"input": "a"},
                            "/detokenize": {"tokens": [1]}}[path] | {"max_tokens": 2, "stream": stream}  # fmt: skip

    statuses: Counter[int] = Counter()

    async def ask_all() -> None:
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            for field in schemas[body]["properties"]:
                for value in NASTY:
                    told = await client.post(path, json=good | {field: value})
                    statuses[told.status_code] += 1
                    assert told.status_code < 500, (field, value, told.text)
                    assert '"internal_error"' not in told.text, (field, value, told.text)

    asyncio.run(ask_all())
    assert min(statuses[200], statuses[400]) >= 5, statuses  # both ways were gone
