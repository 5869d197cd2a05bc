"""Embeddings are transformers' last hidden states, pooled, whatever runs beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit import LLM, EmbeddingOutput, SamplingParams
from llmkit.errors import EngineClosedError, EngineError, InvalidRequestError, UnknownOptionError

LENGTHS = (1, 2, 5, 16, 17, 33, 64, 120)
FAMILIES = ["llama", "qwen3", "mistral-window", "phi3"]
WAYS = [
    {"enable_prefix_caching": False},
    {"block_size": 5, "long_prefill_token_threshold": 7, "max_num_batched_tokens": 40, "max_num_seqs": 16},
    {"max_model_len": 140, "block_size": 4, "num_kv_blocks": 38},
]


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (n,), generator=random).tolist() for n in LENGTHS]


@torch.inference_mode()
def oracle(model: Any, prompt: list[int], pooling: str) -> np.ndarray:
    states = model.model(torch.tensor([prompt])).last_hidden_state[0]
    return (states[-1] if pooling == "last" else states.mean(0)).numpy()


def assert_close(outputs: Sequence[EmbeddingOutput], model: Any, pooling: str) -> None:
    for output, prompt in zip(outputs, prompts(), strict=True):
        assert output.prompt_token_ids == prompt
        np.testing.assert_allclose(output.embedding, oracle(model, prompt, pooling), atol=2e-4)


def assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats["running"], stats["waiting"], stats["kv_blocks_free"]) == (0, 0, stats["kv_blocks_total"])


@pytest.fixture
def load(tiny: Callable[[str], tuple[Path, Any]], smollm2_folder: Path) -> Callable[..., tuple[LLM, Any]]:
    def load(family: str, **options: Any) -> tuple[LLM, Any]:
        folder, model = tiny(family)
        return LLM(folder, tokenizer=smollm2_folder, dtype="float32", **{"max_model_len": 200, **options}), model

    return load


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_transformers(load, family, pooling):
    llm, model = load(family)
    with llm:
        assert_close(llm.embed(prompts(), pooling, normalize=False, use_tqdm=False), model, pooling)
        again = llm.embed(prompts(), pooling, normalize=False)  # now with a prefix in the cache
        assert_close(again, model, pooling)
        assert (max(o.num_cached_tokens for o in again) > 0) == (pooling == "last")
        assert_idle(llm)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("options", WAYS, ids=["without cache", "in chunks", "with few blocks"])
def test_beside_answers(load, options, pooling):
    """Vectors and answers share steps, and neither changes the other."""
    llm, model = load("llama", **options)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    with llm:
        alone = [o.outputs[0].token_ids for o in llm.generate(prompts()[:5], params, use_tqdm=False)]
        steps = llm.stats()["steps"]

        async def both() -> tuple[list[list[int]], list[EmbeddingOutput]]:
            answers = [asyncio.create_task(llm.agenerate(p, params)) for p in prompts()[:5]]
            vectors = await llm.aembed(prompts(), pooling, normalize=False)
            return [(await a).outputs[0].token_ids for a in answers], vectors

        beside, vectors = asyncio.run(both())
        assert beside == alone
        assert_close(vectors, model, pooling)
        assert llm.stats()["steps"] > steps
        assert ("num_kv_blocks" in options) == (llm.stats()["preemptions"] > 0)
        assert_idle(llm)


def test_a_preempted_mean_begins_anew(load):
    llm, model = load("llama", max_model_len=140, block_size=4, num_kv_blocks=38, long_prefill_token_threshold=2)
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    long = prompts()[-1]
    with llm:

        async def crowd() -> EmbeddingOutput:
            answers = [asyncio.create_task(llm.agenerate([7, 8, 9], params)) for _ in range(2)]
            await asyncio.sleep(0)  # now they have come first
            (vector,) = await llm.aembed([long], "mean", normalize=False)
            await asyncio.gather(*answers)
            return vector

        found = asyncio.run(crowd())
        assert found.metrics is not None
        assert found.metrics.num_preemptions > 0
        np.testing.assert_allclose(found.embedding, oracle(model, long, "mean"), atol=2e-4)
        assert_idle(llm)


def test_normalised_by_default_and_vllms_spelling(load):
    llm, model = load("llama")
    with llm:
        found = llm.embed(prompts()[3])
        expected = oracle(model, prompts()[3], "last")
        np.testing.assert_allclose(found[0].outputs.embedding, expected / np.linalg.norm(expected), atol=1e-5)
        assert "48 in all" in repr(found[0])


def test_a_prompt_may_fill_the_whole_context(load):
    llm, model = load("llama", max_model_len=64)
    with llm:
        whole = llm.embed([prompts()[6]], normalize=False)[0]
        np.testing.assert_allclose(whole.embedding, oracle(model, prompts()[6], "last"), atol=2e-4)
        with pytest.raises(InvalidRequestError, match="65 tokens, and it must fit 64"):
            llm.embed([prompts()[7][:65]])


def test_step_through_shows_embeddings_of_others(load):
    """A vector that is ready in a step somebody looks at leaves no hole in the view."""
    llm, _ = load("llama")
    with llm:
        jobs = llm._embedding_jobs([prompts()[3]], "last", True)
        llm._driver.submit(jobs)
        views = list(llm.step_through([5, 6, 7], SamplingParams(max_tokens=2, ignore_eos=True)))
        assert [s.request_id[:3] for s in views[0].sequences] == ["emb", "req"]
        assert views[0].sequences[0].token is None
        assert views[0].sequences[0].finish_reason == "stop"


def test_refusals(load):
    llm, _ = load("llama")
    with llm:
        with pytest.raises(InvalidRequestError, match=r"'last'.*'mean'.*'max'"):
            llm.embed("hello", "max")
        with pytest.raises(InvalidRequestError, match="empty"):
            llm.embed([[]])
        with pytest.raises(UnknownOptionError, match="pooling"):
            llm.embed("hello", poolin="mean")
        assert_idle(llm)


def test_numbers_that_broke_are_an_error_that_names_the_prompt(load):
    llm, _ = load("llama")
    with llm:
        expected = llm.embed(prompts()[:2])
        embedding = llm._engine.model.embedding
        embedding.weight = embedding.weight.clone()
        embedding.weight[99] = float("nan")
        mine = [p for p in prompts() if 99 not in p][:2]
        for ask in (llm.embed, lambda given: asyncio.run(llm.aembed(given))):
            with pytest.raises(EngineError, match="there is no embedding of 3 token ids: the model's numbers broke"):
                ask([mine[0], [5, 99, 7], mine[1]])
            assert_idle(llm)
        for output, before in zip(llm.embed(mine), expected):
            np.testing.assert_array_equal(output.embedding, before.embedding)


def test_cancelling_and_closing(load):
    llm, _ = load("llama", long_prefill_token_threshold=1)
    with llm:

        async def cancel() -> None:
            task = asyncio.create_task(llm.aembed(prompts()))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(await llm.aembed(prompts()[:2])) == 2

        asyncio.run(cancel())
        assert_idle(llm)

        async def close() -> None:
            task = asyncio.create_task(llm.aembed(prompts()))
            await asyncio.sleep(0.01)
            await asyncio.to_thread(llm.close)
            with pytest.raises(EngineClosedError):
                await task

        asyncio.run(close())
