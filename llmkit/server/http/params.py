"""A request's fields -> SamplingParams. What would change the answer and is not there is refused by name; the rest is named in a
header, so that nothing is dropped in silence."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.sampling_params import SamplingParams, StructuredOutputs
from llmkit.server.http.errors import refuse
from llmkit.server.http.protocol import GenerationBody, RequestBody
from llmkit.server.served import Served
from llmkit.server.tools.schema import closed

log = logging.getLogger("llmkit.server")
IGNORED_HEADER = "X-Llmkit-Ignored"
_FIELD = re.compile(r"structured_outputs(\.\w+)?")
MAX_STOPS, MAX_BAD_WORDS, MAX_WORD = 128, 1024, 512
_SAMPLING = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias", "top_k", "min_p",
             "repetition_penalty", "min_tokens", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "bad_words",
             "allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens", "prompt_logprobs")  # fmt: skip
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_NO_BEAMS = "beam search is not built; use n with a temperature"
_TEXT_ONLY = "this server reads and writes text only"
_USE_TOOLS = "use tools and tool_choice"
# field -> (values that ask for nothing, what to do instead of any other)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((None,), _TEXT_ONLY),
    "best_of": ((None, 1), "use n and pick the best of the answers by their logprobs"),
    "early_stopping": ((None, False), _NO_BEAMS),
    "function_call": ((None, "none"), _USE_TOOLS),
    "functions": ((None, []), _USE_TOOLS),
    "guided_whitespace_pattern": ((None,), "at most one space or line break stands between two JSON tokens"),
    "images": ((None, []), _TEXT_ONLY),
    "length_penalty": ((None, 1, 1.0), _NO_BEAMS),
    "logits_processors": ((None, []), "use logit_bias, allowed_token_ids, bad_words or structured_outputs"),
    "mm_processor_kwargs": ((None, {}), _TEXT_ONLY),
    "modalities": ((None, [], ["text"]), _TEXT_ONLY),
    "prompt_embeds": ((None,), "give text or token ids"),
    "structural_tag": ((None,), "use structured_outputs with a Lark grammar"),
    "suffix": ((None, ""), "this model does not fill in the middle; put what matters into the prompt"),
    "use_beam_search": ((None, False), _NO_BEAMS),
    "vllm_xargs": ((None, {}), "drop it"),
    "web_search_options": ((None,), "this server does not search; give it a tool that does"),
}
# fields of the APIs that do not change what is answered here
HARMLESS = {"cache_salt", "guided_decoding_backend", "metadata", "prediction", "prompt_cache_key", "prompt_cache_retention",
            "request_id", "safety_identifier", "service_tier", "store", "verbosity", "return_assistant_tokens_mask",
            "chat_template_content_format", "stream_include_usage"}  # fmt: skip


def unknown_fields(body: RequestBody, known: tuple[str, ...] = ()) -> dict[str, str]:
    """Headers that name the fields nobody reads. Raises 400 for those that would have changed the answer."""
    extra = {n: v for n, v in (body.model_extra or {}).items() if n not in known}
    for name, value in extra.items():
        harmless, hint = REFUSED.get(name, ((value,), ""))
        if not any(value is v or (type(value) is type(v) and value == v) for v in harmless):
            raise refuse(f"{name} is not available", name, hint)
    ignored = sorted(n for n in extra if n not in REFUSED and n not in HARMLESS)
    if not ignored:
        return {}
    log.info("fields of a request that nobody reads: %s", ", ".join(map(ascii, ignored[:20])))
    names = [n for n in ignored if n.isascii() and n.isprintable() and len(n) <= 64]
    return {IGNORED_HEADER: ", ".join(names[:20]) or "?"}


def sampling_params(served: Served, body: GenerationBody, **own: Any) -> SamplingParams:
    """What this request asks for, on top of the server's defaults. own: fields that the endpoint decides itself.

    Raises InvalidRequestError or 400 naming the field.
    """
    _check_sizes(body)
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    chosen = served.defaults | given | {n: v for n, v in own.items() if v is not None}
    chosen.setdefault("structured_outputs", structure(body))
    if body.logit_bias is not None:
        chosen["logit_bias"] = _bias(served, body.logit_bias)
    if body.allowed_token_ids is not None:
        served.checked_ids(body.allowed_token_ids, "allowed_token_ids")
    return SamplingParams(**chosen)


def _check_sizes(body: GenerationBody) -> None:
    """What costs more than its length, for everybody, has a bound: each token is compared with each stop string."""
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options go with stream: true", "stream_options", "drop them, or stream")
    for name, most in (("stop", MAX_STOPS), ("bad_words", MAX_BAD_WORDS)):
        words = getattr(body, name)
        words = [words] if isinstance(words, str) else words or []
        if len(words) > most or any(len(w) > MAX_WORD for w in words):
            raise refuse(f"{name} takes at most {most} strings of at most {MAX_WORD} characters", name)


def _bias(served: Served, given: dict[str, float]) -> dict[int, float]:
    wrong = next((k for k in given if not (k.isascii() and k.isdigit() and len(k) < 12)), None)
    if wrong is not None:
        raise refuse(f"logit_bias: {wrong[:40]!r} is no token id", "logit_bias")
    bias = {int(k): min(100.0, max(-100.0, v)) for k, v in given.items()}  # as OpenAI and vLLM bound it
    served.checked_ids(list(bias), "logit_bias")
    return bias


# --- structured output -------------------------------------------------------------------------------------------------


def structure(body: GenerationBody) -> StructuredOutputs | None:
    """The language that the answer must belong to, in whichever of the three ways it was said."""
    said = _said(body)
    if len(said) > 1:
        raise refuse(f"{' and '.join(said)} exclude each other: the answer can belong to one language only", list(said)[-1])
    for name, value in said.items():
        return _of_field(name, lambda v=value: StructuredOutputs(**v))
    return None


def structure_field(body: GenerationBody) -> str | None:
    """The field in which it was said."""
    return next(iter(_said(body)), None)


def _said(body: GenerationBody) -> dict[str, dict[str, Any]]:
    ways = {"response_format": _of_format(body.response_format), "structured_outputs": body.structured_outputs}
    ways |= {name: {key: value} for name, key in _GUIDED.items() if (value := getattr(body, name)) is not None}
    return {name: value for name, value in ways.items() if value}


@contextmanager
def blaming(field: str | None) -> Iterator[None]:
    """The engine compiles grammars, and knows them by one name; its complaint is put to the field that the request really had."""
    try:
        yield
    except InvalidRequestError as e:
        if field is None or e.param != "structured_outputs":
            raise
        raise refuse(_FIELD.sub(field, e.message, count=1), field, e.hint) from e


def _of_field(name: str, make: Callable[[], StructuredOutputs]) -> StructuredOutputs:
    """`make()`, with its complaint put to the field that the request really had."""
    try:
        return make()
    except (InvalidRequestError, TypeError) as e:
        message = e.message if isinstance(e, InvalidRequestError) else f"{name} has a wrong field: {e}"
        raise refuse(_FIELD.sub(name, message, count=1), name, getattr(e, "hint", None)) from e


def _of_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's response_format."""
    kind = given.get("type") if given else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise refuse(f"response_format.type must be text, json_object or json_schema; got {str(kind)[:100]!r}",
                     "response_format.type")  # fmt: skip
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise refuse("response_format.json_schema needs {'name': ..., 'schema': {...}}", "response_format.json_schema")
    return {"json": closed(schema)}  # OpenAI asks that the schema itself says so; a model that may add properties adds no end
