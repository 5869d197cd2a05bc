"""POST /tokenize and /detokenize: text to token ids and back, as the model sees them."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from llmkit.server.engine_client import EngineClient, TokenPrompt
from llmkit.server.http.body import JsonRoute
from llmkit.server.http.errors import JsonResponse, refuse
from llmkit.server.http.params import unknown_fields
from llmkit.server.http.protocol import DetokenizeRequest, TokenizeRequest
from llmkit.server.options import ServerOptions
from llmkit.server.served import Served
from llmkit.server.tools import ToolUse


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """The routes of the tokenizer."""
    served, routes = Served(engine, options), APIRouter(route_class=JsonRoute, tags=["tokenizer"])

    @routes.post("/tokenize", summary="Text or messages to token ids", response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        served.check(body)
        headers = unknown_fields(body)
        ids = (await _encoded(served, body)).ids
        strings = [served.tokenizer.token_text(t) for t in ids] if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": served.facts.max_model_len, "tokens": ids, "token_strs": strings}
        return JsonResponse(answer, headers=headers)

    @routes.post("/detokenize", summary="Token ids to text", response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        served.check(body)
        headers = unknown_fields(body)
        text = served.tokenizer.decode(served.checked_ids(body.tokens, "tokens"), body.skip_special_tokens)
        return JsonResponse({"prompt": text}, headers=headers)

    return routes


async def _encoded(served: Served, body: TokenizeRequest) -> TokenPrompt:
    if (body.prompt is None) == (body.messages is None):
        raise refuse("give prompt or messages", "prompt", "one of the two, not both")
    if body.prompt is not None:
        return await served.encode(body.prompt, body.add_special_tokens is not False)
    tools = ToolUse.of(served.template_of(body), served.options, body.tools)
    return await served.chat_prompt(body, tools.messages(body.messages), tools.for_template)
