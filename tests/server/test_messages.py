"""/v1/messages through the anthropic client: blocks, events in order, tools, stops, counts, errors."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import anthropic
import httpx
import pydantic
import pytest

from llmkit.errors import EngineUnavailableError

WEATHER: dict[str, Any] = {
    "name": "get_weather", "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
                     "additionalProperties": False},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ASK: Any = [{"role": "user", "content": "Name three colours."}]


def client(server: Any, key: str = "EMPTY") -> anthropic.Anthropic:
    http = anthropic.DefaultHttpxClient(limits=httpx.Limits(max_keepalive_connections=0))  # a server that ends waits for nobody
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=60, http_client=http)


def say(server: Any, **body: Any) -> Any:
    return client(server).messages.create(**{"model": "smollm2", "max_tokens": 20, "messages": ASK, **body})


GREEDY = {"extra_body": {"temperature": 0}}  # newer clients have no such argument


def without_ids(message: Any) -> Any:
    value = message.to_dict(exclude_unset=False) | {"id": None}
    return value | {"content": [{k: v for k, v in b.items() if k != "id"} for b in value["content"]]}


# ---- what is said


def test_real_weights_whole_streamed_and_as_chat_say_the_same(server):
    asked: Any = {"model": "smollm2", "max_tokens": 12, "messages": ASK, "system": "Be brief.", **GREEDY}
    ai = client(server)
    whole = ai.messages.create(**asked)
    with ai.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    messages = [{"role": "system", "content": "Be brief."}, *ASK]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
    chat = httpx.post(f"{server.v1}/chat/completions", json=body, timeout=60)
    assert whole.content[0].text == text == final.content[0].text == chat.json()["choices"][0]["message"]["content"]
    assert (whole.stop_reason, whole.usage.output_tokens, whole.role, whole.model) == ("max_tokens", 12, "assistant", "smollm2")
    read = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert read == chat.json()["usage"]["prompt_tokens"]
    assert final.usage.output_tokens == 12
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == read
    assert ai.messages.count_tokens(model="smollm2", messages=ASK, system="Be brief.").input_tokens == read


def test_everything_that_an_answer_may_hold(scripted, serve):
    """Thoughts, text and a call: blocks whole, and the events that tell of them, in their order."""
    server = serve(scripted(f"<think>Hm, 雨?</think>I look.{CALL}"), reasoning_parser="think")
    asked: Any = {"tools": [WEATHER], "max_tokens": 200}
    whole = say(server, **asked)
    assert [b.type for b in whole.content] == ["thinking", "text", "tool_use"]
    thought, text, call = whole.content
    assert (thought.thinking, text.text, call.name, call.input) == ("Hm, 雨?", "I look.", "get_weather", {"city": "Oslo"})
    assert (whole.stop_reason, whole.stop_sequence, whole.usage.cache_read_input_tokens) == ("tool_use", None, 3)
    assert call.id.startswith("toolu_")

    events = list(say(server, stream=True, **asked))
    kinds = [e.type + (f":{e.delta.type}" if e.type == "content_block_delta" else "") for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == [
        "message_start",
        "content_block_start", "content_block_delta:thinking_delta", "content_block_delta:signature_delta", "content_block_stop",
        "content_block_start", "content_block_delta:text_delta", "content_block_stop",
        "content_block_start", "content_block_delta:input_json_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [e.index for e in events if e.type == "content_block_start"] == [0, 1, 2]
    assert events[0].message.content == []
    assert events[0].message.usage.output_tokens == 0
    deltas = [e.delta for e in events if e.type == "content_block_delta"]
    assert json.loads("".join(d.partial_json for d in deltas if d.type == "input_json_delta")) == {"city": "Oslo"}
    with client(server).messages.stream(model="smollm2", messages=ASK, **asked) as stream:
        assert without_ids(stream.get_final_message()) == without_ids(whole)


def test_raw_events_carry_their_names(scripted, serve):
    body = {"model": "smollm2", "max_tokens": 5, "messages": ASK, "stream": True}
    lines = httpx.post(f"{serve(scripted('Hello')).v1}/messages", json=body).text.split("\n\n")[:-1]
    assert [line.split("\n")[0] for line in lines][:3] == ["event: message_start", "event: ping", "event: content_block_start"]
    for line in lines:
        name, data = line.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


@pytest.mark.parametrize(("said", "options", "reason", "sequence"), [
    ("Hello there", {}, "end_turn", None),
    ("Hello there", {"max_tokens": 1}, "max_tokens", None),
    ("one two three", {"stop_sequences": ["two", "x"]}, "stop_sequence", "two"),
    ("", {}, "end_turn", None),
])  # fmt: skip
def test_why_it_ended(scripted, serve, said, options, reason, sequence):
    server = serve(scripted(said))
    whole = say(server, **options)
    *_, delta, _stop = say(server, stream=True, **options)
    assert (whole.stop_reason, whole.stop_sequence) == (delta.delta.stop_reason, delta.delta.stop_sequence) == (reason, sequence)
    assert "two" not in "".join(b.text for b in whole.content)


class Answer(pydantic.BaseModel):
    colour: Literal["red", "blue"]
    number: Literal[1, 2]


def test_structured_output_of_real_weights(server):
    format = {"type": "json_schema", "schema": Answer.model_json_schema()}
    made = say(server, output_config={"format": format}, max_tokens=60, **GREEDY)
    assert Answer.model_validate_json(made.content[0].text)
    parsed = client(server).messages.parse(model="smollm2", max_tokens=60, messages=ASK, output_format=Answer)
    assert isinstance(parsed.parsed_output, Answer)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_required_call_of_real_weights(server, choice):
    made = say(server, tools=[WEATHER], tool_choice={**choice, "disable_parallel_tool_use": True}, max_tokens=60, **GREEDY)
    assert [(b.type, b.name) for b in made.content] == [("tool_use", "get_weather")]
    assert made.content[0].input["city"] in ("Oslo", "Rome")


# ---- what is read


def test_blocks_become_the_conversation(scripted, serve):
    engine = scripted("ok")
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", **cached}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}},
            {"type": "tool_use", "id": "toolu_2", "name": "get_weather", "input": {"city": "Rome"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "no city"}], "is_error": True},
            {"type": "text", "text": "And now?"}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Rules."}, {"type": "text", "text": "More.", **cached}]
    say(serve(engine), messages=messages, system=system)
    (prompt,) = engine.prompts
    assert prompt.startswith("<|im_start|>system\nRules.\nMore.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>")
    assert ('<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>') in prompt  # fmt: skip
    order = [prompt.index(t) for t in ("rain", "Error: no city", "<|im_start|>user\nAnd now?<|im_end|>")]
    assert order == sorted(order)


def test_a_last_message_of_the_assistant_is_continued(scripted, serve):
    engine = scripted(" blue")
    made = say(serve(engine), messages=[*ASK, {"role": "assistant", "content": "Red and"}])
    assert engine.prompts[0].endswith("<|im_start|>assistant\nRed and")
    assert made.content[0].text == " blue"


def test_sampling_fields_arrive(scripted, serve):
    engine = scripted("ok")
    body = {"temperature": 0.3, "top_p": 0.7, "top_k": 5, "seed": 7}
    say(serve(engine), stop_sequences=["x"], extra_body=body)
    (p,) = engine.params
    assert (p.temperature, p.top_p, p.top_k, p.stop, p.seed, p.max_tokens) == (0.3, 0.7, 5, ["x"], 7, 20)


@pytest.mark.parametrize(("thinking", "shown"), [(None, "False"), ({"type": "disabled"}, "False"),
                                                 ({"type": "enabled", "budget_tokens": 1024}, "True")])  # fmt: skip
def test_thinking_is_told_to_the_template(scripted, serve, thinking, shown):
    engine = scripted("ok")
    more = {} if thinking is None else {"thinking": thinking}
    say(serve(engine, chat_template="{{ enable_thinking }}{{ messages[-1].content }}"), **more)
    assert engine.prompts[0].startswith(shown)


# ---- what goes wrong


def test_a_stream_that_breaks_says_so(scripted, serve):
    """At its very beginning by its status, later by an event."""
    died = EngineUnavailableError("the engine died", "ask again")
    server = serve(scripted(died))
    for stream in (False, True):
        with pytest.raises(anthropic.APIStatusError) as caught:
            say(server, stream=stream)
        assert caught.value.status_code == 503
        assert caught.value.body["error"]["type"] == "overloaded_error"
    server, seen = serve(scripted(("I am about to", died))), []
    with pytest.raises(anthropic.APIStatusError, match="the engine died"):
        seen += [e.type for e in say(server, stream=True)] or seen
    body = {"model": "smollm2", "max_tokens": 50, "messages": ASK, "stream": True}
    last = httpx.post(f"{server.v1}/messages", json=body).text.split("\n\n")[-2]
    assert last.startswith('event: error\ndata: {"type":"error","error":{"type":"overloaded_error"')


def test_a_server_that_stops_says_so(scripted, serve):
    server = serve(scripted(("One two three", "abort")))
    with pytest.raises(anthropic.APIStatusError, match="ended this answer"):
        say(server)
    said = []
    with pytest.raises(anthropic.APIStatusError, match="ended this answer"):
        said += (e.delta.text for e in say(server, stream=True) if e.type == "content_block_delta")
    assert "".join(said) == "One two three"


def test_a_reader_who_leaves_frees_the_engine(scripted, serve):
    engine = scripted("word " * 1000, delay=0.01)
    stream = say(serve(engine), stream=True, max_tokens=1000)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 2
    while engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.running == 0


def test_keys_models_and_ids(scripted, serve):
    server = serve(scripted("ok"), api_keys=("secret",))
    made = client(server, "secret").messages.with_raw_response.create(model="smollm2", max_tokens=5, messages=ASK)
    assert made.headers["request-id"] == made.headers["x-request-id"]
    with pytest.raises(anthropic.AuthenticationError) as caught:
        client(server, "wrong").messages.create(model="smollm2", max_tokens=5, messages=ASK)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.NotFoundError, match="other") as missing:
        client(server, "secret").messages.create(model="other", max_tokens=5, messages=ASK)
    assert missing.value.body["error"]["type"] == "not_found_error"
    assert missing.value.request_id == missing.value.response.headers["x-request-id"]


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "should be greater than or equal to 1"),
        ({"messages": []}, "messages must be a list of at least one"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": ["hi"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0] must be an object whose role is user or assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be text or a list of blocks"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
         "messages[0].content[1] is of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0] needs the tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "a"}]}]},
         "messages[0].content[0] needs an id"),
        ({"system": 3}, "system must be text"),
        ({"tools": 3}, "tools must be a list"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0] is of type 'web_search_20250305'"),
        ({"tools": [{"input_schema": {}}]}, "name must be text"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice names 'x'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice must be"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"temperature": "hot"}, "temperature"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not available"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context is 1024 tokens"),
    ],
)  # fmt: skip
def test_refusals_in_anthropics_form(server, body, says):
    asked = {"model": "smollm2", "max_tokens": 5, "messages": ASK, **body}
    response = httpx.post(f"{server.v1}/messages", json={k: v for k, v in asked.items() if v is not None})
    whole = response.json()
    assert (response.status_code, whole["type"], whole["error"]["type"]) == (400, "error", "invalid_request_error")
    assert says in whole["error"]["message"]


def test_a_body_that_is_too_long(scripted, serve):
    response = httpx.post(f"{serve(scripted('ok'), max_body_bytes=100).v1}/messages", json={"messages": "word " * 100})
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request_too_large")
    assert response.json()["type"] == "error"


def test_the_schema_tells_which_error_to_expect(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]

    def error_of(path: str) -> str:
        return paths[path]["post"]["responses"]["default"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]

    assert error_of("/v1/messages") == error_of("/v1/messages/count_tokens") == "AnthropicError"
    assert error_of("/v1/responses") == error_of("/v1/embeddings") == "Error"
