"""From options to an engine: with and without a tokenizer, stages beside each other, errors that leave nothing."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest

from llmkit import LLM, SamplingParams
from llmkit.engine import start
from llmkit.errors import InvalidRequestError, TokenizerError, WeightsError

FIVE = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
SMALL = {"load_format": "dummy", "max_model_len": 128, "kv_cache_memory": 0.01}


@pytest.fixture
def ids_only(dummy_folder, tmp_path):
    """A model folder without a tokenizer."""
    shutil.copy(dummy_folder / "config.json", tmp_path)
    return tmp_path


def test_without_a_tokenizer_ids_go_in_and_ids_come_out(dummy_folder, ids_only):
    with LLM(dummy_folder, **SMALL) as llm:
        expected = llm.generate([[5, 6, 7]], FIVE, use_tqdm=False)[0].outputs[0].token_ids
    with LLM(ids_only, skip_tokenizer_init=True, **SMALL) as llm:
        answer = llm.generate([[5, 6, 7]], FIVE.clone(logprobs=1), use_tqdm=False)[0].outputs[0]
        assert (answer.token_ids, answer.text) == (expected, "")
        assert list(llm.stream([5, 6, 7], FIVE))[-1].output().outputs[0].token_ids == expected
        assert next(iter(llm.step_through([[5, 6, 7]], FIVE)))


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ("Hello", FIVE, "without a tokenizer"),
        ([5], FIVE.clone(stop=["x"]), "stop strings"),
        ([5], FIVE.clone(bad_words=["x"]), "without a tokenizer"),
    ],
)
def test_what_needs_a_tokenizer_is_refused(ids_only, prompt, params, says):
    with LLM(ids_only, skip_tokenizer_init=True, **SMALL) as llm, pytest.raises(InvalidRequestError, match=says):
        llm.generate([prompt], params, use_tqdm=False)


def test_a_folder_without_a_tokenizer_says_so(ids_only, new_threads):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        LLM(ids_only, **SMALL)
    assert new_threads() == []


def test_the_tokenizer_is_read_beside_the_weights(dummy_folder, monkeypatch):
    """The stages sum up to the time on the clock, and the tokenizer's is only what was left to wait for."""
    meet = threading.Barrier(2, timeout=20)
    read, load = start._read_tokenizer, start._load
    monkeypatch.setattr(start, "_read_tokenizer", lambda *a: (meet.wait(), read(*a))[1])
    monkeypatch.setattr(start, "_load", lambda *a: (meet.wait(), load(*a))[1])
    begin = time.perf_counter()
    with LLM(dummy_folder, **SMALL) as llm:
        wall, report = time.perf_counter() - begin, llm.startup_report()
    stages = {n: s for n, s in report.stages.items() if n != "import"}
    assert list(stages) == ["find the model", "device", "weights", "tokenizer", "KV cache"]
    assert 0.5 * wall < sum(stages.values()) <= wall
    assert "beside" in report.facts["tokenizer"]


def test_broken_weights_end_the_thread_too(dummy_folder, tmp_path, new_threads):
    for file in dummy_folder.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(WeightsError, match="truncated"):
        LLM(tmp_path)
    assert new_threads() == []
