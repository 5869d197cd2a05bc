"""The text side of a request, without an engine: what is said to a reader, and when."""

import time

import numpy as np
import pytest

from llmkit import SamplingParams
from llmkit.engine.request import Request, Status
from llmkit.job import Job
from llmkit.outputs import Logprob
from llmkit.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return Tokenizer.from_folder(smollm2_folder)


def run(tokenizer, tokens, params, stop_ids=(), streaming=True, reason="length"):
    """Feed tokens as an engine would; (job, chunks)."""
    request = Request("r", np.array([1], np.int32), params, stop_ids=stop_ids)
    job, chunks = Job("p", [request], tokenizer, streaming), []
    job.notify = chunks.append
    for i, token in enumerate(tokens):
        if token in stop_ids or i == len(tokens) - 1:
            request.status, request.finish_reason = Status.FINISHED, "stop" if token in stop_ids else reason
        if params.logprobs is not None:
            request.logprobs.append({token: Logprob(-0.5, 1, "x")})
        if job.take(request, token):
            request.status, request.finish_reason = Status.FINISHED, "stop"
        if request.finished:
            break
    job.close(request)
    return job, chunks


@pytest.mark.parametrize("streaming", [True, False])
def test_pieces_and_whole(tokenizer, streaming):
    tokens = tokenizer.encode("你好, 👨‍👩‍👧‍👦 world")
    job, chunks = run(tokenizer, tokens, SamplingParams(), streaming=streaming)
    assert "".join(c.text for c in chunks) == job.output().outputs[0].text == "你好, 👨‍👩‍👧‍👦 world"
    assert [t for c in chunks for t in c.token_ids] == tokens
    assert len(chunks) == (len(tokens) if streaming else 1)
    assert [c.finish_reason for c in chunks][-1] == "length"


def test_the_stop_token_is_counted_but_not_said(tokenizer):
    tokens = tokenizer.encode("one two three")
    for include in (False, True):
        params = SamplingParams(include_stop_str_in_output=include)
        answer = run(tokenizer, tokens, params, stop_ids=(tokens[-1],))[0].output().outputs[0]
        assert answer.token_ids == tokens
        assert answer.text == ("one two three" if include else tokenizer.decode(tokens[:-1]))


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer):
    tokens = tokenizer.encode("one two three")
    job, chunks = run(tokenizer, tokens, SamplingParams(stop="three four"))
    assert job.output().outputs[0].text == "one two three"
    assert chunks[-1].text.endswith("three")


def test_half_a_character_at_the_end_is_one_mark(tokenizer):
    tokens = tokenizer.encode("👨")[:-1]
    job, chunks = run(tokenizer, tokens, SamplingParams())
    assert [c.text for c in chunks][:-1] == [""] * (len(tokens) - 1)
    assert job.output().outputs[0].text == "\ufffd"


def test_a_whole_answer_is_made_once_when_the_last_of_its_answers_has_its_text(tokenizer):
    requests = [Request(f"r{i}", np.array([1], np.int32), SamplingParams(n=2)) for i in range(2)]
    job, said = Job("p", requests, tokenizer), []
    for request, text in zip(requests, ("one two", "three")):
        for token in tokenizer.encode(text):
            job.take(request, token)
        request.status, request.finish_reason = Status.FINISHED, "length"
    for request in requests:  # both have ended, by one step
        job.close(request)
        said.append([a.text for a in job.output().outputs])
    assert said == [["one two", ""], ["one two", "three"]]
    assert job.output() is job.output(), "made while others went on"


def test_logprobs_go_with_their_tokens(tokenizer):
    tokens = tokenizer.encode("one two three four")
    job, chunks = run(tokenizer, tokens, SamplingParams(logprobs=1))
    assert all([next(iter(e)) for e in c.logprobs] == c.token_ids for c in chunks)
    assert job.output().outputs[0].cumulative_logprob == -0.5 * len(tokens)


def test_no_text_when_none_is_wanted(tokenizer):
    job, chunks = run(tokenizer, [10, 11, 12], SamplingParams(detokenize=False))
    assert job.output().outputs[0].text == ""
    assert [c.token_ids for c in chunks] == [[10], [11], [12]]


def test_a_streamed_token_costs_the_same_however_long_the_answer(tokenizer):
    def seconds(count):
        begin = time.perf_counter()
        run(tokenizer, [100 + i % 50 for i in range(count)], SamplingParams())
        return time.perf_counter() - begin

    seconds(500)
    assert min(seconds(16_000) for _ in range(3)) < 16 * 4 * min(seconds(1000) for _ in range(3))
