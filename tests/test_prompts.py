"""From what a user passes to requests: forms, limits, what the engine gets."""

from types import SimpleNamespace

import pytest

from llmkit import SamplingParams, StructuredOutputs
from llmkit.config import EngineConfig
from llmkit.engine import grammar
from llmkit.errors import InvalidRequestError
from llmkit.prompts import RequestBuilder, as_list, rules_of
from llmkit.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def started(smollm2_folder):
    return SimpleNamespace(
        tokenizer=Tokenizer.from_folder(smollm2_folder),
        config=EngineConfig(),
        model_config=SimpleNamespace(vocab_size=49152, eos_token_ids=(2,)),
        engine=SimpleNamespace(plan=SimpleNamespace(max_model_len=64)),
        generation_config={"eos_token_id": [2, 0], "temperature": 0.6, "top_k": None, "do_sample": True},
    )


@pytest.fixture
def builder(started):
    return RequestBuilder(started.tokenizer, rules_of(started))


@pytest.mark.parametrize(
    ("given", "count"),
    [("text", 1), ([1, 2], 1), ((1, 2), 1), ({"prompt": "a"}, 1), (["a", "b"], 2), ([[1], [2, 3]], 2), ([{}, "b", [3]], 3)],
)
def test_one_or_many(given, count):
    assert len(as_list(given)) == count


def test_a_generator_is_told_to_become_a_list():
    with pytest.raises(InvalidRequestError, match=r"list\(prompts\)"):
        as_list(p for p in "ab")


def test_what_a_request_gets(builder):
    params = SamplingParams(max_tokens=5, stop_token_ids=[7, 2], seed=9, n=2)
    text, (first, second) = builder.build(["Hello there"], params, priority=3)[0]
    assert text == "Hello there"
    assert first.stop_ids == (2, 0, 7)
    assert first.max_total == len(first.prompt) + 5
    assert (first.seed, second.seed) == (9, 10)
    assert (first.fork_of, second.fork_of) == (None, first)
    assert (first.priority, second.priority) == (3, 3)
    assert second.id == f"{first.id}/1"


def test_limits(builder):
    def build(**options):
        return builder.build([[5] * 10], SamplingParams(**options))[0][1][0]

    assert build().max_total == 64
    assert build(max_tokens=1000).max_total == 64
    assert build(max_tokens=3).max_total == 13
    assert build(ignore_eos=True).stop_ids == ()


def test_the_models_own_defaults_unless_told_otherwise(started):
    assert RequestBuilder(started.tokenizer, rules_of(started)).defaults == SamplingParams(temperature=0.6)
    plain = SimpleNamespace(**vars(started) | {"config": EngineConfig(generation_config="none")})
    assert rules_of(plain).defaults == {}


def test_requests_without_a_seed_differ_and_repeat(started):
    def seeds():
        return [r.seed for _, (r,) in RequestBuilder(started.tokenizer, rules_of(started)).build(["a"] * 5, None)]

    assert len(set(seeds())) == 5
    assert seeds() == seeds()


def test_a_grammar_is_compiled_once_for_a_batch(builder, monkeypatch):
    compiled, compile_ = [], grammar.Grammar.compile

    def counting(*args):
        compiled.append(1)
        return compile_(*args)

    monkeypatch.setattr(grammar.Grammar, "compile", counting)
    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a+"), n=2)
    requests = [r for _, both in builder.build(["x"] * 50, params) for r in both]
    assert len(compiled) == 1
    assert len({id(r.grammar) for r in requests}) == 100


def test_priorities_of_each(builder):
    assert [r.priority for _, (r,) in builder.build(["a", "b"], None, [2, 1])] == [2, 1]
    assert [r.priority for _, (r,) in builder.build(["a", "b"], None, None)] == [0, 0]
    for bad in ([1], [1, "a"], 1.5, "ab"):
        with pytest.raises(InvalidRequestError, match="priority"):
            builder.build(["a", "b"], None, bad)


def test_bad_words_alone_and_after_a_space(builder):
    _, (request,) = builder.build(["x"], SamplingParams(bad_words=["Paris"]))[0]
    decode = builder._tokenizer.decode
    assert [decode(ids) for ids in request.bad_words] == ["Paris", " Paris"]
