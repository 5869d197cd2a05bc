"""/v1/responses of a server with several fronts: what one of them made, the others know."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

LONG: Any = {"input": "Hi", "max_output_tokens": 1500, "extra_body": {"ignore_eos": True}, "background": True}


class Talker:
    """OpenAI's client over one connection, so at one front."""

    def __init__(self, server: Any) -> None:
        http = openai.DefaultHttpxClient(trust_env=False, limits=httpx.Limits(max_connections=1))
        self.ai = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0, timeout=60, http_client=http)
        self.front = http.get(f"{server.url}/server_info").json().get("pid")

    def say(self, text: Any = "Hi", **options: Any) -> Any:
        return self.ai.responses.create(**{"model": "dummy", "input": text, "max_output_tokens": 4, "temperature": 0} | options)


@pytest.fixture(scope="module")
def server(start_once):
    return start_once("--api-server-count", "2", "--served-model-name", "dummy")


def talkers(server: Any) -> list[Talker]:
    """One at each front."""
    met: dict[int, Talker] = {}

    def both() -> bool:
        talker = Talker(server)
        if talker.front is None or talker.front in met:
            talker.ai.close()
        else:
            met[talker.front] = talker
        return len(met) == 2

    server.until("both fronts", both)
    return list(met.values())


def test_the_other_front_finds_continues_and_deletes_it(server):
    one, two = talkers(server)
    asked = {"user": "x" * 2_000_000}  # more than a socket takes at once
    for made in (one.say("One", **asked), list(one.say("One", stream=True, **asked))[-1].response):
        assert two.ai.responses.retrieve(made.id).to_dict() == made.to_dict()
        assert [item.content[0].text for item in two.ai.responses.input_items.list(made.id)] == ["One"]
        more = two.say("Two", previous_response_id=made.id)
        assert more.usage.input_tokens > made.usage.input_tokens + made.usage.output_tokens
        assert one.say("Two", previous_response_id=made.id).output_text == more.output_text
        two.ai.responses.delete(made.id)
        for talker in (one, two):
            with pytest.raises(openai.NotFoundError, match="there is no response"):
                talker.ai.responses.retrieve(made.id)
            with pytest.raises(openai.NotFoundError, match="there is no response"):
                talker.say(previous_response_id=made.id)


def test_many_conversations_that_change_fronts_at_every_turn(server):
    def talk(name: int) -> list[int]:
        last, lengths = None, []
        for turn in range(4):
            talker = Talker(server)
            made = talker.say(f"{name} {turn}", previous_response_id=last)
            assert talker.ai.responses.retrieve(made.id).id == made.id
            talker.ai.close()
            last, lengths = made.id, [*lengths, made.usage.input_tokens]
        return lengths

    with ThreadPoolExecutor(8) as pool:
        for lengths in pool.map(talk, range(8)):
            assert lengths == sorted(set(lengths))


@pytest.mark.parametrize("act", ["cancel", "delete"])
def test_the_other_front_ends_what_runs_in_the_background(server, act):
    one, two = talkers(server)
    made = one.say(**LONG)
    assert (made.status, two.ai.responses.retrieve(made.id).status) == ("in_progress", "in_progress")
    with pytest.raises(openai.BadRequestError, match="still in progress"):
        two.say(previous_response_id=made.id)
    if act == "cancel":
        assert two.ai.responses.cancel(made.id).status == "cancelled"
        assert {t.ai.responses.retrieve(made.id).status for t in (one, two)} == {"cancelled"}
        assert one.ai.responses.cancel(made.id).status == "cancelled"
    else:
        two.ai.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            one.ai.responses.retrieve(made.id)
    server.until("rest", lambda: server.stats()["running"] == 0, 5)


def test_what_a_front_made_outlives_it_and_what_it_was_making_has_failed(server):
    one, two = talkers(server)
    done, running = one.say("One"), one.say(**LONG)
    psutil.Process(one.front).kill()
    server.until("its end", lambda: two.ai.responses.retrieve(running.id).status != "in_progress", 10)
    failed = two.ai.responses.retrieve(running.id)
    assert (failed.status, failed.error.message) == ("failed", "the process that computed this response has ended")
    assert two.ai.responses.retrieve(done.id).to_dict() == done.to_dict()
    assert two.say("Two", previous_response_id=done.id).status == "incomplete"
    assert {t.ai.responses.retrieve(done.id).id for t in talkers(server)} == {done.id}
