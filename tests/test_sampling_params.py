"""SamplingParams: vLLM's words, checked at once."""

import math

import numpy as np
import pytest

from llmkit import SamplingParams, StructuredOutputs, vllm_options
from llmkit.errors import InvalidRequestError, UnknownOptionError


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"), ("temperature", None),
     ("n", 0), ("n", 1.5), ("n", True), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", -0.1), ("max_tokens", 0),
     ("min_tokens", -1), ("presence_penalty", 3), ("repetition_penalty", 0), ("seed", "a"), ("logprobs", -2), ("logprobs", True),
     ("stop", [""]), ("stop", [1]), ("stop", 5), ("stop_token_ids", ["a"]), ("stop_token_ids", 3), ("bad_words", "word"),
     ("logit_bias", {"a": 1}), ("logit_bias", {1: math.nan}), ("logit_bias", [1]), ("allowed_token_ids", []),
     ("allowed_token_ids", ["a"]), ("structured_outputs", "json")],
)  # fmt: skip
def test_a_bad_value_is_named(name, value):
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**{name: value})
    assert error.value.param == name
    assert name in str(error.value)
    assert isinstance(error.value, ValueError)


def test_numpys_numbers_are_numbers():
    p = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(3), seed=np.uint8(1), stop_token_ids=np.array([1, 2]))
    assert (p.temperature, p.max_tokens, p.seed, p.stop_token_ids) == (0.5, 3, 1, [1, 2])
    assert type(p.temperature) is float
    assert type(p.max_tokens) is int


def test_forms_that_mean_the_same():
    assert SamplingParams(stop="x").stop == SamplingParams(stop=("x",)).stop == ["x"]
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0) == SamplingParams()
    assert SamplingParams(structured_outputs={"regex": "a"}) == SamplingParams(guided_decoding=StructuredOutputs(regex="a"))
    assert SamplingParams(temperature=0).clone(max_tokens=3) == SamplingParams(temperature=0.0, max_tokens=3)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownOptionError, match="did you mean 'temperature'"):
        SamplingParams(temprature=1)
    with pytest.raises(UnknownOptionError, match="regex"):
        StructuredOutputs(regexp="a")
    with pytest.raises(UnknownOptionError, match="regex"):
        SamplingParams(structured_outputs={"regexp": "a"})


@pytest.mark.parametrize("name", vllm_options.SAMPLING)
def test_vllms_other_parameters(name):
    harmless, hint = vllm_options.SAMPLING[name]
    assert all(SamplingParams(**{name: value}) == SamplingParams() for value in harmless)
    with pytest.raises(UnknownOptionError) as error:
        SamplingParams(**{name: "other"})
    assert error.value.hint == hint


@pytest.mark.parametrize("name", vllm_options.STRUCTURED)
def test_vllms_other_ways_to_structure(name):
    harmless, hint = vllm_options.STRUCTURED[name]
    assert all(StructuredOutputs(regex="a", **{name: value}) == StructuredOutputs(regex="a") for value in harmless)
    with pytest.raises(UnknownOptionError) as error:
        StructuredOutputs(regex="a", **{name: "other"})
    assert error.value.hint == hint


@pytest.mark.parametrize(
    "given",
    [{}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"choice": ["", "a"]}, {"choice": "abc"}, {"json": "{"}, {"json": dict},
     {"regex": 5}, {"grammar": 5}],
    ids=str,
)  # fmt: skip
def test_structured_outputs_of_no_sense(given):
    with pytest.raises(InvalidRequestError):
        StructuredOutputs(**given)
