"""POST /v1/embeddings: one vector for each text, pooled from the states that the model ends with."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from llmkit.server.engine_client import EngineClient, TokenPrompt
from llmkit.server.http.body import JsonRoute
from llmkit.server.http.errors import JsonResponse, refuse
from llmkit.server.http.params import unknown_fields
from llmkit.server.http.protocol import Prompt, RequestBody
from llmkit.server.http.streaming import answer
from llmkit.server.options import ServerOptions
from llmkit.server.served import Served

_MOST_INPUTS = 2048  # as OpenAI


class EmbeddingRequest(RequestBody):
    """`pooling`, `normalize`, `truncate_prompt_tokens` and `add_special_tokens` are ours (and vLLM's)."""

    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = Field(None, description="keep the first so many, normalised again")
    user: str | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool = True


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """The route of embeddings."""
    routes, served = APIRouter(route_class=JsonRoute), Served(engine, options)

    @routes.post("/v1/embeddings", tags=["OpenAI"])
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """One vector of the model's hidden size for each text or list of token ids."""
        name, ignored = served.check(body), unknown_fields(body)
        if body.dimensions is not None and body.dimensions > served.facts.hidden_size:
            raise refuse(f"dimensions={body.dimensions}, but this model's vectors have {served.facts.hidden_size}", "dimensions")
        prompts = await _prompts(served, body)
        whole = body.dimensions is None
        vectors = await answer(request, engine.embed(prompts, body.pooling, body.normalize and whole), options.request_timeout)
        data = [
            {"object": "embedding", "index": i, "embedding": v.tolist() if body.encoding_format == "float" else _base64(v)}
            for i, v in enumerate(_cut(np.asarray(vectors, np.float32), body))
        ]
        count = sum(len(p.ids) for p in prompts)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JsonResponse({"object": "list", "data": data, "model": name, "usage": usage}, headers=ignored)

    return routes


def _cut(vectors: np.ndarray, body: EmbeddingRequest) -> np.ndarray:
    """The first `dimensions` of vectors fp32 [n, hidden], of length 1 again."""
    if body.dimensions is None:
        return vectors
    cut = vectors[:, : body.dimensions]
    return cut / np.linalg.norm(cut, axis=1, keepdims=True).clip(1e-12) if body.normalize else cut


def _base64(vector: np.ndarray) -> str:
    """As OpenAI packs them: little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def _prompts(served: Served, body: EmbeddingRequest) -> list[TokenPrompt]:
    """The inputs as the engine wants them. Raises 400 for what is no input, empty or too long."""
    inputs = _inputs(body.input)
    texts = [i for i in inputs if isinstance(i, str)]
    encoded = await asyncio.to_thread(served.tokenizer.encode_batch, texts, body.add_special_tokens) if texts else []
    if texts:
        return [_fitted(served, ids, text, body) for ids, text in zip(encoded, inputs)]
    return [_fitted(served, served.checked_ids(ids, "input"), None, body) for ids in inputs]


def _inputs(given: Any) -> list[Any]:
    """Text, token ids, or a list of either -> a list of texts or a list of lists of ids."""
    if isinstance(given, str) or (isinstance(given, list) and given and all(type(t) is int for t in given)):
        return [given]
    kinds = {type(i) for i in given} if isinstance(given, list) else set()
    if kinds not in ({str}, {list}):
        raise refuse("input must be text, token ids, or a list of texts or of lists of token ids, and not empty", "input")
    if len(given) > _MOST_INPUTS:
        raise refuse(f"input has {len(given)} items; at most {_MOST_INPUTS} go into one request", "input")
    return given


def _fitted(served: Served, ids: Sequence[int], text: str | None, body: EmbeddingRequest) -> TokenPrompt:
    limit, keep = served.facts.max_model_len, body.truncate_prompt_tokens
    if keep is not None:
        ids = ids[: min(keep, limit) if keep >= 0 else limit]
    if not ids:
        raise refuse("an input is empty", "input", "give at least one character or one token id")
    if len(ids) > limit:
        raise refuse(f"this model's context is {limit} tokens, and an input has {len(ids)}", "input",
                     "shorten it, or send truncate_prompt_tokens=-1", "context_length_exceeded")  # fmt: skip
    return TokenPrompt(list(ids), text)
