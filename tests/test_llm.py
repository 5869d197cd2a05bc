"""The LLM as a person uses it: every way to ask, every parameter that shows in an answer, every mistake."""

import json
import math
import shutil
import time

import jsonschema
import numpy as np
import pytest

from llmkit import LLM, SamplingParams, StructuredOutputs
from llmkit.errors import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    LlmkitError,
    ModelNotFoundError,
    TokenizerError,
    UnknownOptionError,
    UnsupportedModelError,
    WeightsError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12)
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm(smollm2_folder):
    """In float32, so that what is said alone and in company can be compared: bfloat16 rounds differently in other batch sizes."""
    with LLM(smollm2_folder, dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_memory=0.25) as llm:
        yield llm


@pytest.fixture(scope="module")
def dummy(dummy_folder):
    """Fast, and meaningless: for everything that does not depend on what is said."""
    with LLM(dummy_folder, load_format="dummy", max_model_len=256, max_num_seqs=16, kv_cache_memory=0.05) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm, dummy):
    yield
    for each in (llm, dummy):
        stats = each.stats()
        assert stats["kv_blocks_free"] == stats["kv_blocks_total"]
        assert stats["running"] == stats["waiting"] == 0


# ---- asking


def test_one_prompt_and_many(llm):
    alone = [llm.generate(p, GREEDY)[0].outputs[0].text for p in ("The capital of France is", "1, 2, 3,")]
    both = llm.generate(["The capital of France is", "1, 2, 3,"], GREEDY)
    assert [o.outputs[0].text for o in both] == alone
    assert [o.prompt for o in both] == ["The capital of France is", "1, 2, 3,"]
    assert "Paris" in alone[0]
    assert all(o.finished and o.outputs[0].finish_reason == "length" and len(o.outputs[0].token_ids) == 12 for o in both)


def test_every_form_of_a_prompt_means_the_same(dummy):
    text = "The capital of France"
    ids = dummy.get_tokenizer().encode(text)
    forms = [ids, tuple(ids), np.array(ids), {"prompt": text}, {"prompt_token_ids": ids}]
    forms.append({"prompt": text, "prompt_token_ids": ids})
    answers = dummy.generate([text, *forms], GREEDY)
    assert len({tuple(a.outputs[0].token_ids) for a in answers}) == 1
    assert [a.prompt for a in answers] == [text, None, None, None, text, None, text]
    assert all(a.prompt_token_ids == ids for a in answers)
    assert dummy.generate(ids, GREEDY)[0].outputs[0].token_ids == answers[0].outputs[0].token_ids
    assert dummy.generate(prompt_token_ids=[ids], sampling_params=GREEDY)[0].prompt_token_ids == ids


def test_each_prompt_may_have_its_own_parameters(dummy):
    out = dummy.generate(["a", "b"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 5)])
    assert [len(o.outputs[0].token_ids) for o in out] == [2, 5]


def test_a_list_is_worked_off_longest_first_and_comes_back_in_order(dummy_folder):
    """Two rows, 4 + 4 + 12 tokens: 12 steps when the long one begins at once, 16 when it comes last; prompts take a step each."""
    sizes = [4, 4, 12]
    with LLM(dummy_folder, load_format="dummy", max_model_len=64, max_num_seqs=2, kv_cache_memory=0.02) as llm:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in sizes]
        outputs = llm.generate(["one", "two", "three"], params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == sizes
        assert [o.prompt for o in outputs] == ["one", "two", "three"]
        assert llm.stats()["steps"] == 12


def test_several_answers(dummy):
    params = SamplingParams(n=3, temperature=1, max_tokens=8, ignore_eos=True, seed=3)
    out = dummy.generate("Once", params)[0]
    assert [a.index for a in out.outputs] == [0, 1, 2]
    assert len({tuple(a.token_ids) for a in out.outputs}) == 3
    assert dummy.generate("Once", params)[0].outputs == out.outputs


def test_chat_alone_in_a_batch_and_from_parts(llm):
    one = llm.chat(CHAT, GREEDY)[0]
    two = llm.chat([CHAT, [{"role": "user", "content": "Say hello."}]], GREEDY)
    parts = llm.chat([{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}], GREEDY)[0]
    assert len(two) == 2
    assert one.outputs[0].text == two[0].outputs[0].text == parts.outputs[0].text
    assert "Paris" in one.outputs[0].text
    assert one.prompt_token_ids == llm.get_tokenizer().encode(one.prompt, add_special_tokens=False)


def test_chat_with_tools_and_a_template(dummy):
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return city

    template = "{{ tools[0].function.name }}|{{ messages[0].content }}|{{ mood }}"
    out = dummy.chat(CHAT, GREEDY, tools=[weather], chat_template=template, chat_template_kwargs={"mood": "fine"})[0]
    assert out.prompt == "weather|What is the capital of France?|fine"


def test_stream_is_generate_in_pieces(llm):
    for prompt in ("你好，帮我介绍一下大语言模型", "Repeat: 👨‍👩‍👧‍👦 🏳️‍🌈 👨‍👩‍👧‍👦 🏳️‍🌈 👨‍👩‍👧‍👦 🏳️‍🌈 👨‍👩‍👧‍👦"):
        params = SamplingParams(temperature=0.7, seed=11, max_tokens=40, logprobs=1)
        whole = llm.generate(prompt, params)[0].outputs[0]
        chunks = list(llm.stream(prompt, params))
        assert "".join(map(str, chunks)) == whole.text
        assert [t for c in chunks for t in c.token_ids] == whole.token_ids
        streamed = [entry for c in chunks for entry in c.logprobs]
        assert [list(e) for e in streamed] == [list(e) for e in whole.logprobs]
        assert [p.logprob for e in streamed for p in e.values()] == pytest.approx(
            [p.logprob for e in whole.logprobs for p in e.values()], abs=1e-3
        )  # the second call finds its prompt cached, and computes in other shapes
        assert all("\ufffd" not in c.text for c in chunks[:-1])
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == whole.finish_reason
        assert chunks[-1].output().outputs[0].text == whole.text


def test_emoji_and_chinese_come_whole_token_by_token(llm):
    """The model is made to say them: each token alone is half a character."""
    text = "👨‍👩‍👧‍👦大语言模型🏳️‍🌈"
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    params = SamplingParams(temperature=0, max_tokens=200, structured_outputs=StructuredOutputs(choice=[text]))
    pieces = [c.text for c in llm.stream("Say it:", params)]
    assert "".join(pieces) == text
    assert len([p for p in pieces if p]) > 5
    assert "\ufffd" not in "".join(pieces)


def test_streams_interleave(dummy):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    pairs = list(zip(dummy.stream("one", params), dummy.stream("two", params), strict=True))
    assert len(pairs) == 9
    assert "".join(a.text for a, _ in pairs) == dummy.generate("one", params)[0].outputs[0].text


def test_a_stream_that_nobody_reads_never_runs(dummy):
    stream = dummy.stream("Hello", GREEDY)
    assert dummy.stats()["waiting"] == 0
    del stream


def test_stream_of_several_answers(dummy):
    params = SamplingParams(n=2, seed=5, max_tokens=6, ignore_eos=True)
    texts = ["", ""]
    for chunk in dummy.stream("Once", params):
        texts[chunk.index] += chunk.text
    assert texts == [a.text for a in dummy.generate("Once", params)[0].outputs]


def test_step_through_shows_every_step(dummy):
    views = list(dummy.step_through(["one two three", "four"], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)))
    assert [s.phase for s in views[0].sequences] == ["prefill", "prefill"]
    assert all(s.phase == "decode" for v in views[1:] for s in v.sequences)
    assert [s.finish_reason for s in views[-1].sequences] == ["length", "length"]
    assert sum(s.token is not None for v in views for s in v.sequences) == 6
    assert str(views[0]).startswith(f"step {views[0].step}: ")
    assert "<table>" in views[0]._repr_html_()


def test_what_can_be_looked_at(llm):
    assert str(llm.memory_plan()).startswith("memory on cpu")
    report = llm.startup_report()
    assert abs(sum(report.stages.values()) - report.total) < 1e-9
    assert {"find the model", "tokenizer", "weights", "KV cache"} <= set(report.stages)
    assert llm.get_default_sampling_params() == SamplingParams()
    assert llm.config.max_model_len == 512
    llm.reset_prefix_cache()
    assert llm.stats()["kv_blocks_cached"] == 0


# ---- what ends an answer


def test_a_stop_string_across_tokens(llm):
    whole = llm.generate("Count: 1, 2, 3, 4,", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text
    stop = whole[4:8]
    out = llm.generate("Count: 1, 2, 3, 4,", SamplingParams(temperature=0, max_tokens=20, stop=["@@", stop]))[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == (whole[: whole.index(stop)], "stop", stop)
    kept = SamplingParams(temperature=0, max_tokens=20, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("Count: 1, 2, 3, 4,", kept)[0].outputs[0].text == whole[: whole.index(stop) + len(stop)]
    pieces = [c.text for c in llm.stream("Count: 1, 2, 3, 4,", kept)]
    assert "".join(pieces) == whole[: whole.index(stop) + len(stop)]


def test_a_stop_token(dummy):
    tokens = dummy.generate("Hello", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].outputs[0].token_ids
    last = tokens[3]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[last])
    out = dummy.generate("Hello", params)[0].outputs[0]
    assert out.token_ids == tokens[: tokens.index(last) + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", last)
    assert out.text == dummy.get_tokenizer().decode(out.token_ids[:-1])


def test_eos_ends_an_answer_unless_ignored(llm):
    eos = llm.get_tokenizer().eos_token_id
    bias = {eos: 100.0}
    out = llm.generate("Hi", SamplingParams(temperature=0, max_tokens=5, logit_bias=bias))[0].outputs[0]
    assert (out.token_ids, out.text, out.finish_reason, out.stop_reason) == ([eos], "", "stop", None)
    out = llm.generate("Hi", SamplingParams(temperature=0, max_tokens=5, logit_bias=bias, ignore_eos=True))[0].outputs[0]
    assert (out.token_ids, out.finish_reason) == ([eos] * 5, "length")
    out = llm.generate("Hi", SamplingParams(temperature=0, max_tokens=5, logit_bias=bias, min_tokens=2))[0].outputs[0]
    assert len(out.token_ids) == 3
    assert eos not in out.token_ids[:2]


def test_no_max_tokens_means_to_the_end_of_the_context(dummy):
    out = dummy.generate("Hello there", SamplingParams(temperature=0, ignore_eos=True))[0]
    assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == 256
    assert out.outputs[0].finish_reason == "length"
    longest = dummy.generate([[5] * 255], SamplingParams(temperature=0, ignore_eos=True))[0]
    assert len(longest.outputs[0].token_ids) == 1


def test_logprobs_name_their_tokens(llm):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2)
    out = llm.generate("The capital of France is", params)[0]
    answer = out.outputs[0]
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, entry in zip(answer.token_ids, answer.logprobs):
        assert len(entry) == 3
        assert entry[token].rank == 1
        assert entry[token].logprob == max(e.logprob for e in entry.values())
        assert entry[token].decoded_token == llm.get_tokenizer().token_text(token)
    assert math.isclose(answer.cumulative_logprob, sum(e[t].logprob for t, e in zip(answer.token_ids, answer.logprobs)))
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
    assert all(t in e for t, e in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:]))


def test_the_seed_repeats_whatever_else_runs(llm):
    params = SamplingParams(temperature=1, seed=7, max_tokens=10)
    alone = llm.generate("Once upon", params)[0].outputs[0].token_ids
    crowd = llm.generate(["Once upon", *["x"] * 6], [params, *[SamplingParams(max_tokens=12)] * 6])
    assert crowd[0].outputs[0].token_ids == alone


def test_the_same_script_gives_the_same_answers(dummy_folder):
    def script():
        with LLM(dummy_folder, load_format="dummy", max_model_len=64, seed=4, kv_cache_memory=0.01) as llm:
            return [o.outputs[0].token_ids for o in llm.generate(["a", "b"], SamplingParams(max_tokens=6))]

    first = script()
    assert first == script()


# ---- structured output

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "minimum": 1, "maximum": 99999999},
                   "tags": {"type": "array", "items": {"enum": ["big", "old"]}, "maxItems": 2}},
    "required": ["city", "people", "tags"],
    "additionalProperties": False,
}  # fmt: skip


def test_json_always_validates(llm):
    params = SamplingParams(temperature=1, seed=1, n=3, max_tokens=400, structured_outputs=StructuredOutputs(json=SCHEMA))
    for answer in llm.chat([{"role": "user", "content": "Describe Paris as JSON."}], params)[0].outputs:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({"regex": r"\d{3}-[a-c]{2}"}, r"\d{3}-[a-c]{2}"),
        ({"choice": ["red", "green", "蓝"]}, "red|green|蓝"),
        ({"grammar": 'start: "yes" | "no" ("!" | "?")'}, r"yes|no[!?]"),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_other_languages(llm, spec, allowed):
    import re

    params = SamplingParams(temperature=1, max_tokens=30, structured_outputs=StructuredOutputs(**spec))
    for out in llm.generate(["Well,"] * 3, params):
        assert re.fullmatch(allowed, out.outputs[0].text)


# ---- mistakes


@pytest.mark.parametrize(
    ("prompts", "say"),
    [("", "empty"), ([], "empty"), ([[]], "empty"), (["ok", ""], "empty"), ("word " * 300, "tokens"), ([[0] * 256], "tokens"),
     ([[49152]], "outside the vocabulary"), ([[-1]], "outside the vocabulary"), (None, "NoneType"), (5, "int"),
     ([None], "NoneType"),
     ([[1, "a"]], "list"), ([1.5], "float"), (b"bytes", "bytes"), ({"text": "x"}, "it has: prompt"), ({"prompt": 5}, "prompt"),
     ({"prompt": None}, "prompt"), ([{"prompt_token_ids": "text"}], "prompt_token_ids"),
     ([{"prompt_token_ids": [1, None]}], "list"),
     ({"prompt": "x", "multi_modal_data": {"image": 1}}, "text models"), ("\ud800", "surrogate"), ([[True, False]], "list"),
     (np.array([[1, 2]]), "tolist"), ({"prompt": ["a", "b"]}, "prompt")],
    ids=lambda v: str(v)[:24],
)  # fmt: skip
def test_a_prompt_that_cannot_run(dummy, prompts, say):
    with pytest.raises((InvalidRequestError, UnknownOptionError)) as error:
        dummy.generate(prompts, GREEDY)
    assert say in str(error.value)


def test_one_bad_prompt_leaves_nothing_queued(dummy):
    before = dummy.stats()["steps"]
    for bad in (["good", "good", ""], ["good", None], ["good", [10**6]]):
        with pytest.raises(InvalidRequestError):
            dummy.generate(bad, GREEDY)
    assert dummy.stats()["waiting"] == 0
    dummy.generate("good", SamplingParams(max_tokens=1))
    assert dummy.stats()["steps"] == before + 1


@pytest.mark.parametrize(
    ("params", "say"),
    [
        (SamplingParams(logprobs=21), "max_logprobs=21"),
        (SamplingParams(prompt_logprobs=-1), "max_logprobs=-1"),
        (SamplingParams(structured_outputs=StructuredOutputs(regex="(")), "regex"),
        (SamplingParams(structured_outputs=StructuredOutputs(grammar="start: nothing")), "grammar"),
        (SamplingParams(structured_outputs=StructuredOutputs(json={"type": "nothing"})), "json"),
        (SamplingParams(structured_outputs=StructuredOutputs(json="[]")), "json"),
        (SamplingParams(allowed_token_ids=[49152]), "allowed_token_ids"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        ([SamplingParams()] * 3, "2 prompts but 3"),
        ({"temperature": 1}, "SamplingParams"),
        ("greedy", "SamplingParams"),
        ([SamplingParams(), None], "SamplingParams"),
    ],
    ids=lambda v: str(v)[:24] if isinstance(v, str) else "",
)
def test_parameters_that_this_model_cannot_follow(dummy, params, say):
    with pytest.raises(InvalidRequestError) as error:
        dummy.generate(["a", "b"], params)
    assert say in str(error.value)


def test_stop_ids_beyond_the_vocabulary_do_no_harm(dummy):
    """The tutorial's script brings GLM-4's to any model."""
    assert dummy.generate("a", SamplingParams(max_tokens=1, stop_token_ids=[151329]))[0].finished


@pytest.mark.parametrize(
    "messages",
    [[], "Hello", [[]], [{"content": "x"}], [{"role": "user"}], [{"role": "king", "content": "x"}],
     [{"role": "user", "content": 5}], [5], None, [CHAT, "Hello"]],
    ids=str,
)  # fmt: skip
def test_messages_of_the_wrong_shape(dummy, messages):
    with pytest.raises(InvalidRequestError) as error:
        dummy.chat(messages, GREEDY)
    assert "messages" in str(error.value)


def test_arguments_that_only_vllm_has(dummy):
    for call in (dummy.generate, dummy.chat):
        with pytest.raises(UnknownOptionError, match="merge the adapter"):
            call("x", lora_request="adapter")
        with pytest.raises(UnknownOptionError, match="did you mean 'sampling_params'"):
            call("x", sampling_parms=GREEDY)
    with pytest.raises(InvalidRequestError, match="not both"):
        dummy.generate("a", prompt_token_ids=[1])
    with pytest.raises(InvalidRequestError, match="one prompt"):
        dummy.stream(["a", "b"])
    with pytest.raises(InvalidRequestError, match="go with messages"):
        dummy.stream("a", tools=[])
    with pytest.raises(InvalidRequestError, match="priority"):
        dummy.generate(["a", "b"], priority=[1])


# ---- models that cannot be loaded


def changed(folder, target, **config):
    """A copy of a model folder with other values in config.json."""
    shutil.copytree(folder, target)
    own = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(own | config))
    return target


def test_folders_that_are_no_model(dummy_folder, smollm2_folder, tmp_path):
    empty, broken = tmp_path / "empty", changed(dummy_folder, tmp_path / "broken")
    empty.mkdir()
    (broken / "config.json").write_text("{")
    cut = changed(smollm2_folder, tmp_path / "cut")
    weights = cut / "model.safetensors"
    with weights.open("r+b") as f:
        f.truncate(weights.stat().st_size // 2)
    no_words = changed(dummy_folder, tmp_path / "no_words")
    (no_words / "tokenizer.json").unlink()
    bert = changed(dummy_folder, tmp_path / "bert", architectures=["BertModel"])
    cases = [
        (tmp_path / "nowhere", {}, ModelNotFoundError, "nowhere"),
        (empty, {}, ModelNotFoundError, "config.json"),
        (broken, {"load_format": "dummy"}, LlmkitError, "config.json"),
        (cut, {}, WeightsError, "model.safetensors"),
        (bert, {"load_format": "dummy"}, UnsupportedModelError, "BertM"),
        (dummy_folder, {"load_format": "dummy", "max_model_len": 10**6}, ConfigError, "max_model_len"),
        (dummy_folder, {}, WeightsError, "safetensors"),
        (no_words, {"load_format": "dummy"}, TokenizerError, "tokenizer"),
        (dummy_folder, {"load_format": "dummy", "max_modellen": 5}, UnknownOptionError, "max_model_len"),
        (dummy_folder, {"load_format": "dummy", "tokenizer": tmp_path / "nowhere"}, ModelNotFoundError, "nowhere"),
    ]
    for folder, options, kind, say in cases:
        with pytest.raises(kind) as error:
            LLM(folder, **options)
        assert say in str(error.value)
        assert "->" in str(error.value), f"no way out is named: {error.value}"


def test_the_tokenizer_may_come_from_elsewhere(dummy_folder, tmp_path):
    bare, words = changed(dummy_folder, tmp_path / "bare"), tmp_path / "words"
    (bare / "tokenizer.json").unlink()
    words.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dummy_folder / name, words / name)
    with LLM(bare, tokenizer=words, load_format="dummy", max_model_len=64, kv_cache_memory=0.01) as llm:
        assert llm.get_tokenizer().encode("Hello")


# ---- closing, and what it costs


def test_closed_is_closed(dummy_folder):
    llm = LLM(dummy_folder, load_format="dummy", max_model_len=64, kv_cache_memory=0.01)
    stream = llm.stream("a", SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    assert repr(llm) == "LLM(closed)"
    late = [llm.stats, lambda: llm.generate("a"), lambda: llm.chat(CHAT), lambda: llm.stream("a"), lambda: llm.step_through("a"),
            lambda: list(stream), lambda: llm.config, llm.memory_plan, llm.startup_report, llm.get_tokenizer]  # fmt: skip
    for call in late:
        with pytest.raises(EngineClosedError, match="LLM"):
            call()


def test_a_long_list_costs_little_per_prompt(dummy):
    begin = time.perf_counter()
    out = dummy.generate(["x"] * 400, SamplingParams(temperature=0, max_tokens=1), use_tqdm=True)
    assert len(out) == 400
    assert time.perf_counter() - begin < 20
    assert not dummy._driver._jobs
