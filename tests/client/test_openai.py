"""The client against a server that repeats what it is told."""

import asyncio
import json
import signal
import time

import pytest

from llmkit.client.openai import Events, OpenAIClient, in_sync
from llmkit.errors import ConfigError, ServerError

CHAT = "/v1/chat/completions"


def chat(text, **more):
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


def run(fake, use, **options):
    async def main():
        client = OpenAIClient(fake if isinstance(fake, str) else fake.url, **options)
        try:
            return await use(client)
        finally:
            client.close()

    return asyncio.run(main())


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_ways_to_write_an_address(fake_openai, ending):
    assert run(fake_openai.url + ending, lambda c: c.models()) == ["fake"]
    assert run(fake_openai.url.removeprefix("http://") + ending, lambda c: c.models()) == ["fake"]


def test_an_address_that_is_none():
    with pytest.raises(ConfigError, match="not the address"):
        OpenAIClient("ftp://x")


def test_connections_are_used_again_and_no_more_than_needed(fake_openai):
    async def use(client):
        for _ in range(3):
            await asyncio.gather(*(client.post(CHAT, chat("a b")) for _ in range(5)))
        return len(client.connections._idle)

    assert run(fake_openai, use) == 5
    assert len(fake_openai.requests) == 15


def test_a_kept_connection_that_the_server_closed_is_replaced(fake_openai):
    async def use(client):
        await client.get("/v1/models")
        exchange = client.connections._idle[0]
        exchange._transport.write(b"nonsense\r\n\r\n")  # the server answers 400 and closes: nothing of that is the next answer
        await asyncio.sleep(0.1)
        return await client.post(CHAT, chat("still there"))

    assert run(fake_openai, use).body["choices"][0]["message"]["content"] == "still there"


def test_a_reply_says_what_is_wrong(fake_openai):
    reply = run(fake_openai, lambda c: c.post(CHAT, chat("please refuse")))
    assert (reply.status, reply.ok, reply.message, reply.request_id) == (400, False, "trouble: please refuse", "fake-1")


def test_the_key_goes_along(fake_openai):
    run(fake_openai, lambda c: c.post(CHAT, chat("a")), api_key="secret")
    assert fake_openai.keys == ["Bearer secret"]


def test_a_stream_is_the_plain_answer(fake_openai):
    async def use(client):
        events = [e async for e in client.events(CHAT, chat("从前 有 座山", stream=True))]
        return "".join(c["delta"].get("content", "") for e in events for c in e["choices"]), events[-1]["usage"]

    assert run(fake_openai, use) == ("从前 有 座山", {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6})


def test_leaving_a_stream_early_ends_it_on_the_server(fake_openai):
    fake_openai.delay = 0.01

    async def use(client):
        events = client.events(CHAT, chat("word " * 500, stream=True))
        await anext(events)
        await events.aclose()
        for _ in range(200):
            if fake_openai.left:
                return True
            await asyncio.sleep(0.01)

    assert run(fake_openai, use)


def test_failures_are_server_errors(fake_openai):
    async def drain(client):
        return [e async for e in client.events(CHAT, chat("one two three", stream=True))]

    fake_openai.break_after = 2
    with pytest.raises(ServerError, match="connection broke"):
        run(fake_openai, drain)
    with pytest.raises(ServerError, match="401") as refusal:
        run(fake_openai, lambda c: anext(c.events(CHAT, chat("please keep out", stream=True))))
    assert "--api-key" in (refusal.value.hint or "")
    with pytest.raises(ServerError, match=r"no server at http.*nobody listens there"):
        run("http://127.0.0.1:9", lambda c: c.models())


def test_an_error_in_the_middle_of_a_stream_is_raised():
    from llmkit.client.openai import _checked

    with pytest.raises(ServerError, match="engine died"):
        _checked({"error": {"message": "engine died"}})


def test_events_cut_anywhere():
    raw = ": keep-alive\n\ndata: {\"a\": \"山\"}\r\n\r\ndata:{\"a\": 2}\n\ndata: [DONE]\n\n".encode()
    for place in range(len(raw)):
        events = Events()
        assert [*events.feed(raw[:place]), *events.feed(raw[place:])] == [{"a": "山"}, {"a": 2}]


def test_events_for_code_that_is_not_async(fake_openai):
    with asyncio.Runner() as runner:
        client = OpenAIClient(fake_openai.url)
        events = in_sync(client.events(CHAT, chat("a b c", stream=True)), runner)
        assert "a" in json.dumps(next(events))
        events.close()
        runner.run(asyncio.sleep(0))
        assert sum(1 for _ in in_sync(client.events(CHAT, chat("a b c", stream=True)), runner)) == 5


@pytest.mark.parametrize("moment", ["as a step begins", "while it waits", "between two"])
def test_an_interrupt_at_any_moment_goes_on_as_one_and_leaves_nothing(fake_openai, moment):
    fake_openai.delay = 0.2
    with asyncio.Runner() as runner:
        client = OpenAIClient(fake_openai.url)
        events = in_sync(client.events(CHAT, chat("a b c d e f", stream=True)), runner)
        next(events)
        loop = runner.get_loop()
        if moment == "while it waits":
            loop.call_later(0.05, signal.raise_signal, signal.SIGINT)
        elif moment == "as a step begins":  # before asyncio's runner would have its own handler in place
            begin = loop.create_task

            def create_task(*args, **options):
                loop.create_task = begin
                task = begin(*args, **options)
                signal.raise_signal(signal.SIGINT)
                return task

            loop.create_task = create_task

        def take_all():
            for _ in events:
                if moment == "between two":
                    signal.raise_signal(signal.SIGINT)

        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            take_all()
        events.close()
        runner.run(asyncio.sleep(0.01))  # generators within generators are closed by the loop
        assert time.monotonic() - began < 1, "it does not wait for the answer's end"
        assert not asyncio.all_tasks(loop)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert sum(1 for _ in in_sync(client.events(CHAT, chat("a", stream=True)), runner)) == 3
