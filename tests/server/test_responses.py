"""/v1/responses through the openai client: items, events in order, tools, schemas, and what is kept of them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from llmkit.errors import EngineUnavailableError
from llmkit.server.endpoints.response_store import ResponseStore, Stored
from llmkit.server.http.errors import HttpError
from llmkit.server.shelf import Shelf

WEATHER: dict[str, Any] = {
    "type": "function", "name": "get_weather", "description": "The weather of a city", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
                   "additionalProperties": False},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
MODEL = "smollm2"


def client(server: Any) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(limits=httpx.Limits(max_keepalive_connections=0))  # a server that ends waits for nobody
    return openai.OpenAI(base_url=server.v1, api_key="EMPTY", max_retries=0, timeout=60, http_client=http)


def scrubbed(value: Any) -> Any:
    """Without ids and times."""
    if isinstance(value, dict):
        hidden = ("id", "item_id", "call_id", "created_at", "completed_at")
        return {k: scrubbed(v) for k, v in value.items() if k not in hidden}
    return [scrubbed(v) for v in value] if isinstance(value, list) else value


# ---- what is said


def test_real_weights_whole_streamed_and_as_chat_say_the_same(server):
    """Greedy answers of the default model."""
    ai = client(server)
    question = "Name three colours."
    asked: Any = {"model": MODEL, "input": question, "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0}
    whole = ai.responses.create(**asked)
    with ai.responses.stream(**asked) as stream:
        deltas = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    chat = ai.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert whole.output_text == deltas == chat.choices[0].message.content
    assert whole.output_text
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == chat.usage.completion_tokens == 12
    assert whole.usage.total_tokens == chat.usage.total_tokens


def test_everything_that_an_answer_may_hold(scripted, serve):
    """Thoughts, text and a call: items whole, and the events that tell of them, in their order."""
    server = serve(scripted(f"<think>Hm, 雨?</think>I look.{CALL}"), reasoning_parser="think")
    ai, asked = client(server), {"model": MODEL, "input": "Weather in Oslo?", "tools": [WEATHER]}
    whole = ai.responses.create(**asked)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    thought, message, call = whole.output
    assert (thought.content[0].text, message.content[0].text) == ("Hm, 雨?", "I look.")
    assert (call.name, json.loads(call.arguments), call.status) == ("get_weather", {"city": "Oslo"}, "completed")
    assert (whole.status, whole.output_text, whole.error) == ("completed", "I look.", None)
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert whole.usage.input_tokens_details.cached_tokens == 3

    events = list(ai.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    assert [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert events[0].response.output == []
    assert [e.output_index for e in events if e.type == "response.output_item.added"] == [0, 1, 2]
    joined = {"output_text": "I look.", "reasoning_text": "Hm, 雨?", "function_call_arguments": call.arguments}
    for kind, text in joined.items():
        assert "".join(e.delta for e in events if e.type == f"response.{kind}.delta") == text
    last = events[-1].response
    assert scrubbed(last.to_dict()) == scrubbed(whole.to_dict())
    done = [e.item.to_dict() for e in events if e.type == "response.output_item.done"]
    assert done == [item.to_dict() for item in last.output]
    ids = {item.id for item in last.output}
    assert {e.item_id for e in events if hasattr(e, "item_id")} == ids


def test_the_clients_stream_helper_agrees(scripted, serve):
    server = serve(scripted(f"Well.{CALL}"))
    with client(server).responses.stream(model=MODEL, input="Weather?", tools=[WEATHER]) as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert json.loads(snapshots[-1]) == final.output[1].parsed_arguments == {"city": "Oslo"}
    assert final.output_text == "Well."


class Answer(pydantic.BaseModel):
    colour: Literal["red", "blue"]
    number: Literal[1, 2]


def test_structured_output_of_real_weights(server):
    ai = client(server)
    parsed = ai.responses.parse(model=MODEL, input="A colour and a number, as JSON.", text_format=Answer, temperature=0)
    assert isinstance(parsed.output_parsed, Answer)
    assert parsed.text.format.type == "json_schema"
    plain = ai.responses.create(model=MODEL, input="A colour.", text={"format": {"type": "json_object"}}, max_output_tokens=200)
    assert plain.status == "incomplete" or isinstance(json.loads(plain.output_text), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"},
                                    {"type": "allowed_tools", "mode": "required",
                                     "tools": [{"type": "function", "name": "get_weather"}]}])  # fmt: skip
def test_a_required_call_of_real_weights(server, choice):
    asked: Any = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    made = client(server).responses.create(model=MODEL, input="Weather in Rome?", temperature=0, **asked)
    assert [item.type for item in made.output] == ["function_call"]
    assert json.loads(made.output[0].arguments)["city"] in ("Oslo", "Rome")


def test_logprobs(server):
    asked = {"model": MODEL, "input": "Hi", "max_output_tokens": 4, "temperature": 0, "top_logprobs": 2,
             "include": ["message.output_text.logprobs"]}  # fmt: skip
    whole = client(server).responses.create(**asked).output[0].content[0]
    assert "".join(p.token for p in whole.logprobs) == whole.text
    assert all(len(p.top_logprobs) == 2 and p.logprob <= 0 for p in whole.logprobs)
    streamed = [p for e in client(server).responses.create(**asked, stream=True) if e.type == "response.output_text.delta"
                for p in e.logprobs]  # fmt: skip
    assert [p.token for p in streamed] == [p.token for p in whole.logprobs]


# ---- what is read


def test_items_become_the_conversation(scripted, serve):
    engine = scripted("ok")
    asked: Any = [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    client(serve(engine)).responses.create(model=MODEL, instructions="Top.", input=asked)
    (prompt,) = engine.prompts
    assert prompt.count("<|im_start|>system") == 1
    assert prompt.startswith("<|im_start|>system\nTop.\n\nRules.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>")
    assert ('<|im_start|>assistant\nI look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>') in prompt  # fmt: skip
    assert "rain" in prompt
    assert prompt.index("rain") < prompt.index("sun") < prompt.index("<|im_start|>assistant\n", prompt.index("sun"))


def test_sampling_fields_arrive(scripted, serve):
    engine = scripted("ok")
    extra = {"top_k": 5, "seed": 7, "stop": ["x"]}
    made = client(serve(engine)).responses.create(model=MODEL, input="Hi", temperature=0.3, top_p=0.7, max_output_tokens=9,
                                                  extra_body=extra, metadata={"a": "b"})  # fmt: skip
    (p,) = engine.params
    assert (p.temperature, p.top_p, p.max_tokens, p.top_k, p.seed, p.stop) == (0.3, 0.7, 9, 5, 7, ["x"])
    assert (made.temperature, made.top_p, made.max_output_tokens, made.metadata) == (0.3, 0.7, 9, {"a": "b"})


def test_input_tokens_are_counted(server):
    ai = client(server)
    made = ai.responses.create(model=MODEL, input="Name three colours.", max_output_tokens=1)
    assert ai.responses.input_tokens.count(model=MODEL, input="Name three colours.").input_tokens == made.usage.input_tokens


def test_truncation_auto_drops_the_oldest_turns(scripted, serve):
    engine = scripted("ok")
    long = [{"role": r, "content": f"turn {i} " + "word " * 900} for i in range(6) for r in ("user", "assistant")]
    asked: Any = {"model": MODEL, "instructions": "Top.", "input": [*long, {"role": "user", "content": "last"}]}
    ai = client(serve(engine))
    with pytest.raises(openai.BadRequestError, match="context is 4096 tokens"):
        ai.responses.create(**asked)
    ai.responses.create(**asked, truncation="auto")
    assert engine.prompts[-1].startswith("<|im_start|>system\nTop.")
    assert "turn 3" not in engine.prompts[-1]
    assert "turn 5" in engine.prompts[-1]
    assert "last" in engine.prompts[-1]


# ---- what is kept


def test_a_response_is_continued_and_looked_up(scripted, serve):
    engine = scripted(lambda prompt: "second" if "first" in prompt else "first")
    ai = client(serve(engine))
    one = ai.responses.create(model=MODEL, input="One", instructions="Old rules.")
    two = ai.responses.create(model=MODEL, input="Two", previous_response_id=one.id)
    assert (one.output_text, two.output_text, two.previous_response_id) == ("first", "second", one.id)
    assert "Old rules." not in engine.prompts[1]
    turns = "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\nTwo<|im_end|>"
    assert turns in engine.prompts[1]
    assert ai.responses.retrieve(two.id).to_dict() == two.to_dict()
    items = ai.responses.input_items.list(one.id).data
    assert [(i.role, i.content[0].text) for i in items] == [("user", "One")]
    streamed = list(ai.responses.create(model=MODEL, input="Three", previous_response_id=two.id, stream=True))[-1].response
    assert ai.responses.retrieve(streamed.id).output_text == "second"
    ai.responses.delete(one.id)
    for gone in (lambda: ai.responses.retrieve(one.id), lambda: ai.responses.delete(one.id),
                 lambda: ai.responses.create(model=MODEL, input="x", previous_response_id=one.id)):  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            gone()


def test_a_tool_loop_over_previous_response_id(scripted, serve):
    engine = scripted(lambda prompt: "It rains." if "rain" in prompt else CALL)
    ai = client(serve(engine))
    first = ai.responses.create(model=MODEL, input="Weather?", tools=[WEATHER])
    output: Any = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "rain"}
    second = ai.responses.create(model=MODEL, input=[output], previous_response_id=first.id, tools=[WEATHER])
    assert second.output_text == "It rains."
    assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in engine.prompts[1]


def test_store_false_keeps_nothing(scripted, serve):
    ai = client(serve(scripted("ok")))
    made = ai.responses.create(model=MODEL, input="Hi", store=False)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(made.id)


def test_in_the_background(scripted, serve):
    ai = client(serve(scripted("one two three", delay=0.02)))
    made = ai.responses.create(model=MODEL, input="Hi", background=True)
    assert (made.status, made.background) == ("in_progress", True)
    with pytest.raises(openai.BadRequestError, match="still in progress"):
        ai.responses.create(model=MODEL, input="x", previous_response_id=made.id)
    end = time.monotonic() + 10
    while (found := ai.responses.retrieve(made.id)).status == "in_progress" and time.monotonic() < end:
        time.sleep(0.02)
    assert (found.status, found.output_text) == ("completed", "one two three")
    assert ai.responses.cancel(made.id).status == "completed"
    assert ai.responses.create(model=MODEL, input="x", previous_response_id=made.id).status == "completed"


def test_cancelling_frees_the_engine(scripted, serve):
    engine = scripted("word " * 1000, delay=0.01)
    ai = client(serve(engine))
    made = ai.responses.create(model=MODEL, input="Hi", background=True)
    end = time.monotonic() + 10
    while not engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert ai.responses.cancel(made.id).status == "cancelled"
    assert engine.running == 0
    assert ai.responses.retrieve(made.id).status == "cancelled"
    quick = ai.responses.create(model=MODEL, input="Hi", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background=true"):
        ai.responses.cancel(quick.id)


def test_the_store_is_bounded():
    async def body() -> None:
        shelf = Shelf(most=3, most_bytes=1000)
        store = ResponseStore(shelf)
        ended: list[str] = []

        def stored(name: str, size: int = 10) -> Stored:
            return Stored({"id": name, "status": "completed", "x": "y" * size}, [], [])

        async def kept(name: str) -> bool:
            try:
                return (await store.get(name, "x")).key == name
            except HttpError:
                return False

        for name in "abc":
            await store.put(stored(name))
        await store.get("a", "x")
        await store.put(stored("d"))
        assert [await kept(n) for n in "bcda"] == [False, True, True, True]
        await store.put(stored("r"), lambda: ended.append("r"))
        await store.put(stored("f", 900))
        assert (len(shelf), await kept("r"), await kept("f")) == (2, True, True)  # what runs is not forgotten
        await store.delete("r", "x")
        await store.settle(stored("r"))
        assert (ended, await kept("r")) == (["r"], False)
        with pytest.raises(HttpError, match="no response 'r'"):
            await store.get("r", "response_id")

    asyncio.run(body())


# ---- what goes wrong


def test_a_stream_that_breaks_says_so(scripted, serve):
    """At its very beginning by its status, later by an event."""
    died = EngineUnavailableError("the engine died", "ask again")
    ai = client(serve(scripted(died)))
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            ai.responses.create(model=MODEL, input="Hi", stream=stream)
        assert caught.value.status_code == 503
    ai = client(serve(scripted(("I am about to", died))))
    *_, done, last = ai.responses.create(model=MODEL, input="Hi", stream=True)
    assert (last.type, last.response.status, last.response.error.message) == ("response.failed", "failed", "the engine died")
    assert (done.type, done.item.status, done.item.content[0].text) == ("response.output_item.done", "incomplete", "I am about")


def test_a_server_that_stops_and_a_model_that_cannot_go_on(scripted, serve):
    """Neither is a completed answer, nor one that was as long as allowed."""
    ai = client(serve(scripted(("One two three", "abort"))))
    with pytest.raises(openai.InternalServerError, match="ended this answer") as caught:
        ai.responses.create(model=MODEL, input="Hi")
    assert caught.value.status_code == 503
    *_, done, last = ai.responses.create(model=MODEL, input="Hi", stream=True)
    assert (last.type, last.response.status, done.item.content[0].text) == ("response.failed", "failed", "One two three")
    broken = client(serve(scripted(("One two three", "error")))).responses.create(model=MODEL, input="Hi")
    assert (broken.status, broken.error.code, broken.output_text) == ("failed", "server_error", "One two three")


def test_a_reader_who_leaves_frees_the_engine(scripted, serve):
    engine = scripted("word " * 1000, delay=0.01)
    stream = client(serve(engine)).responses.create(model=MODEL, input="Hi", stream=True)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 2
    while engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.running == 0


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "input", "text or a list of items"),
        ({"input": 3}, "input", "text or a list of items"),
        ({"input": []}, "input", "input is empty"),
        ({"input": [3]}, "input", "text or a list of items"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "web_search_call"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "input_image"}]}]},
         "input[1].content[0]", "input[1].content[0] is of type 'input_image'"),
        ({"input": [{"role": "user"}]}, "input[0]", "has no content"),
        ({"input": [{"content": "a"}]}, "input[0].role", "must be text"),
        ({"input": [{"role": "system", "content": [{"type": "x"}]}], "instructions": "a"}, "input", "text only"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "arguments"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, "input[0].arguments", "JSON"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "call_id"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools[0].name", "name"),
        ({"input": "a", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "'g'"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema", "schema"),
        ({"input": "a", "text": {"format": {"type": "yaml"}}}, "text.format.type", "yaml"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"input": "a", "temperature": "hot"}, "temperature", "number"),
        ({"input": "a", "seed": "x"}, "seed", "integer"),
        ({"input": "a", "conversation": "c"}, "conversation", "previous_response_id"),
        ({"input": "a", "background": True, "stream": True}, "background", "exclude"),
        ({"input": "a", "background": True, "store": False}, "store", "store"),
        ({"input": "a", "truncation": "x"}, "truncation", "auto or disabled"),
        ({"input": "word " * 5000}, "input", "1024"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(server, body, param, says):
    response = httpx.post(f"{server.v1}/responses", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_paging_of_input_items(scripted, serve):
    ai = client(serve(scripted("ok")))
    made = ai.responses.create(model=MODEL, input=[{"role": "user", "content": str(i)} for i in range(5)])
    first = ai.responses.input_items.list(made.id, limit=2, order="asc")
    assert ([i.content for i in first.data], first.has_more) == (["0", "1"], True)
    assert [i.content for i in ai.responses.input_items.list(made.id, limit=2, order="asc")] == list("01234")
    assert [i.content for i in ai.responses.input_items.list(made.id)] == list("43210")
