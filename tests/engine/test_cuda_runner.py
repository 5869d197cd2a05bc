"""The GPU's runner without a GPU: kernels in Triton's interpreter, graphs that are played back by running their body again.

Its oracle is the plain runner on the same weights: what is deterministic (greedy, penalties, limits that leave one token) must be
equal. On a GPU test_gpu.py asks more.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to test")

from llmkit_kernels import decode_attention

from llmkit import LLM, SamplingParams, ops
from llmkit.attention import choice
from llmkit.engine import cuda_runner, graphs, prompt_graphs, sampler
from llmkit.engine.drawing import Work
from llmkit.engine.request import Request
from llmkit.errors import EngineError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU: see test_gpu.py")

PROMPTS = [[3, 4, 5], [7] * 9, [50, 3]]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
PENALISED = GREEDY.clone(repetition_penalty=1.7, presence_penalty=0.3, frequency_penalty=0.4)
WARM = GREEDY.clone(temperature=0.9, seed=5)


class Playback:
    """Stands for a captured graph."""

    def __init__(self, body: Any) -> None:
        self.body = body
        self.results = body()  # as capturing does, so that kernels are compiled

    def replay(self) -> None:
        new = self.body()
        for kept, it in zip(self.results, new) if isinstance(new, tuple) else [(self.results, new)]:
            kept.copy_(it)

    def pool(self) -> None:
        return None


def capture(body: Any, side: Any, pool: Any = None) -> tuple[Any, Any]:
    graph = Playback(body)
    return graph, graph.results


class Arrived(cuda_runner.SampledTokens):
    """Stands for tokens on the way; they, too, are read after the next step was launched."""

    def __init__(self, token_ids: torch.Tensor, top: tuple[torch.Tensor, ...], asked: Any) -> None:
        super().__init__(token_ids.clone(), None)
        self._top, self._asked = [t.clone().numpy() for t in top], asked

    def to_host(self) -> Any:
        if self._top:
            self.logprobs = sampler.TopLogprobs(*self._top, where=sampler.places(self._asked, len(self.token_ids)))
        return self.token_ids.numpy()


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Such that an answer depends on every token and where it stands; with small ones it is one token, repeated."""
    width, inner, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(2)
    normal = lambda *shape, scale: torch.empty(shape).normal_(0, scale * shape[-1] ** -0.5, generator=generator)
    made = {"model.embed_tokens.weight": normal(config["vocab_size"], width, scale=width**0.5),
            "lm_head.weight": normal(config["vocab_size"], width, scale=4), "model.norm.weight": torch.ones(width)}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
                  "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
                  "mlp.down_proj": (width, inner)}  # fmt: skip
        made |= {f"model.layers.{i}.{name}.weight": normal(*shape, scale=1.6) for name, shape in shapes.items()}
        made |= {f"model.layers.{i}.{name}.bias": normal(shapes[name][0], scale=2) for name in list(shapes)[:3]}
        made |= {f"model.layers.{i}.{name}.weight": torch.ones(width) for name in ("input_layernorm", "post_attention_layernorm")}
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 32, "vocab_size": 100, "rope_theta": 1e6,
              "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "torch_dtype": "float32"}  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    save_file(weights(config), place / "model.safetensors")
    return place


def load(folder, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "kv_cache_memory": 0.01, "block_size": 16, "max_num_seqs": 4}
    return LLM(folder, skip_tokenizer_init=True, **defaults | options)


@pytest.fixture(scope="module")
def plain(folder):
    with load(folder) as llm:
        yield llm


@pytest.fixture
def on_the_gpu(monkeypatch):
    """LLMs that are made now think that they have one."""
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: True)
    monkeypatch.setattr(cuda_runner, "_OnTheWay", Arrived)
    monkeypatch.setattr(decode_attention, "num_sms", lambda: 4)  # few programs: each is interpreted
    monkeypatch.setattr(prompt_graphs, "TOKENS", [4, 16, *prompt_graphs.TOKENS])
    monkeypatch.setattr(prompt_graphs, "DECODES", [0, 4])
    for module in (graphs, prompt_graphs):
        monkeypatch.setattr(module, "capture", capture)


@pytest.fixture
def gpu(on_the_gpu, folder):
    with load(folder) as llm:
        assert type(llm._engine.runner) is cuda_runner.CudaRunner
        yield llm


def said(llm: LLM, params: SamplingParams | list[SamplingParams], prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]


def test_greedy_and_penalised_are_those_of_the_plain_runner(gpu, plain):
    expected, penalised = said(plain, GREEDY), said(plain, PENALISED)
    assert penalised != expected, "the penalties change something here"
    each = [GREEDY, PENALISED, PENALISED.clone(logprobs=1)]
    assert said(gpu, each) == [expected[0], *penalised[1:]], "on the device, and by torch"


def test_deterministic_says_what_the_plain_runner_says_in_any_company(on_the_gpu, folder, plain):
    prompts = [*PROMPTS, [9] * 40]
    with load(folder, deterministic=True, max_num_batched_tokens=16) as llm:
        assert llm._engine.runner.backend.name == "fixed"
        expected = said(plain, GREEDY, prompts)
        assert said(llm, GREEDY, prompts) == expected, "steps that mix decodes and chunks of prompts among them"
        assert [said(llm, GREEDY, [p])[0] for p in prompts] == expected


@pytest.mark.parametrize("deterministic", [False, True])
def test_float8_keys_are_kept_once_whoever_computes_them(on_the_gpu, folder, deterministic, monkeypatch):
    """Alone, in company, in chunks or from the cache; the interpreter cuts float8 off, so there is no other runner to ask."""
    monkeypatch.setattr(choice, "_no_float8", lambda name, device: "")
    prompts = [*PROMPTS, [9] * 40]
    with load(folder, kv_cache_dtype="fp8", deterministic=deterministic, max_num_batched_tokens=16) as llm:
        assert llm._engine.runner.kv_cache.dtype == torch.float8_e4m3fn
        together = said(llm, GREEDY, prompts)
        assert [said(llm, GREEDY, [p])[0] for p in prompts] == together
        assert llm.stats()["prefix_cache_hits"] > 0
        llm.reset_prefix_cache()
        assert [said(llm, GREEDY, [p])[0] for p in prompts] == together


def test_limits_that_leave_one_token_are_greedy(gpu, plain):
    each = [WARM.clone(top_k=1), WARM.clone(top_p=1e-6), WARM.clone(min_p=1.0)]
    assert said(gpu, each) == said(plain, GREEDY)
    each = [PENALISED.clone(temperature=0.9, top_k=3, top_p=0.01, min_p=0.001), *[PENALISED.clone(temperature=0.9, top_k=1)] * 2]
    assert said(gpu, each) == said(plain, PENALISED)


def test_a_draw_does_not_know_its_company(gpu):
    each = [WARM, WARM.clone(top_k=4, top_p=0.9), WARM.clone(min_p=0.05, repetition_penalty=1.2)]
    together = said(gpu, each)
    assert [said(gpu, params, [prompt])[0] for params, prompt in zip(each, PROMPTS)] == together


def test_a_newcomer_who_decodes_at_once_is_known_before_the_step(gpu, plain):
    """All but a token of its prompt is cached, beside a prompt that is not: in a step such as others were, for which rows are
    loaded late."""
    known = list(range(20, 37))
    for other in (3, 4, 5, 6):
        asked = [known, [other] * 5]
        assert said(gpu, GREEDY, asked) == said(plain, GREEDY, asked)
    assert gpu.stats()["prefix_cache_hits"] == 3 * 16


def test_what_the_device_draws_is_launched_ahead_and_graphs_are_kept_by_their_work(gpu, monkeypatch):
    runner, ahead = gpu._engine.runner, []
    monkeypatch.setattr(runner, "steps_ahead", lambda batch, ask=runner.steps_ahead: ahead.append(ask(batch)) or ahead[-1])
    for work, params in ((Work.PENALISE, PENALISED), (Work.FILTER, WARM.clone(top_p=0.8)), (Work.DRAW, WARM)):
        said(gpu, params, PROMPTS[:1])
        assert (1, work) in runner.graphs._graphs
    assert all(ahead), "each step brings a token to everybody"
    assert runner.graphs.capture_seconds.keys() == runner.graphs._graphs.keys()
    said(gpu, WARM.clone(logprobs=1), PROMPTS[:1])
    assert all(ahead), "log-probabilities follow their tokens"
    assert set(ahead) == {4}, "these end at max_tokens and nowhere else"
    ahead.clear()
    said(gpu, WARM.clone(stop_token_ids=[100]), PROMPTS[:1])
    assert set(ahead) == {2}, "a model as small as this has short steps"
    ahead.clear()
    list(gpu.stream(PROMPTS[0], WARM))
    assert (ahead[0], set(ahead[1:])) == (1, {2}), "where somebody reads along, after decodes that read as little as here"
    said(gpu, WARM.clone(logit_bias={5: 1.0}), PROMPTS[:1])
    assert not ahead[-1], "torch's sampler makes the host wait"


def test_logprobs_are_those_of_the_plain_runner(gpu, plain):
    """Of what the device draws and of what torch does, side by side, more and less of them, and none."""
    each = [GREEDY.clone(logprobs=2), PENALISED.clone(logprobs=5), GREEDY.clone(logit_bias={9: 2.0}, logprobs=0)]
    for params, prompts in ((each, PROMPTS), ([*each, GREEDY], [*PROMPTS, [8, 8]]), (each[:1] * 3, PROMPTS)):
        mine, theirs = ([o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)] for llm in (gpu, plain))
        assert [o.token_ids for o in mine] == [o.token_ids for o in theirs]
        assert [o.logprobs is None for o in mine] == [p.logprobs is None for p in params]
        for a, b in zip(mine, theirs):
            for here, there in zip(a.logprobs or [], b.logprobs or []):
                assert [(t, x.rank) for t, x in here.items()] == [(t, x.rank) for t, x in there.items()]
                assert [x.logprob for x in here.values()] == pytest.approx([x.logprob for x in there.values()], abs=1e-4)


def test_counts_are_made_again_after_a_preemption(on_the_gpu, folder, plain):
    prompts = [p * n for p, n in zip(PROMPTS, (5, 2, 7))]
    with load(folder, num_kv_blocks=5) as llm:
        assert said(llm, PENALISED, prompts) == said(plain, PENALISED, prompts)
        assert llm.stats()["preemptions"] > 0


def test_prompts_that_come_together_share_their_beginning(gpu, plain):
    """Those of a single token left read what the step itself writes."""
    prompts = [[5, 6] * 8 + tail for tail in ([1], [2, 3], [4] * 9)]
    assert said(gpu, GREEDY, prompts) == said(plain, GREEDY, prompts)
    assert gpu.stats()["prefix_cache_hits"] == 2 * 16


def test_the_device_knows_where_each_newest_token_stands(on_the_gpu, folder, plain, monkeypatch):
    """Whenever a token is drawn: also for a prompt whose last chunk is one token, alone in its step, on a row used before."""
    lengths, seen = (5, 16, 17, 33, 1, 18, 49), []
    prompts = [[3 + (7 * i) % 90 for i in range(n)] for n in lengths]
    each = [PENALISED.clone(max_tokens=n) for n in (9, 3, 1, 4, 2, 5, 6)]
    with load(folder, max_num_batched_tokens=16, max_num_seqs=3, enable_prefix_caching=False, num_kv_blocks=5) as llm:
        runner = llm._engine.runner
        run = runner.run

        def watch(batch, schedule):
            result = run(batch, schedule)
            rows = batch.rows[batch.sampled]  # a draw has moved each on by one
            seen.append((runner.state.position[rows].tolist(), batch.context_lens[batch.sampled].tolist(), batch.num_decodes))
            return result

        monkeypatch.setattr(runner, "run", watch)
        assert said(llm, each, prompts) == said(plain, each, prompts)
        assert all(there == expected for there, expected, _ in seen)
        seen.clear()
        for prompt in prompts:
            said(llm, GREEDY, [prompt])
        assert all(there == expected for there, expected, _ in seen)
        assert ([17], [17], 1) in seen, "a chunk of one token takes the way of those that decode"
        assert llm.stats()["preemptions"] > 0


def test_steps_with_prompts_are_replayed(gpu, plain):
    """Prompts alone, and beside sequences that decode: the same tokens when they are captured and later."""
    each = [GREEDY.clone(max_tokens=n) for n in (9, 2, 3, 2, 3, 4)]
    prompts = [[5, 6, 7] * n for n in (1, 2, 4, 3, 1, 5)]
    expected = said(plain, each, prompts)
    graphs = {}
    for _ in range(3):
        gpu.reset_prefix_cache()
        assert said(gpu, each, prompts) == expected
        graphs = gpu._engine.runner.prompts._graphs
    assert {size.decodes > 0 for size in graphs} == {False, True}


def test_a_rehearsal_for_the_compiler_leaves_nothing_behind(gpu, plain, monkeypatch):
    """Even if kernels were launched in it, which they are not. It goes through one layer of each kind."""
    rehearsals, fused = [], gpu._engine.runner.fused

    def rehearse(body):
        rehearsals.append((len(fused.layers), len(fused.model.layers)))
        body()

    monkeypatch.setattr(cuda_runner, "compile_ahead", rehearse)
    each = [PENALISED.clone(max_tokens=n, temperature=t, seed=2, top_k=k) for n, t, k in ((5, 0, 0), (2, 0.9, 1), (4, 0.9, 1))]
    prompts = [[5, 6, 7] * n for n in (1, 2, 14)]
    expected = said(plain, [p.clone(temperature=0, top_k=0) for p in each], prompts)
    assert said(gpu, each, prompts) == expected
    assert len(rehearsals) >= 2, "prompts alone, and decodes alone, of all sizes at once"
    assert set(rehearsals) == {(1, 1)}
    assert (len(fused.layers), len(fused.model.layers)) == (2, 2)


def test_smaller_sizes_are_compiled_with_the_first_and_none_twice(monkeypatch):
    monkeypatch.setattr(graphs, "capture", capture)
    ran: list[tuple[int, int]] = []
    compiled: list[list[tuple[int, int]]] = []

    def body(rows: torch.Tensor, work: int) -> tuple[torch.Tensor, torch.Tensor]:
        ran.append((len(rows), work))
        assert work != 2, "broken"
        return rows.clone(), torch.zeros(len(rows), 1)

    def rehearse(steps: Any) -> None:
        before = len(ran)
        steps()
        compiled.append(ran[before:])

    decodes = graphs.DecodeGraphs(body, graphs.DeviceRows(16, 4, torch.device("cpu")), 16, False, rehearse)
    for count, work in ((5, 0), (2, 0), (7, 0), (16, 0), (1, 1)):
        decodes.run(np.arange(count), work)
    assert compiled == [[(n, 0) for n in (1, 2, 4, 8)], [(12, 0), (16, 0)], [(1, 1)]]
    for _ in range(2):
        with pytest.raises(AssertionError, match="broken"):
            decodes.run(np.arange(1), 2)
    assert ran.count((1, 2)) == 2, "what did not compile is tried again"


def test_eager_steps_are_padded_like_graphs(on_the_gpu, folder, plain):
    with load(folder, enforce_eager=True) as llm:
        for _ in range(2):
            assert said(llm, GREEDY) == said(plain, GREEDY)
        runner = llm._engine.runner
        assert not runner.prompts._graphs
        assert not runner.graphs._graphs


def test_prompts_are_launched_while_the_tokens_before_are_on_their_way(on_the_gpu, folder, plain, monkeypatch):
    """More requests than rows, prompts in chunks: steps that mix both are launched ahead, too."""
    prompts = [[5, 6, 7] * n for n in (1, 2, 7, 3, 1)]
    each = [PENALISED.clone(max_tokens=n) for n in (5, 2, 3, 4, 1)]
    with load(folder, max_num_seqs=2, max_num_batched_tokens=8) as llm:
        runner, mixed = llm._engine.runner, []
        run = runner.run

        def watch(batch, schedule):
            mixed.append(runner.rows.num_pending[batch.rows].any() and batch.num_decodes < len(batch.rows))
            return run(batch, schedule)

        monkeypatch.setattr(runner, "run", watch)
        assert said(llm, each, prompts) == said(plain, each, prompts)
        assert any(mixed)


@pytest.mark.parametrize("kernels", ["triton", "fixed", ""], ids=["kernels", "deterministic", "torch"])
@pytest.mark.parametrize("budget", [None, 16], ids=["", "in chunks, beside who decodes"])
def test_numbers_that_broke_are_not_left_to_others(request, folder, plain, kernels, budget, monkeypatch):
    """Whoever left them: an answer, an embedding, a prompt that was aborted half computed, a token too many."""
    expected, broken = said(plain, GREEDY), [99] * 30
    if kernels:
        request.getfixturevalue("on_the_gpu")
    blocks = {"num_kv_blocks": 5, "block_size": 64} if kernels else {"num_kv_blocks": 8}  # kernels read whole tiles of 64 keys
    with load(folder, max_num_batched_tokens=budget, deterministic=kernels == "fixed", **blocks) as llm:
        engine, embedding = llm._engine, llm._engine.model.embedding
        run = engine.runner.run

        def checked(*args):
            result = run(*args)
            assert not engine.runner.kv_cache[:, :, 0].any(), "everybody reads the padding block"
            return result

        monkeypatch.setattr(engine.runner, "run", checked)
        embedding.weight[99] = float("nan")
        outputs = llm.generate([PROMPTS[0], broken, PROMPTS[2]], [GREEDY.clone(max_tokens=n) for n in (3, 2, 1)], use_tqdm=False)
        assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
        assert [outputs[i].outputs[0].token_ids for i in (0, 2)] == [expected[0], expected[2][:1]]
        assert llm.stats()["kv_blocks_cached"] == 0, "nor found again"
        assert said(llm, GREEDY) == expected
        with pytest.raises(EngineError, match="the model's numbers broke"):
            llm.embed([broken], use_tqdm=False)
        assert said(llm, GREEDY) == expected
        half = Request("half", np.array([3] * 10 + broken, np.int32), GREEDY, max_total=60)
        engine.add(half)
        engine.step()
        engine.abort([half])
        llm.reset_prefix_cache()
        assert said(llm, GREEDY) == expected
        engine.pool._free = OrderedDict.fromkeys(reversed(engine.pool._free))  # who comes now gets others' blocks
        assert said(llm, GREEDY) == expected
