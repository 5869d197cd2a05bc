"""The engine says what transformers says: greedy tokens and log-probabilities in float32, whatever runs beside a request.

The oracle is transformers' own model, one prompt at a time, and its logits over prompt and answer. It runs once a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.outputs import CompletionOutput, Logprob, RequestOutput

FAMILIES = ["llama", "llama-bias-tied", "llama-llama3-rope", "llama-yarn", "mistral-window", "qwen2", "qwen2-window",
            "qwen2-layer-types", "qwen3", "smollm3", "smollm3-window", "phi3", "phi3-partial-window"]  # fmt: skip
NEW = 20
LENGTHS = (1, 2, 16, 17, 33, 64, 120)
CLOSE = 1e-4


@dataclass
class Expected:
    """What transformers says: the answer, and log-probabilities [n + answer, vocab] of the prompt's last n tokens and of it.

    margin: how much likelier the best token was than the second, where it was least so.
    """

    prompt: list[int]
    answer: list[int]
    logprobs: torch.Tensor
    margin: float

    @property
    def answer_logprobs(self) -> torch.Tensor:
        return self.logprobs[-len(self.answer) :]


def expect(prompt: list[int], answer: list[int], logits: torch.Tensor) -> Expected:
    """logits: [n + answer, vocab], of the prompt's last n tokens and of the answer, whose tokens must be the best."""
    best = logits[-len(answer) :].topk(2)
    assert best.indices[:, 0].tolist() == answer, "transformers does not agree with itself"
    return Expected(prompt, answer, logits.log_softmax(-1), float((best.values[:, 0] - best.values[:, 1]).min()))


def generated(model: Any, prompts: Sequence[list[int]], new: int) -> Any:
    """What transformers generates for prompts that go together, shorter ones padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
                          pad_token_id=0, output_logits=True, return_dict_in_generate=True)  # fmt: skip


@torch.inference_mode()
def ask_transformers(model: Any, prompts: Sequence[list[int]], new: int) -> list[Expected]:
    """Answers and logits of prompts: answers of all together, which is quick; they count only because the logits, each prompt's
    alone, without padding and without transformers' own cache, say the same."""
    answers = generated(model, prompts, new).sequences[:, -new:].tolist()
    logits = [model(torch.tensor([p + a])).logits[0, :-1] for p, a in zip(prompts, answers)]
    return [expect(p, a, x) for p, a, x in zip(prompts, answers, logits)]


@torch.inference_mode()
def ask_transformers_once(model: Any, prompt: list[int], new: int) -> Expected:
    """The same for a prompt so long that it is read once only; without the prompt's own logits."""
    said = generated(model, [prompt], new)
    return expect(prompt, said.sequences[0, -new:].tolist(), torch.cat(said.logits))


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 3} | changes)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def engine(folder: Path, tokenizer: Path, **options: Any) -> Iterator[LLM]:
    with LLM(folder, tokenizer=tokenizer, dtype="float32", **options) as llm:
        yield llm
        stats = llm.stats()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        assert stats["kv_blocks_free"] == stats["kv_blocks_total"]


def generate(llm: LLM, expected: Sequence[Expected], params: SamplingParams | None = None) -> list[RequestOutput]:
    return llm.generate([e.prompt for e in expected], params or greedy(), use_tqdm=False)


def assert_equal(outputs: list[RequestOutput], expected: Sequence[Expected]) -> None:
    assert len(outputs) == len(expected)
    for output, e in zip(outputs, expected):
        assert output.prompt_token_ids == e.prompt
        assert output.outputs[0].token_ids == e.answer
        assert_logprobs(output.outputs[0], e.answer, e.answer_logprobs)


def assert_logprobs(output: CompletionOutput, answer: list[int], expected: torch.Tensor) -> None:
    assert output.logprobs is not None
    for entry, token, row in zip(output.logprobs, answer, expected, strict=True):
        assert_entry(entry, token, row, 3)
    assert output.cumulative_logprob == pytest.approx(sum(float(expected[i, t]) for i, t in enumerate(answer)), abs=NEW * CLOSE)


def assert_entry(entry: dict[int, Logprob] | None, token: int, row: torch.Tensor, k: int) -> None:
    """`entry` holds the token and the k best of `row`, with their log-probabilities and ranks."""
    assert entry is not None
    best = row.topk(k)
    assert k <= len(entry) <= k + 1
    assert next(iter(entry)) == token
    for t, found in entry.items():
        assert found.logprob == pytest.approx(float(row[t]), abs=CLOSE)
        assert (row > row[t] + CLOSE).sum() < found.rank <= (row >= row[t] - CLOSE).sum()  # type: ignore[operator]
    values = sorted((f.logprob for t, f in entry.items() if t != token or len(entry) == k), reverse=True)
    torch.testing.assert_close(torch.tensor(values), best.values[:k], atol=CLOSE, rtol=0)


# --- tiny random models of every family


def ask_clearly(model: Any, lengths: Sequence[int], random: torch.Generator) -> list[Expected]:
    """Random prompts whose answers are no toss-up: where two tokens are equally likely, rounding decides and nothing is shown."""
    clear: dict[int, Expected] = {}
    for _ in range(9):
        missing = [n for n in lengths if n not in clear]
        prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=random).tolist() for n in missing]
        clear |= {len(e.prompt): e for e in ask_transformers(model, prompts, NEW) if e.margin > 10 * CLOSE}
        if len(clear) == len(lengths):
            return [clear[n] for n in lengths]
    raise AssertionError(f"no clear answer to prompts of {missing} tokens")


@pytest.fixture(scope="session")
def all_tiny_answers(tiny: Callable[[str], tuple[Path, Any]]) -> Callable[[str], tuple[Path, list[Expected]]]:
    """family -> (folder, what transformers answers to prompts of LENGTHS)."""
    made: dict[str, tuple[Path, list[Expected]]] = {}

    def get(family: str) -> tuple[Path, list[Expected]]:
        if family not in made:
            folder, model = tiny(family)
            random = torch.Generator().manual_seed(7)
            made[family] = (folder, ask_clearly(model, LENGTHS, random))
        return made[family]

    return get


@pytest.fixture
def tiny_answers(all_tiny_answers):
    with on_one_thread():
        yield all_tiny_answers


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_together(family, tiny_answers, smollm2_folder):
    folder, expected = tiny_answers(family)
    with engine(folder, smollm2_folder, max_model_len=200) as llm:
        for e in expected:
            assert_equal(generate(llm, [e]), [e])
        llm.reset_prefix_cache()
        assert_equal(generate(llm, expected), expected)
        hits = llm.stats()["prefix_cache_hits"]
        assert_equal(generate(llm, expected[::-1]), expected[::-1])  # now from the cache, in another order
        assert llm.stats()["prefix_cache_hits"] > hits + 200


@pytest.mark.parametrize("family", FAMILIES)
def test_without_cache_in_chunks_and_small_blocks(family, tiny_answers, smollm2_folder):
    folder, expected = tiny_answers(family)
    with engine(folder, smollm2_folder, max_model_len=200, enable_prefix_caching=False) as llm:
        assert_equal(generate(llm, expected), expected)
        assert llm.stats()["prefix_cache_hits"] == 0
    chunks = {"block_size": 5, "long_prefill_token_threshold": 16, "max_num_batched_tokens": 40, "max_num_seqs": 16}
    with engine(folder, smollm2_folder, max_model_len=200, **chunks) as llm:
        assert_equal(generate(llm, expected), expected)
        assert llm.stats()["steps"] > NEW + sum(LENGTHS) // 40


@pytest.mark.parametrize(("family", "caching"), [*((f, True) for f in FAMILIES), ("llama", False), ("mistral-window", False)])
def test_with_so_few_blocks_that_requests_are_preempted(family, caching, tiny_answers, smollm2_folder):
    folder, expected = tiny_answers(family)
    options = {"max_model_len": 140, "block_size": 4, "num_kv_blocks": 38, "enable_prefix_caching": caching}
    with engine(folder, smollm2_folder, **options) as llm:
        outputs = generate(llm, expected)
        assert llm.stats()["preemptions"] > 0
    assert_equal(outputs, expected)


# --- log-probabilities, forks and seeds


@pytest.mark.parametrize(
    "options",
    [{}, {"long_prefill_token_threshold": 7}, {"block_size": 4, "num_kv_blocks": 38, "max_model_len": 140}],
    ids=["whole", "chunks", "preempted"],
)
def test_prompt_logprobs(options, tiny_answers, smollm2_folder):
    folder, expected = tiny_answers("qwen3")
    with engine(folder, smollm2_folder, **{"max_model_len": 200} | options) as llm:
        generate(llm, expected)  # so that there is something in the prefix cache that must not be used
        outputs = generate(llm, expected, greedy(prompt_logprobs=4))
        assert ("num_kv_blocks" in options) == (llm.stats()["preemptions"] > 0)
    assert_equal(outputs, expected)
    for output, e in zip(outputs, expected):
        found = output.prompt_logprobs
        assert found is not None
        assert len(found) == len(e.prompt)
        assert found[0] is None
        for i in range(1, len(e.prompt)):
            assert_entry(found[i], e.prompt[i], e.logprobs[i - 1], 4)


def test_only_those_who_ask_get_logprobs(tiny_answers, smollm2_folder):
    folder, expected = tiny_answers("llama")
    params = [greedy(logprobs=k, prompt_logprobs=p) for k, p in [(None, None), (0, None), (5, None), (None, 0), (1, 2)]]
    with engine(folder, smollm2_folder, max_model_len=200) as llm:
        outputs = llm.generate([e.prompt for e in expected[:5]], params, use_tqdm=False)
    for output, e, p in zip(outputs, expected, params, strict=False):
        answer = output.outputs[0]
        assert answer.token_ids == e.answer
        assert (answer.logprobs is None) == (p.logprobs is None)
        assert (output.prompt_logprobs is None) == (p.prompt_logprobs is None)
        for i, entry in enumerate(answer.logprobs or []):
            assert_entry(entry, e.answer[i], e.answer_logprobs[i], p.logprobs or 0)


def test_a_request_that_nothing_may_follow_ends_alone(tiny_answers, smollm2_folder):
    """Its parameters forbid every token: it ends with an error, and its neighbours never notice."""
    folder, expected = tiny_answers("llama")
    impossible = SamplingParams(temperature=0, allowed_token_ids=[7], stop_token_ids=[7], min_tokens=2, logprobs=1)
    with engine(folder, smollm2_folder, max_model_len=200) as llm:
        outputs = llm.generate([e.prompt for e in expected[:3]], [greedy(), impossible, greedy()], use_tqdm=False)
    assert_equal([outputs[0], outputs[2]], [expected[0], expected[2]])
    answer = outputs[1].outputs[0]
    assert (answer.finish_reason, answer.token_ids, answer.logprobs) == ("error", [], [])


SEEDED = {"temperature": 1.5, "top_p": 0.95, "max_tokens": NEW, "ignore_eos": True}
POOLS = {
    "plenty": {},
    "no caching": {"enable_prefix_caching": False},
    "chunks": {"long_prefill_token_threshold": 5},
    "preempted": {"block_size": 4, "num_kv_blocks": 38, "max_model_len": 140},
    "preempted, no caching": {"block_size": 4, "num_kv_blocks": 38, "max_model_len": 140, "enable_prefix_caching": False},
}


@pytest.fixture(scope="session")
def seeded_alone(all_tiny_answers, smollm2_folder) -> list[list[list[int]]]:
    """For each prompt, the answers to seeds 100, 101, 102, each asked alone."""
    folder, expected = all_tiny_answers("llama")
    with on_one_thread(), engine(folder, smollm2_folder, max_model_len=200) as llm:
        params = [SamplingParams(seed=s, **SEEDED) for s in (100, 101, 102)]
        return [[generate(llm, [e], p)[0].outputs[0].token_ids for p in params] for e in expected]


@pytest.mark.parametrize("pool", POOLS)
def test_n_answers_are_n_seeded_requests(pool, seeded_alone, tiny_answers, smollm2_folder):
    folder, expected = tiny_answers("llama")
    with engine(folder, smollm2_folder, **{"max_model_len": 200} | POOLS[pool]) as llm:
        forked = generate(llm, expected, SamplingParams(n=3, seed=100, **SEEDED))
        assert ("preempted" in pool) == (llm.stats()["preemptions"] > 0)
        prompts = [e.prompt for e in expected for _ in range(3)]
        params = [SamplingParams(seed=100 + i, **SEEDED) for _ in expected for i in range(3)]
        separate = llm.generate(prompts, params, use_tqdm=False)
    assert [[a.token_ids for a in o.outputs] for o in forked] == seeded_alone
    assert [[o.outputs[0].token_ids for o in separate[i : i + 3]] for i in range(0, len(separate), 3)] == seeded_alone
    assert all(len({tuple(a) for a in answers}) == 3 for answers in seeded_alone)


# --- SmolLM2, real weights

ENGLISH = "The capital of France is Paris, and the capital of Italy is"
PROMPTS = [
    "Hello", "a", "\n\n\n", "café naïve Ünïcödé", "Once upon a time there was a small robot who", ENGLISH,
    "Q: What is 17 + 25?\nA:",
    "Water boils at a temperature of", "My three favourite colours are red, blue and", "To be, or not to be, that is the",
    "The quick brown fox", "In 1969, the first humans",
    "你好，帮我介绍一下大语言模型", "中国的首都是北京，法国的首都是", "今天天气很好，我们一起去",
    "def fibonacci(n):\n    ", "for (int i = 0; i < n; i++) {", "SELECT name FROM users WHERE", "import numpy as np\n\nx = np.",
    "😀😃😄 these are", "👩‍👩‍👧‍👦 family and 🇫🇷 flag:", "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
]  # fmt: skip
LONG = 1000  # tokens: more than BUDGET, so that no step can hold it whole
BUDGET = 768
REAL_NEW = 12


@pytest.fixture(scope="session")
def real(smollm2_folder: Path) -> list[Expected]:
    """What transformers answers to all PROMPTS, to one token, and to a prompt of LONG tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    story = [f"Chapter {i}. {p} " for i in range(200) for p in PROMPTS[2:10]]
    prompts.append(tokenizer("".join(story))["input_ids"][:LONG])
    assert min(map(len, prompts)) == 1
    assert len(prompts[-1]) == LONG
    answers = [*ask_transformers(model, prompts[:-1], REAL_NEW), ask_transformers_once(model, prompts[-1], REAL_NEW)]
    assert min(e.margin for e in answers) > 10 * CLOSE, "two tokens are equally likely: that prompt shows nothing"
    return answers


@pytest.fixture(scope="session")
def company(real: list[Expected]) -> list[list[int]]:
    """Prompts that fill the batch up to 64: pieces of the long one, from 1 to 60 tokens."""
    lengths = [1 + (37 * i) % 60 for i in range(64 - len(real))]
    return [real[-1].prompt[i * 7 : i * 7 + n] for i, n in enumerate(lengths)]


REAL = {"max_model_len": 4096, "max_num_batched_tokens": BUDGET}


def check_real(llm: LLM, real: list[Expected], company: list[list[int]]) -> None:
    """One batch of 64, the prompts with known answers spread among the others."""
    prompts: list[list[int]] = list(company)
    for i, e in enumerate(real):
        prompts.insert(i * 64 // len(real), e.prompt)
    outputs = llm.generate(prompts, greedy(max_tokens=REAL_NEW), use_tqdm=False)
    assert len(outputs) == 64
    assert_equal([outputs[prompts.index(e.prompt)] for e in real], real)


def test_smollm2_alone_and_in_a_batch_of_64(real, company, smollm2_folder):
    with engine(smollm2_folder, smollm2_folder, **REAL) as llm:
        for e in real:
            assert_equal(generate(llm, [e], greedy(max_tokens=REAL_NEW)), [e])
        check_real(llm, real, company)
        assert llm.stats()["prefix_cache_hits"] >= LONG // 16 * 16


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"long_prefill_token_threshold": 16},
        {"num_kv_blocks": 80, "max_model_len": LONG + REAL_NEW},
    ],
    ids=["no caching", "chunks", "preempted"],
)
def test_smollm2_in_a_batch_of_64(options, real, company, smollm2_folder):
    with engine(smollm2_folder, smollm2_folder, **REAL | options) as llm:
        check_real(llm, real, company)
        assert ("num_kv_blocks" in options) == (llm.stats()["preemptions"] > 0)
