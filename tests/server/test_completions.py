"""/v1/completions over real weights: prompts in every form, echo, logprobs, streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from llmkit import SamplingParams

PROMPT = "Once upon a time"


def post(server: Any, **body: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, **body}
    return httpx.post(f"{server.v1}/completions", json=body, timeout=60)


def joined(response: httpx.Response) -> dict[int, dict[str, Any]]:
    """A stream's choices, in the form of whole ones."""
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    whole: dict[int, dict[str, Any]] = {}
    for choice in (c for p in parts[:-2] for c in json.loads(p.removeprefix("data: "))["choices"]):
        known = whole.setdefault(choice["index"], {"index": choice["index"], "text": "", "logprobs": None})
        known["text"] += choice["text"]
        if choice["logprobs"]:
            known["logprobs"] = known["logprobs"] or {name: [] for name in choice["logprobs"]}
            for name, values in choice["logprobs"].items():
                known["logprobs"][name] += values
        known |= {k: choice[k] for k in ("finish_reason", "stop_reason") if k in choice}
    return whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 2},
        {"logprobs": 1, "echo": True},
        {"echo": True},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
        # cooler than 1: among ten thousands of hardly likely tokens a draw's neighbours are nearer than float32 rounds
        {"prompt": [PROMPT, "The sea"], "n": 2, "temperature": 0.5, "seed": 5},
        {"prompt": [[10, 11, 12], [13, 14]], "echo": True},
        {"prompt": [10, 11, 12]},
        {"stop": ["a", "e"], "max_tokens": 12},
        {"include_stop_str_in_output": True, "stop": "e", "max_tokens": 12},
    ],
)
def test_a_stream_joined_is_the_plain_answer(server, options):
    plain, streamed = post(server, **options).json(), joined(post(server, stream=True, **options))
    assert streamed == {c["index"]: c for c in plain["choices"]}


def test_it_says_what_the_model_says_offline(server, llm):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=2)
    offline = llm.generate(PROMPT, params, use_tqdm=False)[0]
    choice = post(server, logprobs=2, echo=True, prompt_logprobs=2).json()["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == PROMPT + offline.text
    entries = [*offline.prompt_logprobs[1:], *offline.outputs[0].logprobs]
    tokens = [*offline.prompt_token_ids, *offline.outputs[0].token_ids]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx([e[t].logprob for e, t in zip(entries, tokens[1:])], abs=1e-5)
    for top, entry in zip(told["top_logprobs"][1:], entries, strict=True):
        assert top == pytest.approx({e.decoded_token: e.logprob for e in entry.values()}, abs=1e-5)
    assert "".join(told["tokens"]) == choice["text"]
    assert [choice["text"][o:].startswith(t) for o, t in zip(told["text_offset"], told["tokens"])] == [True] * len(tokens)
    shown = choice["prompt_logprobs"][1][str(tokens[1])]
    assert shown["logprob"] == pytest.approx(offline.prompt_logprobs[1][tokens[1]].logprob, abs=1e-5)


def test_usage_counts_what_was_read_and_written(server):
    for body, written in (({}, 6), ({"echo": True, "max_tokens": 0}, 0), ({"n": 2, "temperature": 1, "seed": 1}, 12)):
        told = post(server, **body).json()["usage"]
        assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (4, written, 4 + written)
        streamed = post(server, stream=True, stream_options={"include_usage": True}, **body).text.split("\n\n")[-3]
        assert json.loads(streamed.removeprefix("data: "))["usage"]["completion_tokens"] == written


def test_many_prompts_keep_their_order(server):
    prompts = ["The capital of France is", "Two plus two is", PROMPT]
    together = post(server, prompt=prompts).json()
    assert [c["text"] for c in together["choices"]] == [post(server, prompt=p).json()["choices"][0]["text"] for p in prompts]
    assert together["usage"]["completion_tokens"] == 18


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, 10**30]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "a" * 3 + "漢" * 4000}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": -2}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 129}, "stop"),
        ({"stop": "a" * 100_000}, "stop"),
        ({"bad_words": ["a"] * 2000}, "bad_words"),
        ({"prompt": ["a"] * 1025, "n": 2}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(server, body, param):
    refused = post(server, **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


def test_vllm_s_fields_do_what_they_say(server):
    first = post(server, return_token_ids=True).json()["choices"][0]["token_ids"]
    assert post(server, stop_token_ids=[first[2]], return_token_ids=True).json()["choices"][0]["token_ids"] == first[:3]
    assert post(server, allowed_token_ids=[first[0]], return_token_ids=True).json()["choices"][0]["token_ids"] == [first[0]] * 6
    assert post(server, logit_bias={str(first[0]): -100}, return_token_ids=True).json()["choices"][0]["token_ids"] != first
    as_ids = post(server, logprobs=1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]["tokens"]
    assert as_ids == [f"token_id:{t}" for t in first]
    for field, value in {"min_p": 0.99, "top_k": 1, "top_p": 0.01}.items():
        told = post(server, temperature=1, seed=1, return_token_ids=True, **{field: value}).json()["choices"][0]
        assert told["token_ids"] == first, field


def test_text_to_ids_and_back(server):
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "Grüße, 世界", "return_token_strs": True}).json()
    assert (ids["count"], ids["max_model_len"], len(ids["token_strs"])) == (len(ids["tokens"]), 1024, ids["count"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "Grüße, 世界"}
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": 3}):
        assert httpx.post(f"{server.url}/tokenize", json=body).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [10**9]}).status_code == 400
