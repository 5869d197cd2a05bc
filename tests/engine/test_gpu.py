"""The GPU runner against itself by other roads, and against plain torch in float32. Needs a CUDA device; random weights."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.engine.engine import Engine, Flight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LENGTHS = [5, 17, 130, 300, 64, 1, 700]
NEW = 40
QWENS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "seed": 3}  # by its own generation_config


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def folder(request, tmp_path_factory) -> Path:
    """A small model with heads of 64 and biases (Qwen2) or q/k norms (Qwen3), and a tokenizer that is never asked."""
    from tokenizers import Tokenizer, models

    place = tmp_path_factory.mktemp(request.param)
    name = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[request.param]
    config = {
        "architectures": [name], "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "intermediate_size": 1408, "vocab_size": 5000, "max_position_embeddings": 4096, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(5000)}, unk_token="w0")).save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return place


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5000, (n,), generator=generator).tolist() for n in LENGTHS]


def engine(folder: Path, **options) -> LLM:
    return LLM(folder, load_format="dummy", gpu_memory_utilization=0.3, **{"max_model_len": 1024} | options)


def tokens(llm: LLM, prompts: list[list[int]], **params) -> list[list[int]]:
    chosen = SamplingParams(**{"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False} | params)
    return [o.outputs[0].token_ids for o in llm.generate(prompts, chosen, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(folder, prompts) -> list[list[int]]:
    """What graphs with the next step launched ahead say."""
    with engine(folder) as llm:
        answers = tokens(llm, prompts)
        assert type(llm._driver._started.engine.runner).__name__ == "CudaRunner"  # type: ignore[union-attr]
    return answers


def agreement(answers: list[list[int]], expected: list[list[int]]) -> float:
    """Share of equal tokens. Roads that multiply in other shapes round differently in bfloat16; where two tokens are nearly
    tied the other may win, and the rest of that answer differs with it."""
    return sum(a == b for x, y in zip(answers, expected) for a, b in zip(x, y)) / (NEW * len(expected))


def bits(llm: LLM, prompts: list[list[int]], together: bool) -> list[tuple[list[int], list[float]]]:
    """Each prompt's greedy tokens with their logprobs, in one call or one by one."""
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=0)
    calls = [prompts] if together else [[p] for p in prompts]
    outputs = [o.outputs[0] for call in calls for o in llm.generate(call, params, use_tqdm=False)]
    return [(list(o.token_ids), [at[t].logprob for t, at in zip(o.token_ids, o.logprobs)]) for o in outputs]


def test_deterministic_gives_the_same_bits_whatever_the_batch(folder, prompts):
    """Alone, among 128, in chunks, from the prefix cache, eagerly: tokens and logprobs are equal, not nearly so."""
    generator = torch.Generator().manual_seed(1)
    others = [torch.randint(5000, (1 + 7 * i % 230,), generator=generator).tolist() for i in range(121)]
    with engine(folder, deterministic=True, enable_prefix_caching=False) as llm:
        alone, crowd = bits(llm, prompts, together=False), bits(llm, prompts + others, together=True)
    assert crowd[: len(prompts)] == alone
    with engine(folder, deterministic=True) as llm:
        assert bits(llm, prompts, together=False) == alone
        assert llm.stats()["prefix_cache_hits"] == 0
        assert bits(llm, prompts[::-1], together=True)[::-1] == alone
        assert llm.stats()["prefix_cache_hits"] > 0
    for options in ({"max_num_batched_tokens": 136, "max_num_seqs": 128}, {"enforce_eager": True}, {"block_size": 16}):
        with engine(folder, deterministic=True, **options) as llm:
            assert bits(llm, prompts + others, together=True) == crowd, options


def test_deterministic_nearly_agrees_with_the_quicker_road(folder, prompts, expected):
    with engine(folder, deterministic=True) as llm:
        assert agreement(tokens(llm, prompts), expected) >= 0.75


def test_the_largest_step_stays_within_its_plan(folder):
    """What a step of as many tokens as are allowed takes while it runs, by torch's own count."""
    prompts = [[7 + i] * 1000 for i in range(8)]
    with engine(folder, enable_prefix_caching=False) as llm:
        tokens(llm, prompts, max_tokens=1)  # kernels are compiled, libraries take their workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        tokens(llm, prompts, max_tokens=1)
        assert 0 < torch.cuda.max_memory_allocated() - before <= llm.memory_plan().activations


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"enable_prefix_caching": False}], ids=["eager", "no caching"])
def test_the_same_kernels_say_the_same(folder, prompts, expected, options):
    with engine(folder, **options) as llm:
        assert tokens(llm, prompts) == expected


@pytest.mark.parametrize("options", [{"long_prefill_token_threshold": 48}, {"num_kv_blocks": 24}], ids=["chunks", "preempted"])
def test_other_shapes_nearly_agree(folder, prompts, expected, options):
    with engine(folder, **options) as llm:
        answers = tokens(llm, prompts)
        assert agreement(answers, expected) >= 0.75
        assert [a[0] for a in answers] == [e[0] for e in expected]
        assert ("num_kv_blocks" in options) == (llm.stats()["preemptions"] > 0)
        assert llm.stats()["kv_blocks_free"] == llm.stats()["kv_blocks_total"]


needs_float8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no float8"
)


@needs_float8
def test_float8_keys_replayed_eager_and_by_plain_torch(folder, prompts):
    with engine(folder, kv_cache_dtype="fp8") as llm:
        answers = tokens(llm, prompts)
        assert tokens(llm, prompts) == answers, "prompts from the cache"
        assert llm._engine.runner.kv_cache.dtype == torch.float8_e4m3fn
    for options in ({"enforce_eager": True}, {"num_kv_blocks": 24}):
        with engine(folder, kv_cache_dtype="fp8", **options) as llm:
            assert agreement(tokens(llm, prompts), answers) >= (0.4 if "num_kv_blocks" in options else 1)
    with engine(folder, kv_cache_dtype="fp8", attention_backend="torch") as llm:  # a key may be rounded to the other side there
        assert agreement(tokens(llm, prompts), answers) >= 0.4


@needs_float8
def test_float8_keys_deterministic(folder, prompts):
    with engine(folder, deterministic=True, kv_cache_dtype="fp8") as llm:
        alone = bits(llm, prompts, together=False)
        llm.reset_prefix_cache()
        assert bits(llm, prompts, together=True) == alone
    with engine(folder, deterministic=True, kv_cache_dtype="fp8", max_num_batched_tokens=136, max_num_seqs=128) as llm:
        assert bits(llm, prompts, together=True) == alone


def test_a_last_chunk_of_one_token_alone_in_its_step(folder, prompts):
    """It takes the way of those that decode, on rows that others have used."""
    ragged = [p[: 1 + 16 * (len(p) // 16)] for p in prompts if len(p) > 16]
    with engine(folder) as llm, engine(folder, max_num_batched_tokens=16, max_num_seqs=8) as small:
        answers, expected = ([tokens(x, [p])[0] for p in ragged] for x in (small, llm))
        assert agreement(answers, expected) >= 0.75
        assert [a[0] for a in answers] == [e[0] for e in expected]


def test_closing_one_engine_leaves_the_other_what_its_graphs_use(folder, prompts, expected):
    with engine(folder, enable_prefix_caching=False) as llm:
        before = [tokens(llm, [p])[0] for p in prompts]
        for _ in range(2):
            with engine(folder) as other:
                assert tokens(other, prompts) == expected
            taken = torch.full((256 << 20,), 255, dtype=torch.uint8, device="cuda")  # where anything freed was
            assert [tokens(llm, [p])[0] for p in prompts] == before
            del taken


def test_one_step_at_a_time_says_the_same(folder, prompts, expected):
    """A logprob makes the host wait for each token, so nothing is launched ahead."""
    with engine(folder) as llm:
        assert tokens(llm, prompts, logprobs=1) == expected


def test_small_prompts_alone_say_what_they_say_in_company(folder, prompts, expected):
    """Alone, prompts of up to 1,024 tokens are padded, and replayed graphs."""
    with engine(folder) as llm, engine(folder, enforce_eager=True) as eager:
        alone = [tokens(llm, [p])[0] for p in prompts]
        assert agreement(alone, [tokens(eager, [p])[0] for p in prompts]) >= 0.75
        assert agreement(alone, expected) >= 0.75
        assert [a[0] for a in alone] == [e[0] for e in expected]
        assert llm._driver._started.engine.runner.prompts._graphs  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["", "deterministic"])
def test_steps_that_mix_prompts_and_decodes_say_the_same_computed_and_replayed(folder, prompts, options):
    """More requests than rows: prompts come while others decode."""
    each = [SamplingParams(temperature=0, max_tokens=5 + 9 * i % 31, ignore_eos=True, detokenize=False) for i in range(21)]
    options = {"max_num_seqs": 5, "enable_prefix_caching": False} | options

    def said(llm: LLM) -> list[list[int]]:
        return [o.outputs[0].token_ids for o in llm.generate(prompts * 3, each, use_tqdm=False)]

    with engine(folder, **options) as llm, engine(folder, enforce_eager=True, **options) as eager:
        first = said(llm)
        assert said(llm) == said(llm) == first == said(eager)
        graphs = llm._engine.runner.prompts._graphs  # type: ignore[attr-defined]
        assert any(size.decodes for size in graphs)
        assert not eager._engine.runner.prompts._graphs  # type: ignore[attr-defined]
        alone = [llm.generate([p], sp, use_tqdm=False)[0].outputs[0].token_ids for p, sp in zip(prompts * 3, each)]
    same = [a == b for x, y in zip(alone, first) for a, b in zip(x, y)]
    assert sum(same) / len(same) >= (1.0 if options.get("deterministic") else 0.75)


def test_float32_in_plain_torch_nearly_agrees(folder, prompts, expected):
    with engine(folder, dtype="float32") as llm:
        assert agreement(tokens(llm, prompts), expected) >= 0.75


def test_unusual_sampling_beside_plain_does_not_disturb_it(folder, prompts, expected):
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    narrow = greedy.clone(temperature=0.8, top_k=5, seed=1)
    each = [narrow if i % 2 else greedy for i in range(len(prompts))]
    with engine(folder) as llm:
        answers = [o.outputs[0].token_ids for o in llm.generate(prompts, each, use_tqdm=False)]
    assert answers[::2] == expected[::2]


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 3, "top_p": 0.01}], ids=str)
def test_limits_that_leave_one_token_are_greedy(folder, prompts, expected, limits):
    with engine(folder) as llm:
        assert tokens(llm, prompts, temperature=0.9, seed=1, **limits) == expected


def test_penalties_on_the_device_are_those_of_torch(folder, prompts, expected):
    """A logprob sends a request to torch's sampler, on the same logits; divisions may differ in the last bit."""
    asked = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    with engine(folder) as llm:
        on_device = tokens(llm, prompts, **asked)
        assert on_device != expected
        assert agreement(on_device, tokens(llm, prompts, logprobs=1, **asked)) >= 0.9


def test_logprobs_are_the_same_by_both_roads(folder, prompts):
    """The device goes on while they are on their way; a bias, of nothing, makes it wait for torch's sampler."""
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=3)
    with engine(folder) as llm:
        ahead, waiting = ([o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
                          for params in (greedy, greedy.clone(logit_bias={1: 0.0})))  # fmt: skip
    assert agreement([o.token_ids for o in ahead], [o.token_ids for o in waiting]) >= 0.9
    for a, b in zip(ahead, waiting):
        assert len(a.logprobs) == len(b.logprobs) == NEW
        for mine, theirs, token, other in zip(a.logprobs, b.logprobs, a.token_ids, b.token_ids):
            if token != other:
                break  # from here on they are different answers
            assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=0.05)
            assert token == next(iter(mine)), "the chosen one comes first"


def test_filtered_and_penalised_draws_repeat(folder, prompts):
    with engine(folder) as llm:
        together = tokens(llm, prompts, **QWENS)
        assert tokens(llm, prompts, **QWENS) == together
        assert tokens(llm, prompts, **QWENS | {"seed": 4}) != together


def test_seeded_draws_repeat(folder, prompts):
    with engine(folder) as llm:
        first = tokens(llm, prompts, temperature=0.8, seed=3)
        assert tokens(llm, prompts, temperature=0.8, seed=3) == first
        assert tokens(llm, prompts, temperature=0.8, seed=4) != first


@pytest.mark.parametrize("asked", [{"temperature": 0}, QWENS], ids=["greedy", "filtered and penalised"])
def test_no_launch_waits_for_the_device(folder, prompts, monkeypatch, asked):
    """Where the host would wait, torch raises. The first round compiles and captures."""
    launch = Engine._launch

    def watched(self: Engine, ahead: bool = False) -> Flight | None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, ahead)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with engine(folder, enable_prefix_caching=False, max_num_seqs=5) as llm:
        expected = tokens(llm, prompts, **asked)
        monkeypatch.setattr(Engine, "_launch", watched)
        assert tokens(llm, prompts, **asked) == expected


def test_memory_comes_back(folder, prompts):
    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    with engine(folder) as llm:
        tokens(llm, prompts)
    before = used()
    for _ in range(2):
        with engine(folder) as llm:
            tokens(llm, prompts)
    assert used() - before < 100 * 2**20


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_beside_answers(folder, prompts, expected, pooling):
    """Vectors are those of plain torch in float32, near enough, and the answers that share their steps stay as they are."""
    with engine(folder, dtype="float32") as llm:
        reference = np.stack([o.embedding for o in llm.embed(prompts, pooling, use_tqdm=False)])

    async def both(llm: LLM) -> tuple[list[list[int]], np.ndarray]:
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        answers = [asyncio.create_task(llm.agenerate(p, params)) for p in prompts]
        vectors = await llm.aembed(prompts, pooling)
        return [(await a).outputs[0].token_ids for a in answers], np.stack([v.embedding for v in vectors])

    with engine(folder) as llm:
        answers, vectors = asyncio.run(both(llm))
        assert llm.stats()["kv_blocks_free"] == llm.stats()["kv_blocks_total"]
    assert agreement(answers, expected) >= 0.75
    assert (vectors * reference).sum(1).min() > 0.99
