"""/v1/chat/completions over real weights: whole and streamed say the same, and what `LLM` says."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from llmkit import SamplingParams
from llmkit.server.message import Arguments, Call, Message, Text, Thought

QUESTION = [{"role": "user", "content": "Name three colours."}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {
    "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
    "additionalProperties": False}}}  # fmt: skip


def post(server: Any, **body: Any) -> httpx.Response:
    body = {"messages": QUESTION, "max_tokens": 6, "temperature": 0, **body}
    return httpx.post(f"{server.v1}/chat/completions", json=body, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if not line.startswith(":")]


def joined(response: httpx.Response, index: int = 0) -> dict[str, Any]:
    """A stream's answer in the form of a whole one's choice."""
    message, tokens, last = Message(""), [], {}
    for choice in (c for e in events(response) for c in e["choices"] if c["index"] == index):
        delta = choice["delta"]
        message.role = delta.get("role", message.role)
        message.take([Text(delta["content"])] if delta.get("content") else [])
        message.take([Thought(delta["reasoning_content"])] if "reasoning_content" in delta else [])
        for call in delta.get("tool_calls", []):
            message.take([Call(call["index"], call["id"], call["function"]["name"])] if "id" in call else [])
            message.take([Arguments(call["index"], call["function"]["arguments"])])
        tokens += (choice["logprobs"] or {}).get("content", [])
        last = choice
    return {"message": message.body(), "finish_reason": last["finish_reason"], "tokens": tokens}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return message | ({"tool_calls": [c["function"] for c in message["tool_calls"]]} if "tool_calls" in message else {})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 2, "temperature": 1, "seed": 3},
        {"stop": ["colour", "color", "blue", "Blue"], "max_tokens": 30},
        {"logprobs": True, "top_logprobs": 2},
        {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 40},
        {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "function", "function": {"name": "clock"}}, "max_tokens": 30},
        {"tools": [WEATHER]},
        {"response_format": {"type": "json_object"}, "max_tokens": 20},
    ],
)
def test_a_stream_joined_is_the_plain_answer(server, options):
    plain, streamed = post(server, **options).json(), post(server, stream=True, **options)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["x-accel-buffering"] == "no"
    for choice in plain["choices"]:
        same = joined(streamed, choice["index"])
        assert without_ids(same["message"]) == without_ids(choice["message"])
        assert same["finish_reason"] == choice["finish_reason"]
        assert same["tokens"] == (choice["logprobs"] or {}).get("content", [])


def test_it_says_what_the_model_says_offline(server, llm):
    offline = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=6, logprobs=3), use_tqdm=False)[0].outputs[0]
    choice = post(server, logprobs=True, top_logprobs=3).json()["choices"][0]
    assert choice["message"]["content"] == offline.text
    assert choice["finish_reason"] == offline.finish_reason
    for told, entry, token in zip(choice["logprobs"]["content"], offline.logprobs, offline.token_ids, strict=True):
        assert told["logprob"] == pytest.approx(entry[token].logprob, abs=1e-5)
        assert bytes(told["bytes"]).decode() == told["token"] == entry[token].decoded_token
        top = sorted(entry.values(), key=lambda e: -e.logprob)[:3]
        assert [t["token"] for t in told["top_logprobs"]] == [e.decoded_token for e in top]
        assert [t["logprob"] for t in told["top_logprobs"]] == pytest.approx([e.logprob for e in top], abs=1e-5)


def test_the_model_s_own_defaults_apply(server, llm):
    seeded = {"seed": 11, "max_tokens": 8}
    said = post(server, temperature=None, **seeded).json()["choices"][0]["message"]["content"]
    params = llm.get_default_sampling_params().clone(**seeded)
    assert said == llm.chat(QUESTION, params, use_tqdm=False)[0].text


def test_usage_counts_tokens(server):
    whole = post(server).json()["usage"]
    told = events(post(server, stream=True, stream_options={"include_usage": True}))
    assert told[-1]["choices"] == []
    assert {k: told[-1]["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        k: whole[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    assert all(e["usage"] is None for e in told[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [e["usage"]["completion_tokens"] for e in events(post(server, stream=True, stream_options=options))]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert "usage" not in events(post(server, stream=True))[0]


def test_max_completion_tokens_goes_before_max_tokens(server):
    assert post(server, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_json_schema_answers_are_of_the_schema(server):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    for field in ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
                  {"guided_json": schema}, {"structured_outputs": {"json": schema}}):  # fmt: skip
        answer = post(server, max_tokens=40, **field).json()["choices"][0]["message"]["content"]
        assert isinstance(json.loads(answer)["n"], int)
    assert post(server, guided_choice=["yes", "no"]).json()["choices"][0]["message"]["content"] in ("yes", "no")


def test_required_calls_have_arguments_of_the_schema(server):
    tools = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 100, "parallel_tool_calls": False}
    choice = post(server, **tools).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert set(json.loads(call["function"]["arguments"])) == {{"get_weather": "city", "clock": "zone"}[call["function"]["name"]]}


def test_tools_with_definitions_of_their_own(server):
    schema = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "required": ["p"], "additionalProperties": False,
              "$defs": {"P": {"enum": ["a", "b"]}}}  # fmt: skip
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    for choice in ("required", {"type": "function", "function": {"name": "pick"}}):
        (call,) = post(server, tools=[tool], tool_choice=choice, max_tokens=80, parallel_tool_calls=False).json()["choices"][0][
            "message"]["tool_calls"]  # fmt: skip
        assert json.loads(call["function"]["arguments"])["p"] in ("a", "b")


def test_a_conversation_with_calls_and_results_goes_through(server):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "The weather"}, {"type": "text", "text": "in Paris?"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]  # fmt: skip
    assert post(server, messages=messages, tools=[WEATHER]).status_code == 200
    told = httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()
    assert told["count"] > 20


def test_a_last_message_is_continued_and_echoed(server):
    messages = [*QUESTION, {"role": "assistant", "content": "Red, green and"}]
    options = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    told = post(server, **options).json()["choices"][0]["message"]["content"]
    echoed = post(server, echo=True, **options).json()["choices"][0]["message"]["content"]
    assert echoed == "Red, green and" + told
    assert joined(post(server, echo=True, stream=True, **options))["message"]["content"] == echoed


def test_token_ids_and_prompt_logprobs_on_request(server):
    told = post(server, return_token_ids=True, prompt_logprobs=0).json()
    ids = httpx.post(f"{server.url}/tokenize", json={"messages": QUESTION}).json()["tokens"]
    assert told["prompt_token_ids"] == ids
    assert len(told["choices"][0]["token_ids"]) == 6
    assert told["prompt_logprobs"][0] is None
    assert [next(iter(e)) for e in told["prompt_logprobs"][1:]] == [str(t) for t in ids[1:]]
    streamed = events(post(server, return_token_ids=True, stream=True))
    assert streamed[0]["prompt_token_ids"] == ids
    assert [t for e in streamed for c in e["choices"] for t in c.get("token_ids", [])] == told["choices"][0]["token_ids"]


def test_unknown_fields_are_named_and_those_that_matter_are_refused(server):
    assert post(server, user="me", metadata={}, best_of=1).headers.get("x-llmkit-ignored") is None
    assert post(server, temprature=0.5, foo=1).headers["x-llmkit-ignored"] == "foo, temprature"
    for field, value in {"best_of": 2, "use_beam_search": True, "audio": {}, "functions": [{}]}.items():
        refused = post(server, **{field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "logprobs"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"seed": 2**64}, "seed"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nix"}}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "["}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "no"}}}], "tool_choice": "required"},
         "tools"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs"),
        ({"chat_template": "/etc/passwd"}, "chat_template"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_is_a_400_that_names_it(server, body, param, stream):
    refused = post(server, stream=stream, **body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error


def test_a_prompt_too_long_is_a_400_with_both_numbers(server):
    refused = post(server, messages=[{"role": "user", "content": "one " * 1500}])
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    assert "1024" in error["message"]
    assert "15" in error["message"]
    assert post(server, messages=[{"role": "user", "content": "one " * 1500}], truncate_prompt_tokens=50).status_code == 200


def test_a_request_s_own_template_where_the_operator_allows_it(serve):
    server = serve(trust_request_chat_template=True)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ x }}"
    told = post(server, chat_template=template, chat_template_kwargs={"x": "!"}, return_token_ids=True).json()
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": told["prompt_token_ids"]}).json()["prompt"]
    assert text == "Name three colours.!"
