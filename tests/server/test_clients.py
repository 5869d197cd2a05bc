"""The clients that people really use, unchanged, against real weights: openai, langchain, litellm, instructor."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

NAME = "smollm2"
QUESTION = [{"role": "user", "content": "Name three colours."}]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=10)
    people: int = Field(ge=0, le=1_000_000)


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.v1, api_key="EMPTY", max_retries=0) as client:
        yield client


# ---- openai


def test_openai_chat_whole_and_streamed(client):
    asked: Any = {"model": NAME, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    pieces = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 8
    with client.chat.completions.stream(**asked, stop=["a", "e"]) as stream:
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


def test_openai_async(server):
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=server.v1, api_key="EMPTY") as client:
            asked: Any = {"model": NAME, "messages": QUESTION, "max_tokens": 6, "temperature": 0}
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**asked), client.chat.completions.create(stream=True, **asked)
            )
            return whole.choices[0].message.content, "".join([c.choices[0].delta.content or "" async for c in stream])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


def test_openai_parse_helpers(client):
    parsed = client.chat.completions.parse(
        model=NAME, messages=[{"role": "user", "content": "A city?"}], response_format=City, max_tokens=80, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, City)


def test_openai_tools(client):
    asked: Any = {"model": NAME, "messages": QUESTION, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 60,
                  "temperature": 0, "parallel_tool_calls": False}  # fmt: skip
    (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert "sunny" in {"get_weather": get_weather}[call.function.name](**json.loads(call.function.arguments))
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    answer = client.chat.completions.create(
        model=NAME, max_tokens=4, tools=[WEATHER],
        messages=[*QUESTION, {"role": "assistant", "tool_calls": [call.model_dump()]},
                  {"role": "tool", "tool_call_id": call.id, "content": "sunny"}],
    )  # fmt: skip
    assert answer.choices[0].message.role == "assistant"


def test_openai_completions_models_and_errors(client):
    told = client.completions.create(model=NAME, prompt="Once upon a", max_tokens=3, logprobs=1, temperature=0)
    assert len(told.choices[0].logprobs.tokens) == 3
    assert "".join(c.choices[0].text for c in client.completions.create(
        model=NAME, prompt="Once upon a", max_tokens=3, temperature=0, stream=True)) == told.choices[0].text  # fmt: skip
    assert [m.id for m in client.models.list()] == [NAME, "another-name"]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=QUESTION, temperature=-1)
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")


def test_openai_leaving_a_stream_early(client, llm):
    stream = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=900, stream=True)
    next(stream)
    stream.close()
    assert client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=2).usage.completion_tokens == 2


# ---- langchain-openai


def chat_openai(server: Any, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=server.v1, api_key="EMPTY", model=NAME, **{"max_tokens": 8, "temperature": 0, **options})


def test_the_tutorial_s_client(server):
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=server.v1, api_key="EMPTY", model=NAME, max_tokens=16)
    assert isinstance(llm.invoke(input="你可以做什么？").content, str)


def test_langchain_invoke_and_stream(server):
    llm = chat_openai(server)
    whole = llm.invoke("Name three colours.")
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in llm.stream("Name three colours.")) == whole.content
    assert asyncio.run(llm.ainvoke("Name three colours.")).content == whole.content


def test_langchain_tools(server):
    llm = chat_openai(server, max_tokens=60).bind_tools([WEATHER], tool_choice="required", parallel_tool_calls=False)
    (call,) = llm.invoke("The weather in Paris?").tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}
    streamed = None
    for chunk in llm.stream("The weather in Paris?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(server, method):
    llm = chat_openai(server, max_tokens=80).with_structured_output(City, method=method)
    assert isinstance(llm.invoke("A city?"), City)


# ---- litellm, instructor


def test_litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    import litellm

    asked: Any = {"model": f"openai/{NAME}", "api_base": server.v1, "api_key": "EMPTY", "messages": QUESTION, "max_tokens": 6,
                  "temperature": 0}  # fmt: skip
    whole = litellm.completion(**asked)
    assert whole.usage.completion_tokens == 6
    pieces = litellm.completion(stream=True, **asked)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**asked | {"temperature": -1})


def test_instructor(server):
    import instructor

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=server.v1, api_key="EMPTY"), mode=mode)
        city = client.chat.completions.create(
            model=NAME, response_model=City, messages=[{"role": "user", "content": "A city?"}], max_tokens=80, temperature=0,
            max_retries=0,
        )  # fmt: skip
        assert isinstance(city, City)
