"""What requests may say: OpenAI's fields and vLLM's extra ones. Strict types, so that "0.5" is no number and True is no 1.

Conversations, tools and prompts come through unread (`Any` with a schema for the docs): `llmkit.chat` and `served` read them and
name the item at fault, where pydantic's unions would list a complaint for each item and alternative.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what travels to the engine is 64 bits wide
Count = Annotated[int, Field(ge=0, lt=2**31)]
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PARTS = {"type": "array", "items": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                                     "required": ["type", "text"]}}  # fmt: skip
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": {"type": "string"}, "content": {"anyOf": [{"type": "string"}, _PARTS, {"type": "null"}]},
                   "tool_calls": {"type": "array", "items": {"type": "object"}}, "tool_call_id": {"type": "string"}},
    "example": {"role": "user", "content": "Hello"},
}  # fmt: skip
Messages = Annotated[Any, WithJsonSchema({"type": "array", "minItems": 1, "items": _MESSAGE})]
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, _TOKENS,
                   {"type": "array", "items": _TOKENS}], "example": "Once upon a time"}
    ),
]  # fmt: skip
_FUNCTION = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "description": {"type": "string"},
             "parameters": {"type": "object"}, "strict": {"type": "boolean"}}}  # fmt: skip
_TOOL = {"type": "object", "required": ["type", "function"], "properties": {"type": {"const": "function"}, "function": _FUNCTION}}
Tools = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array", "items": _TOOL}, {"type": "null"}]})]
ToolChoice = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object", "required": ["type", "function"]},
                              {"type": "null"}]}),
]  # fmt: skip
Object = Annotated[dict[str, Any] | None, Field(default=None)]


class RequestBody(BaseModel):
    """Any request's body. Fields that it does not know are kept in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, max_length=1024, description="one of /v1/models; the served one by default")


class StreamOptions(BaseModel):
    """How a stream counts."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(RequestBody):
    """What both ways of generating share: sampling, structure, streaming. None means the model's default."""

    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="answers to each prompt")
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = Field(None, description="0: always the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Count | None = Field(None, description="None: to the end of the context")
    seed: Whole | None = Field(None, description="the same again, whatever else runs")
    stop: str | list[str] | None = Field(None, description="texts that end the answer and are not part of it")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = Field(None, description="token id -> added to its logit, -100 to 100")
    user: str | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    min_tokens: Count | None = Field(None, description="no end before so many")
    stop_token_ids: list[Whole] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Whole] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="keep this many of the prompt's last tokens; -1: as many as fit"
    )
    add_special_tokens: bool | None = None
    response_format: Object = Field(None, description="text, json_object, or json_schema with a schema")
    structured_outputs: Object = Field(None, description="one of json, regex, choice, grammar, json_object")
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        None, description="smaller runs first, with --scheduling-policy priority"
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class ChatBody(RequestBody):
    """What becomes a prompt through the chat template."""

    messages: Messages
    tools: Tools = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="leave the last message open, for the model to go on")
    chat_template: str | None = Field(None, description="one of the model's by name, or a Jinja text where the server allows it")
    chat_template_kwargs: Object = Field(None, description="variables for the template, such as enable_thinking")
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


class ChatRequest(ChatBody, GenerationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None
    include_reasoning: bool | None = None


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None


class TokenizeRequest(RequestBody):
    """POST /tokenize: `prompt` as it is, or `messages` through the chat template."""

    prompt: str | None = None
    messages: Messages = None
    tools: Tools = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Object
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    skip_special_tokens: bool = False


class Model(BaseModel):
    """One entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llmkit"
    root: str
    parent: None = None
    max_model_len: int
