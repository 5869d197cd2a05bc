"""The model as requests see it: its names, its defaults, its chat template, and prompts made for it.

Nothing is asked of the engine before a request comes: the HTTP port is open while the engine still starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.chat import find_template, render_chat
from llmkit.errors import EngineUnavailableError, did_you_mean
from llmkit.server.engine_client import EngineClient, EngineFacts, TokenPrompt
from llmkit.server.http.errors import HttpError, refuse
from llmkit.server.http.protocol import ChatBody, RequestBody, TokenizeRequest
from llmkit.server.options import ServerOptions
from llmkit.tokenizer import Tokenizer

_LONG_TEXT, _MANY_MESSAGES = 20_000, 200  # characters and messages above which a thread does it: the event loop shall not wait
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NOT_VARIABLES = {"tokenizer", "messages", "chat_template", "tools", "add_generation_prompt", "continue_final_message"}


class Served:
    """One engine and the options of its server."""

    def __init__(self, engine: EngineClient, options: ServerOptions) -> None:
        self.engine, self.options = engine, options
        self.since = int(time.time())
        self._template: str | None = None

    @property
    def facts(self) -> EngineFacts:
        return self.engine.facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    # ---- names

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model."""
        return self.options.served_model_names or (self.facts.model,)

    def check(self, body: RequestBody) -> str:
        """The name to answer under. Raises EngineUnavailableError while there is no engine, and 404 for another model."""
        if not self.engine.healthy:
            stage = getattr(self.engine, "stage", None)
            raise EngineUnavailableError(f"the engine is not ready{f' ({stage})' if stage else ''}", "ask again in a moment")
        if body.model is None or body.model in self.names:
            return body.model or self.names[0]
        raise self.unknown_model(body.model)

    def unknown_model(self, name: str) -> HttpError:
        """The 404 of a model that is not here."""
        near = did_you_mean(name, self.names) if len(self.names) > 1 else None
        served = f"this server has {', '.join(self.names)}" + (f"; did you mean {near!r}?" if near else "")
        return HttpError(404, f"the model {name[:200]!r} does not exist", served, "model", "model_not_found")

    # ---- defaults

    @property
    def defaults(self) -> dict[str, Any]:
        """Sampling parameters of a request that says nothing: the model's own, and what the operator set."""
        own = self.facts.defaults if self.options.generation_config == "auto" else {}
        named = {n: own[n] for n in _DEFAULTS if own.get(n) is not None}
        return named | (self.options.override_generation_config or {})

    # ---- prompts

    @property
    def template(self) -> str:
        """The chat template's text. Raises TokenizerError without one."""
        if self._template is None:
            self._template = find_template(self.tokenizer, self.options.chat_template)
        return self._template

    def template_of(self, body: ChatBody | TokenizeRequest) -> str:
        """The template for this request: its own, one of the model's by name, or the served one."""
        own = self.tokenizer.chat_template
        if body.chat_template is None:
            named = isinstance(own, dict) and self.options.chat_template is None
            return find_template(self.tokenizer, None, bool(body.tools)) if named else self.template
        if isinstance(own, dict) and body.chat_template in own:
            return own[body.chat_template]
        if "{" not in body.chat_template and "\n" not in body.chat_template:  # never a path: that would show the server's files
            raise refuse("chat_template is neither a Jinja text nor the name of one of the model's templates", "chat_template")
        if not self.options.trust_request_chat_template:
            raise refuse("this server takes no chat template from a request", "chat_template",
                         "start it with --trust-request-chat-template, or with --chat-template")  # fmt: skip
        return body.chat_template

    async def chat_prompt(self, body: ChatBody | TokenizeRequest, messages: Any, tools: Any = None) -> TokenPrompt:
        """The conversation as the engine wants it. Raises InvalidRequestError naming the message at fault."""
        options: dict[str, Any] = {
            **_variables(body),
            "chat_template": self.template_of(body),
            "tools": tools,
            "add_generation_prompt": body.add_generation_prompt,
            "continue_final_message": bool(body.continue_final_message),
        }
        messages = flattened(messages) if self.options.chat_template_content_format == "string" else messages
        if isinstance(messages, list) and len(messages) > _MANY_MESSAGES:
            text = await asyncio.to_thread(render_chat, self.tokenizer, messages, **options)
        else:
            text = render_chat(self.tokenizer, messages, **options)
        return await self.encode(text, bool(getattr(body, "add_special_tokens", None)))

    async def encode(self, text: str, add_special_tokens: bool) -> TokenPrompt:
        """Text as the engine wants it; long ones in a thread."""
        if len(text) > _LONG_TEXT:
            ids = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        else:
            ids = self.tokenizer.encode(text, add_special_tokens)
        return TokenPrompt(ids, text)

    def fitted(self, prompt: TokenPrompt, param: str, keep_last: int | None = None) -> TokenPrompt:
        """The prompt, cut to its last `keep_last` tokens (-1: as many as leave room for one more).

        Raises 400 with both numbers when it does not fit the context, and for an empty one.
        """
        limit = self.facts.max_model_len
        if keep_last is not None:
            kept = prompt.ids[-(min(keep_last, limit - 1) if keep_last >= 0 else limit - 1) :] if keep_last else []
            prompt = TokenPrompt(kept, prompt.text if len(kept) == len(prompt.ids) else None)
        if not prompt.ids:
            raise refuse("the prompt is empty", param, "give at least one character or one token id")
        if len(prompt.ids) >= limit:
            raise refuse(
                f"this model's context is {limit} tokens, and the prompt has {len(prompt.ids)}, which leaves no room to answer",
                param, f"shorten it, or start the server with --max-model-len above {len(prompt.ids)}", "context_length_exceeded",
            )  # fmt: skip
        return prompt

    def checked_ids(self, ids: Sequence[Any], param: str) -> list[int]:
        """Token ids that the model has."""
        size = self.facts.vocab_size
        bad = next((t for t in ids if type(t) is not int or not 0 <= t < size), None)
        if bad is not None:
            raise refuse(f"{str(bad)[:40]} is no token id of this model: they go from 0 to {size - 1}", param)
        return list(ids)


def _variables(body: ChatBody | TokenizeRequest) -> dict[str, Any]:
    """Extra variables for the template."""
    given = dict(body.chat_template_kwargs or {})
    clash = sorted(_NOT_VARIABLES & given.keys())
    if clash:
        raise refuse(f"chat_template_kwargs cannot set {clash[0]}", "chat_template_kwargs", f"give {clash[0]} beside it")
    named = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    return {n: v for n, v in named.items() if v is not None} | given


def flattened(messages: Any) -> Any:
    """Messages whose text parts are joined; anything else stays for the template code to complain about."""

    def flat(message: Any) -> Any:
        parts = message.get("content") if isinstance(message, Mapping) else None
        texts = [p["text"] for p in parts if _is_text(p)] if isinstance(parts, list) else []
        return {**message, "content": "\n".join(texts)} if isinstance(parts, list) and len(texts) == len(parts) else message

    return [flat(m) for m in messages] if isinstance(messages, list) else messages


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
