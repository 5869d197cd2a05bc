"""/v1/embeddings through the openai client: the vectors are those of `LLM.embed`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI

from llmkit import LLM
from llmkit.server.app import create_app
from llmkit.server.in_process import InProcessEngine
from llmkit.server.options import ServerOptions

TEXTS = ["Hello", "The quick brown fox jumps over the lazy dog.", "你可以做什么？"]


@pytest.fixture(scope="module")
def llm(dummy_folder: Path) -> Iterator[LLM]:
    with LLM(dummy_folder, load_format="dummy", dtype="float32", max_model_len=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def app(llm: LLM) -> FastAPI:
    return create_app(InProcessEngine(llm), ServerOptions(served_model_names=("tiny",)))


def post(app: FastAPI, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/embeddings", json={"model": "tiny", **body})

    return asyncio.run(send())


def ask(app: FastAPI, **body: Any) -> Any:
    async def send() -> Any:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="EMPTY", http_client=http, max_retries=0) as client:
            return await client.embeddings.create(model="tiny", **body)

    return asyncio.run(send())


def expected(llm: LLM, prompts: Any, **options: Any) -> np.ndarray:
    return np.stack([o.embedding for o in llm.embed(prompts, use_tqdm=False, **options)])


def vectors(response: Any) -> np.ndarray:
    assert [d.index for d in response.data] == list(range(len(response.data)))
    return np.array([d.embedding for d in response.data], np.float32)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("how", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_a_batch_of_texts(app, llm, how, pooling):
    found = ask(app, input=TEXTS, extra_body={"pooling": pooling}, **how)
    wanted = expected(llm, TEXTS, pooling=pooling)
    if how.get("encoding_format") == "base64":  # asked for by name, it is not unpacked by the client
        got = np.stack([np.frombuffer(base64.b64decode(d.embedding), "<f4") for d in found.data])
    else:
        got = vectors(found)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert found.model == "tiny"
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(len(llm.get_tokenizer().encode(t)) for t in TEXTS)


def test_every_form_of_input(app, llm):
    ids = [llm.get_tokenizer().encode(t) for t in TEXTS]
    wanted = expected(llm, TEXTS)
    np.testing.assert_allclose(vectors(ask(app, input=ids)), wanted, atol=1e-5)
    np.testing.assert_allclose(vectors(ask(app, input=ids[1])), wanted[1:2], atol=1e-5)
    np.testing.assert_allclose(vectors(ask(app, input=TEXTS[1])), wanted[1:2], atol=1e-5)


def test_fewer_dimensions_are_normalised_again(app, llm):
    wanted = expected(llm, TEXTS, normalize=False)[:, :7]
    found = vectors(ask(app, input=TEXTS, dimensions=7))
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    plain = vectors(ask(app, input=TEXTS, extra_body={"normalize": False}))
    np.testing.assert_allclose(plain, expected(llm, TEXTS, normalize=False), atol=1e-4)


def test_truncation_keeps_the_beginning(app, llm):
    ids = llm.get_tokenizer().encode("word " * 300)
    found = vectors(ask(app, input="word " * 300, extra_body={"truncate_prompt_tokens": -1}))
    np.testing.assert_allclose(found, expected(llm, [ids[:128]]), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "not empty"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": ["a", 1]}, "input", "input must be"),
        ({"input": [True]}, "input", "input must be"),
        ({"input": {"a": 1}}, "input", "input must be"),
        ({"input": [1, -1]}, "input", "-1 is no token id"),
        ({"input": [[1, 10**9]]}, "input", "no token id"),
        ({"input": ["a"] * 2049}, "input", "2049 items"),
        ({"input": "word " * 300}, "input", "context is 128 tokens, and an input has 301"),
        ({"input": "a", "dimensions": 33}, "dimensions", "vectors have 32"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "pooling": "max"}, "pooling", "'last' or 'mean'"),
    ],
)
def test_refusals_name_the_field(app, body, param, says):
    response = post(app, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_an_unknown_model_is_a_404(app):
    response = post(app, input="a", model="other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
