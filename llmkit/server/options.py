"""What a server can be told beyond its engine: one dataclass, from which `llmkit serve` makes its flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmkit.errors import ConfigError, reject_unknown

TOOL_PARSERS = ("hermes", "llama3_json", "mistral", "pythonic")
REASONING_PARSERS = ("think", "deepseek_r1", "qwen3")  # three of vLLM's names for <think>…</think>


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, at_least: float | None = None) -> Any:
    """A dataclass field with its help text, its allowed values and its lower bound. A tuple is a flag given several times."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "at_least": at_least})


@dataclass(frozen=True)
class ServerOptions:
    """Options of the HTTP front. Times are seconds, sizes bytes."""

    served_model_names: tuple[str, ...] = option((), "names that requests may call the model by; the first one answers")
    api_keys: tuple[str, ...] = option((), "keys of which a request must bring one; none: every key passes")
    allowed_origins: tuple[str, ...] = option(("*",), "browser origins that may call (CORS)")
    allowed_methods: tuple[str, ...] = option(("*",), "HTTP methods that they may use")
    allowed_headers: tuple[str, ...] = option(("*",), "headers that they may send")
    allow_credentials: bool = option(False, "whether they may send cookies")
    root_path: str = option("", "path under which a reverse proxy shows the server")
    chat_template: str | None = option(None, "chat template: a file, a Jinja text, or the name of one of the model's")
    chat_template_content_format: str = option("auto", "how templates get content", ("auto", "string", "openai"))
    trust_request_chat_template: bool = option(False, "whether a request may bring its own chat template")
    generation_config: str = option("auto", "default sampling parameters: the model's own or none", ("auto", "none"))
    override_generation_config: dict[str, Any] | None = dataclasses.field(
        default=None, metadata={"help": "default sampling parameters on top of these, as JSON", "choices": None, "at_least": None}
    )
    enable_auto_tool_choice: bool = option(True, "whether tool_choice=auto looks for tool calls in the answer")
    tool_call_parser: str | None = option(None, "format of tool calls; by default read from the chat template", TOOL_PARSERS)
    reasoning_parser: str | None = option(
        None, "tags of reasoning_content; by default read from the chat template", (*REASONING_PARSERS, "none")
    )
    response_role: str = option("assistant", "role of the answers")
    max_queued_requests: int | None = option(None, "requests in flight beyond which the next gets 503", at_least=1)
    request_timeout: float | None = option(None, "longest a request may take in all", at_least=0.001)
    keep_alive_interval: float = option(15.0, "silence after which a stream gets an SSE comment", at_least=0.01)
    retry_after: int = option(5, "what Retry-After says in a 503", at_least=0)
    max_body_bytes: int = option(16 * 1024 * 1024, "longest request body", at_least=1)
    enable_docs: bool = option(True, "whether /docs and /openapi.json are there")
    enable_page: bool = option(True, "whether the chat page is at /")
    return_tokens_as_token_ids: bool = option(False, "write tokens in logprobs as token_id:N")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value: Any = getattr(self, f.name)
            meta = f.metadata
            if meta["choices"] and value is not None and value not in meta["choices"]:
                raise ConfigError(f"{f.name} must be one of {', '.join(meta['choices'])}; got {value!r}")
            if meta["at_least"] is not None and value is not None and not value >= meta["at_least"]:
                raise ConfigError(f"{f.name} must be at least {meta['at_least']:g}; got {value!r}")
            if isinstance(f.default, tuple) and not isinstance(value, tuple):
                object.__setattr__(self, f.name, (value,) if isinstance(value, str) else tuple(value or ()))

    @classmethod
    def from_options(cls, **options: Any) -> ServerOptions:
        """Build from keyword arguments; unknown names are refused with the nearest one."""
        options = {ALIASES.get(name, name): value for name, value in options.items()}
        reject_unknown(options, [f.name for f in dataclasses.fields(cls)], "the server")
        return cls(**options)


ALIASES = {  # vLLM's spellings
    "served_model_name": "served_model_names",
    "api_key": "api_keys",
    "trust_request_chat_templates": "trust_request_chat_template",
}
