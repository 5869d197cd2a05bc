"""A device that has no memory for some steps: the same tokens come out, later; only when nothing fits is there an error."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.engine.request import Request
from llmkit.engine.shortage import NOTE, is_shortage
from llmkit.errors import OutOfMemoryError

SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5 + i] * n for i, n in enumerate((3, 40, 1, 17, 90, 8))]
EACH = [
    SHORT,
    SHORT.clone(temperature=0.9, seed=7, n=2),
    SHORT.clone(prompt_logprobs=1),
    SHORT.clone(logprobs=2, repetition_penalty=1.3),
    SHORT.clone(temperature=0.7, seed=1, top_p=0.9, frequency_penalty=0.5),
    SHORT.clone(min_tokens=2, logit_bias={9: 1.0}),
]


@pytest.fixture(params=[True, False], ids=["caching", "no caching"])
def llm(dummy_folder, request):
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": 128, "kv_cache_memory": 0.02, "dtype": "float32"}
    with LLM(dummy_folder, enable_prefix_caching=request.param, **options) as llm:
        yield llm


def said(llm: LLM) -> list[Any]:
    llm.reset_prefix_cache()
    return [
        [(a.token_ids, a.text, a.finish_reason, a.logprobs and [sorted(p) for p in a.logprobs]) for a in o.outputs]
        + [o.prompt_logprobs and len(o.prompt_logprobs)]
        for o in llm.generate(PROMPTS, EACH, use_tqdm=False)
    ]


def failing(llm: LLM, monkeypatch: pytest.MonkeyPatch, fails: Any, late: bool = False) -> list[int]:
    """Let steps fail: fails(tokens) says which; late: after all was computed. Returns the sizes of the steps that failed."""
    runner, sizes = llm._engine.runner, []
    run = runner.run

    def step(batch: Any, schedule: Any) -> Any:
        bad = fails(batch.num_tokens)
        if late or not bad:
            result = run(batch, schedule)
        if bad:
            sizes.append(batch.num_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(runner, "run", step)
    return sizes


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after computing"])
@pytest.mark.parametrize("most", [1, 5, 60])
def test_steps_shrink_until_they_fit(llm, monkeypatch, most, late):
    expected = said(llm)
    sizes = failing(llm, monkeypatch, lambda tokens: tokens > most, late)
    assert said(llm) == expected
    assert min(sizes) > most
    assert llm.stats()["kv_blocks_free"] == llm.stats()["kv_blocks_total"]
    assert llm.memory_plan().notes.count(NOTE) == 1


def test_now_and_then(llm, monkeypatch):
    expected = said(llm)
    r = random.Random(0)
    sizes = failing(llm, monkeypatch, lambda tokens: tokens > 1 and r.random() < 0.5, late=True)
    assert said(llm) == expected
    assert len(sizes) > 3


def test_steps_grow_again(llm, monkeypatch):
    full = llm._engine.scheduler.token_budget
    sizes = failing(llm, monkeypatch, lambda tokens: tokens > 60 and not sizes)
    said(llm)
    shrunk = llm._engine.scheduler.token_budget
    assert shrunk < full
    llm.generate([[7] * 4] * 8, SHORT.clone(max_tokens=100), use_tqdm=False)
    assert shrunk < llm._engine.scheduler.token_budget < full
    for _ in range(2000):
        llm._engine.scheduler.computed(_no_rows())
    assert llm._engine.scheduler.token_budget == full


def _no_rows() -> Any:
    from llmkit.engine.scheduler import Schedule

    return Schedule(np.empty(0, np.int64), np.empty(0, np.int32))


def test_what_counts_as_a_shortage():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_shortage(caught.value)
    for said in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert is_shortage(RuntimeError(said))
    for said in ("CUDA error: an illegal memory access was encountered", "mat1 and mat2 shapes cannot be multiplied"):
        assert not is_shortage(RuntimeError(said))


def test_a_mean_counts_each_chunk_once(dummy_folder, monkeypatch):
    """The step that computes one has no room for the logits of another request."""
    options: dict[str, Any] = {"load_format": "dummy", "max_model_len": 128, "kv_cache_memory": 0.02, "dtype": "float32"}
    prompt = np.arange(100, dtype=np.int32) % 50 + 5
    embedding = lambda: Request("vector", prompt, SamplingParams(), max_total=100, pooling="mean")
    with LLM(dummy_folder, max_num_batched_tokens=16, max_num_seqs=4, **options) as llm:
        engine, alone, beside = llm._engine, embedding(), embedding()
        engine.add(alone)
        while not alone.finished:
            engine.step()
        logits, failed = type(engine.runner.passes).logits, []

        def short(self, hidden, *out):
            if len(failed) < 2 and engine.rows.num_computed[beside.row] > 20:
                failed.append(len(hidden))
                raise RuntimeError("Triton Error [CUDA]: out of memory")
            return logits(self, hidden, *out)

        monkeypatch.setattr(type(engine.runner.passes), "logits", short)
        engine.add(Request("answer", prompt[:3], SHORT, max_total=40))
        engine.add(beside)
        while engine.has_work:
            engine.step()
        assert len(failed) == 2
        np.testing.assert_allclose(beside.embedding, alone.embedding, atol=1e-5)


def test_when_not_one_token_fits_it_is_said_and_the_next_call_works(llm, monkeypatch):
    expected = said(llm)
    with monkeypatch.context() as patch:
        sizes = failing(llm, patch, lambda tokens: True)
        with pytest.raises(OutOfMemoryError, match="not even one token fits the device's memory\nmemory on cpu"):
            llm.generate(PROMPTS, SHORT, use_tqdm=False)
        assert sizes[-2:] == [1, 1]
    llm._engine.plan.notes.clear()
    assert said(llm) == expected


def test_a_single_shortage_at_one_token_is_no_error(llm, monkeypatch):
    expected = llm.generate([[5]], SHORT, use_tqdm=False)[0].outputs[0].token_ids
    sizes = failing(llm, monkeypatch, lambda tokens: len(sizes) < 1)
    assert llm.generate([[5]], SHORT, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert sizes == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGPU:
    @pytest.fixture
    def llm(self, tmp_path):
        import json

        config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
                  "num_key_value_heads": 2, "intermediate_size": 1408, "vocab_size": 50000, "max_position_embeddings": 4096,
                  "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        with LLM(tmp_path, load_format="dummy", skip_tokenizer_init=True, kv_cache_memory=1, max_model_len=4096) as llm:
            yield llm

    def test_steps_launched_ahead_fail_too(self, llm, monkeypatch):
        """Graphs and device rows are made anew; the tokens of the step that was under way are not lost."""
        greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, greedy, use_tqdm=False)]
        r = random.Random(0)
        sizes = failing(llm, monkeypatch, lambda tokens: tokens > 1 and r.random() < 0.2)
        got = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, greedy, use_tqdm=False)]
        assert len(sizes) > 3
        assert [len(g) for g in got] == [40] * len(PROMPTS)
        same = sum(a == b for x, y in zip(expected, got) for a, b in zip(x, y))
        assert same >= 0.75 * 40 * len(PROMPTS)  # what is computed again is computed in other shapes, and rounded otherwise

    def test_memory_that_is_really_gone(self, llm):
        """Somebody takes all but a little: prompts of thousands of tokens still end."""
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        prompts = [[i + 1] * 3000 for i in range(16)]
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        taken = torch.empty(free - 150 * 2**20, dtype=torch.uint8, device="cuda")
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [8] * 16
        del taken

    def test_two_engines_side_by_side(self, llm, tmp_path):
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        first = llm.generate(PROMPTS, greedy, use_tqdm=False)
        options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 4096}
        with LLM(tmp_path, gpu_memory_utilization=0.4, **options) as a, LLM(tmp_path, gpu_memory_utilization=0.4, **options) as b:
            plans = [x.memory_plan() for x in (a, b)]
            for plan in plans:
                assert plan.weights + plan.activations + plan.kv_cache <= 0.4 * plan.total
            for x in (a, b):
                got = x.generate(PROMPTS, greedy, use_tqdm=False)
                assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in first]
