"""`kv_cache_dtype="fp8"`: the engine says what transformers says when its attention sees keys and values rounded to float8.

Rounding is a cliff: a key that differs in its last bit of float32 may fall on its other side. So answers count where no two
tokens are nearly as likely, and log-probabilities are compared less narrowly than without it.
"""

from __future__ import annotations

import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.errors import ConfigError

FLOAT8 = torch.float8_e4m3fn
NEW, NEAR = 16, 0.01
LENGTHS = (1, 2, 17, 33, 64, 90)


def rounding(module, query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, *(x.to(FLOAT8).to(x.dtype) for x in (key, value)), *args, **kwargs)


@pytest.fixture(scope="module")
def oracle(tiny):
    """(folder, prompts, transformers' model with such attention)."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    folder, _ = tiny("qwen3")
    AttentionInterface.register("rounding", rounding)
    AttentionMaskInterface.register("rounding", sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="rounding")
    random = torch.Generator().manual_seed(11)
    return folder, [torch.randint(3, model.config.vocab_size, (n,), generator=random).tolist() for n in LENGTHS], model


@torch.inference_mode()
def logprobs(model, ids: list[int]) -> torch.Tensor:
    """[tokens, vocab] float32 of what follows each."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


OPTIONS = {
    "plenty": {},
    "chunks": {"long_prefill_token_threshold": 7, "max_num_batched_tokens": 24, "max_num_seqs": 8, "block_size": 5},
    "preempted": {"block_size": 4, "num_kv_blocks": 34, "max_model_len": 120, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("pool", OPTIONS)
def test_it_says_what_transformers_says_of_rounded_keys_and_values(pool, oracle, smollm2_folder):
    folder, prompts, model = oracle
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
    options = {"max_model_len": 200, "dtype": "float32", "kv_cache_dtype": "fp8"} | OPTIONS[pool]
    with LLM(folder, tokenizer=smollm2_folder, **options) as llm:
        assert llm._engine.runner.kv_cache.dtype == FLOAT8
        outputs = llm.generate(prompts, params, use_tqdm=False)
        outputs += llm.generate(prompts, params, use_tqdm=False)  # prompts are cached now, where they are kept at all
        stats = llm.stats()
    assert (stats["preemptions"] > 0) == (pool == "preempted")
    assert (stats["prefix_cache_hits"] > 0) == (pool != "preempted")
    agreed = 0
    for output, prompt in zip(outputs, prompts * 2):
        answer = output.outputs[0]
        rows = logprobs(model, prompt + answer.token_ids)[len(prompt) - 1 : -1]
        for token, row, said in zip(answer.token_ids, rows, answer.logprobs):
            assert said[token].logprob == pytest.approx(float(row[token]), abs=NEAR)
            best = row.topk(2)
            if best.values[0] - best.values[1] > 2 * NEAR:
                assert token == int(best.indices[0])
                agreed += 1
    assert agreed > NEW * len(outputs) / 2, "too few clear tokens show nothing"


def test_it_matters_and_a_block_is_half_as_large(oracle, smollm2_folder):
    folder, prompts, _ = oracle
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = {}
    for name in ("auto", "fp8"):
        with LLM(folder, tokenizer=smollm2_folder, max_model_len=200, dtype="bfloat16", kv_cache_dtype=name) as llm:
            found[name] = llm.generate([prompts[-1]], params, use_tqdm=False)[0].prompt_logprobs, llm.memory_plan()
            assert ("float8" in llm.startup_report().facts["attention"]) == (name == "fp8")
            assert llm.memory_plan().kv_cache == llm._engine.runner.kv_cache.nbytes
    plain, rounded = ([entry[t].logprob for entry, t in zip(found[name][0][1:], prompts[-1][1:])] for name in ("auto", "fp8"))
    assert max(abs(a - b) for a, b in zip(plain, rounded)) > 1e-3
    assert found["fp8"][1].block_bytes * 2 == found["auto"][1].block_bytes
    assert found["fp8"][1].kv_tokens >= found["auto"][1].kv_tokens


@pytest.mark.parametrize(("spelled", "means"), [("auto", "auto"), (None, "auto"), ("fp8", "fp8"), ("fp8_e4m3", "fp8")])
def test_vllms_spellings(spelled, means):
    from llmkit.config import EngineConfig

    assert EngineConfig.from_options(kv_cache_dtype=spelled).kv_cache_dtype == means


def test_what_there_is_not_is_refused_by_name():
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, fp8; got 'fp8_e5m2'"):
        LLM(kv_cache_dtype="fp8_e5m2")
