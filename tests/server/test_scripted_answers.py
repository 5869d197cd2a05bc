"""Thoughts and calls that a model decides to make itself, through the whole endpoint, in the formats of four families."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
              for name in ("add", "look")]  # fmt: skip
BODY = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
HERMES = '{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}{# </think> #}'
ANSWERS = {
    "hermes": 'Well.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "look"}</tool_call>',
    "mistral": 'Well.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "look", "arguments": {}}]',
    "llama3_json": '{"name": "add", "parameters": {"a": 1}}; {"name": "look", "parameters": {}}',
    "pythonic": "[add(a=1), look()]",
}


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def both(server: Any, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain answer's choice, and the streamed one's in the same form, by the openai client."""
    with openai.OpenAI(base_url=server.v1, api_key="x", max_retries=0) as client:
        asked: Any = {"model": "smollm2", **BODY, **body}
        whole = client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0]
    return tuple(  # type: ignore[return-value]
        {
            "content": c.message.content or "",
            "thoughts": (c.message.model_extra or {}).get("reasoning_content", ""),
            "calls": [(t.function.name, json.loads(t.function.arguments)) for t in c.message.tool_calls or []],
            "reason": c.finish_reason,
        }
        for c in (whole, streamed)
    )


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("parser", list(ANSWERS))
def test_calls_in_each_family_s_format(stub, parser, size):
    server = stub({"tool_call_parser": parser}, pieces=cut(ANSWERS[parser], size))
    whole, streamed = both(server)
    assert whole == streamed
    content = "Well." if parser in ("hermes", "mistral") else ""
    assert whole == {"content": content, "thoughts": "", "calls": [("add", {"a": 1}), ("look", {})], "reason": "tool_calls"}
    assert server.engine.asked[0][1].skip_special_tokens == (parser == "hermes")


def test_thoughts_and_calls_of_a_template_that_has_both(stub):
    pieces = cut("<think>\nWhich?\n</think>\n\n" + ANSWERS["hermes"], 2)
    server = stub({"chat_template": HERMES}, pieces=pieces)
    whole, streamed = both(server)
    assert whole == streamed
    assert (whole["thoughts"], whole["content"], len(whole["calls"])) == ("Which?", "Well.", 2)
    assert both(server, extra_body={"include_reasoning": False})[0]["thoughts"] == ""
    assert len(both(server, parallel_tool_calls=False)[1]["calls"]) == 1


def test_a_prompt_that_opens_the_thoughts(stub):
    server = stub({"chat_template": "{{ messages[0].content }}<think>\n{# </think> #}"}, pieces=["hm", "m</thi", "nk>\n\nYes"])
    assert both(server, tools=[])[1] == {"content": "Yes", "thoughts": "hmm", "calls": [], "reason": "stop"}


def test_no_calls_are_looked_for_where_none_are_wanted(stub):
    for options in ({"tool_choice": "none"}, {"tools": []}):
        server = stub({"chat_template": HERMES}, pieces=cut(ANSWERS["hermes"], 5))
        assert both(server, **options)[0]["content"] == ANSWERS["hermes"]
        assert "<tool_call>" not in server.engine.asked[0][0].text
    off = stub({"enable_auto_tool_choice": False})
    assert httpx.post(f"{off.v1}/chat/completions", json=BODY).json()["error"]["param"] == "tools"


def test_a_format_of_calls_that_nobody_reads_is_refused(stub):
    server = stub({"chat_template": "{{ tools }}<tool_call><function="})
    assert httpx.post(f"{server.v1}/chat/completions", json=BODY).json()["error"]["param"] == "tools"
    assert httpx.post(f"{server.v1}/chat/completions", json=BODY | {"tool_choice": "required"}).status_code == 200


def test_a_conversation_of_a_thousand_messages_is_refused_as_fast_as_it_is_answered(stub):
    server = stub({"chat_template": "{% if messages | length > 900 %}{{ raise_exception('no') }}{% endif %}a"})
    for count, status in ((800, 200), (1000, 400)):
        body = {"messages": [{"role": "user", "content": "Hi"}] * count}
        assert httpx.post(f"{server.v1}/chat/completions", json=body, timeout=5).status_code == status


def test_allowed_tools(stub):
    server = stub({"chat_template": HERMES}, pieces=[ANSWERS["hermes"]])
    tools = [{"type": "function", "function": {"name": "look"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}}
    assert both(server, tool_choice=choice)[0]["calls"] == [("look", {})]


def test_documents_effort_and_other_variables_reach_the_template(stub):
    server = stub({"chat_template": "{{ documents[0].text }}|{{ reasoning_effort }}|{{ x }}|{{ messages[0].content }}"})
    both(server, tools=[], reasoning_effort="low", extra_body={"documents": [{"text": "doc"}], "chat_template_kwargs": {"x": 7}})
    assert server.engine.asked[0][0].text == "doc|low|7|Hi"


def test_parts_of_a_text_are_joined_where_the_operator_says_so(stub):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    server = stub({"chat_template_content_format": "string"})
    httpx.post(f"{server.v1}/chat/completions", json=body)
    assert server.engine.asked[0][0].text == "a\nb"


def test_the_operator_s_defaults(stub):
    server = stub({"override_generation_config": {"temperature": 0.25, "top_k": 9}, "return_tokens_as_token_ids": True})
    httpx.post(f"{server.v1}/completions", json={"prompt": "a", "top_k": 3})
    params = server.engine.asked[0][1]
    assert (params.temperature, params.top_k) == (0.25, 3)


def test_no_max_tokens_means_to_the_end(stub):
    server = stub()
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", BODY)):
        httpx.post(f"{server.v1}/{path}", json=body)
        assert server.engine.asked[-1][1].max_tokens is None


def test_a_role_of_the_operator_s(stub):
    told = httpx.post(f"{stub({'response_role': 'bot'}).v1}/chat/completions", json=BODY).json()
    assert told["choices"][0]["message"]["role"] == "bot"
