"""Timelines: arithmetic on spans made by hand, recordings of a real engine on a CPU, events of a GPU that is stood in for."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmkit import LLM, SamplingParams, Timeline
from llmkit.errors import ConfigError, InvalidRequestError, LlmkitError
from llmkit.kernel_names import FAMILIES, family, short_name
from llmkit.profiling import _of_device, _Seen, _Watch
from llmkit.timeline import COPY, Gap, Kernel, Span, Step, load_timelines, save_timelines

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SPANS = [Span(0, 10, "_a"), Span(4, 4, "_b"), Span(8, 6, "_b"), Span(20, 5, "_a"), Span(30, 10, "Memcpy DtoH (x)", COPY)]
STEPS = [Step(0, 15, 7, 0), Step(15, 26, 2, 2), Step(26, 40, 2, 2)]
BY_HAND = Timeline("m", "a GPU", "bfloat16", True, SPANS, STEPS, [[1, 2], [3, 4]], 0.01, {2: 5.0})


# ---- arithmetic


def test_overlapping_spans_are_counted_once_and_for_the_one_that_began_first():
    assert BY_HAND.wall == 40
    assert BY_HAND.busy == (14 + 5 + 10) / 40
    assert BY_HAND.by_kernel() == {"a": Kernel(2, 15), "copy to the host": Kernel(1, 10), "b": Kernel(2, 4)}
    assert BY_HAND.gaps == [Gap(14, 6), Gap(25, 5)]
    assert BY_HAND.per_step == pytest.approx(0.040 / 3)


def test_decode_steps_are_cut_out_and_time_begins_anew():
    decode = BY_HAND.decode()
    assert decode.spans == [Span(0, 5, "_a"), Span(10, 10, "Memcpy DtoH (x)", COPY)]
    assert decode.steps == [Step(-5, 6, 2, 2), Step(6, 20, 2, 2)]
    assert BY_HAND.decode(first=1, count=1).spans == [Span(0, 10, "Memcpy DtoH (x)", COPY)]
    assert decode.plain_busy == pytest.approx(15 / 20), "15 µs of kernels in two steps of 10 µs"
    assert replace(decode, plain_ms=0.001).plain_busy == 1
    assert replace(decode, plain_ms=None).plain_busy is None


def test_the_longest_run_of_decode_steps_counts():
    mixed = replace(BY_HAND, steps=[Step(0, 1, 1, 1), Step(1, 2, 9, 1), Step(2, 3, 2, 2), Step(3, 4, 2, 2), Step(4, 5, 5, 0)])
    assert len(mixed.decode().steps) == 2
    with pytest.raises(LlmkitError, match="no decode steps from number 2 on in this recording of 5 steps"):
        mixed.decode(first=2)


def test_nothing_is_nothing():
    empty = replace(BY_HAND, spans=[], steps=[])
    assert (empty.wall, empty.busy, empty.per_step, empty.gaps, empty.by_kernel()) == (0, 0, 0, [], {})
    assert "0 spans" in str(empty)


def test_text_shows_how_full_the_time_was():
    lines = str(BY_HAND).splitlines()
    assert lines[0] == "m on a GPU, bfloat16, CUDA graphs"
    assert lines[1] == "5 spans in 0.04 ms, busy 72%; 3 steps of 0.01 ms, 2 spans each"
    assert lines[2] == f"0 ms ▕{'█' * 28}{' ' * 12}{'█' * 10}{' ' * 10}{'█' * 20}▏ 0.04 ms"
    assert lines[3].split() == ["0.01", "ms", "2", "×", "a"]
    assert replace(BY_HAND, graphs=False).title.endswith("no graphs")
    assert replace(BY_HAND, graphs=False, device="cpu").title == "m on cpu, bfloat16"


def test_a_notebook_gets_a_picture_and_a_terminal_text():
    bundle = BY_HAND._repr_mimebundle_(include=None, exclude=None)
    assert bundle["text/plain"] == str(BY_HAND) == repr(BY_HAND)
    assert "<svg" in bundle["image/svg+xml"]


# ---- files


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_saved_and_loaded_it_is_the_same(tmp_path, name):
    BY_HAND.save(tmp_path / name)
    assert Timeline.load(tmp_path / name) == BY_HAND
    assert (tmp_path / name).read_bytes()[:1] == (b"\x1f" if name.endswith("gz") else b"{")


def test_one_file_holds_several(tmp_path):
    save_timelines({"one": BY_HAND, "two": BY_HAND.decode()}, tmp_path / "t.json")
    assert load_timelines(tmp_path / "t.json") == {"one": BY_HAND, "two": BY_HAND.decode()}
    with pytest.raises(ConfigError, match=r"holds 2 timelines: one, two"):
        Timeline.load(tmp_path / "t.json")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": "else"}', b"\x1f\x8bno", b"\xff\xfe"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.json is no timeline"):
        Timeline.load(tmp_path / "t.json")


# ---- recording


@pytest.fixture(scope="module")
def llm(dummy_folder):
    with LLM(dummy_folder, load_format="dummy", max_model_len=256) as model:
        yield model


PROMPTS = [[5, 6, 7, 8] * 10, [9, 10, 11]]


def tokens(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_a_recording_changes_no_token_and_knows_its_steps(llm, capfd):
    expected = tokens(llm)
    capfd.readouterr()
    seen = Timeline.record(llm, PROMPTS, GREEDY)
    assert capfd.readouterr() == ("", ""), "the profiler is quiet"
    assert seen.tokens == expected == tokens(llm)
    assert [(s.tokens, s.decodes) for s in seen.steps] == [(43, 0)] + [(2, 2)] * 5, "nothing was cached, though asked before"
    assert (seen.model, seen.device, seen.dtype, seen.graphs, seen.capture_ms) == \
        (llm.config.model.rpartition("/")[2], "cpu", "bfloat16", False, {})  # fmt: skip
    assert seen.plain_ms is not None
    assert 0 < seen.busy < 1
    assert seen.plain_ms > 0


def test_spans_are_what_steps_call_themselves(llm):
    seen = Timeline.record(llm, PROMPTS, GREEDY, warm=False)
    assert seen.plain_ms is None
    assert seen.spans[0].start == 0
    assert all(a.end <= b.start for a, b in zip(seen.spans, seen.spans[1:])), "no operator within another"
    inside = [sum(step.start <= s.start < step.end for s in seen.spans) for step in seen.steps]
    assert sum(inside) == len(seen.spans)
    assert len(set(inside[2:])) == 1, "decode steps do the same"
    assert sum(k.count for k in seen.by_kernel().values()) == len(seen.spans)


def test_the_engine_is_left_as_it_was(llm):
    Timeline.record(llm, PROMPTS, GREEDY, warm=False)
    assert "step" not in vars(llm._engine)
    with pytest.raises(InvalidRequestError):
        Timeline.record(llm, [[]], GREEDY)
    assert "step" not in vars(llm._engine)
    assert llm.stats()["running"] == 0


def test_steps_that_wait_for_compilers_do_not_count_as_the_plain_time():
    watch = _Watch(seen=[_Seen(0.0, 9, 0, True), _Seen(5.0, 2, 2, True), _Seen(5.1, 2, 2, True), _Seen(5.2, 2, 2, True),
                         _Seen(5.3, 2, 2, True), _Seen(8.3, 2, 2, True)])  # fmt: skip
    assert watch.decode_ms() == pytest.approx(100)
    assert _Watch().decode_ms() is None


# ---- what the profiler says of a GPU

TO_HOST = "Memcpy DtoH (Device -> Pinned)"


def event(name: str, start: float, device: str = "CUDA", note: bool = False) -> Any:
    return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), is_user_annotation=note,
                           time_range=SimpleNamespace(start=start, end=start + 2))  # fmt: skip


EVENTS = [event("_norm", 20), event("_product", 10), event(TO_HOST, 14), event("cudaGraphLaunch", 3, "CPU"),
          event("a step", 1, note=True), event("Memcpy HtoD (Pinned -> Device)", 18), event(TO_HOST, 24),
          event("Memcpy DtoH (Device -> Pageable)", 40)]  # fmt: skip


def test_device_events_become_spans_and_copies_of_tokens_end_steps():
    spans, steps = _of_device(EVENTS, [_Seen(0, 9, 0, True), _Seen(0, 2, 2, True)])
    assert [s.start for s in spans] == [10, 14, 18, 20, 24, 40]
    assert [s.kind for s in spans] == ["kernel", "copy", "copy", "kernel", "copy", "copy"]
    assert steps == [Step(10, 16, 9, 0), Step(16, 26, 2, 2)]


def test_a_step_that_samples_nothing_ends_with_the_next_one():
    assert _of_device(EVENTS, [_Seen(0, 8), _Seen(0, 9, 0, True), _Seen(0, 2, 2, True)])[1][0] == Step(10, 16, 17, 0)


def test_what_the_profiler_missed_was_the_beginning():
    seen = [_Seen(0, 30, 0, True), _Seen(0, 9, 0, True), _Seen(0, 2, 2, True)]
    assert _of_device(EVENTS, seen)[1] == [Step(10, 16, 9, 0), Step(16, 26, 2, 2)]
    assert _of_device([], seen) == ([], [])


@pytest.mark.parametrize(("name", "short", "does"), [
    ("_product_1", "product_1", "products"),
    ("_decode", "decode", "attention"),
    ("_embed_rms_norm", "embed_rms_norm", "norm"),
    ("_best_of_all", "best_of_all", "sampling"),
    ("Memcpy DtoH (Device -> Pinned)", "copy to the host", "copies"),
    ("Memcpy HtoD (Pinned -> Device)", "copy to the device", "copies"),
    ("Memset (Device)", "memset", "copies"),
    ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "cuBLAS 64x8", "products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", "cuBLAS 64x64x64", "products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_32x6>(P)", "cutlass 128x64", "products"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul> >(int, X)",
     "elementwise fill", "other"),
    ("void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long>(int)", "indexSelectSmallIndex", "other"),
    ("aten::linear", "linear", "products"),
    ("mkldnn::_linear_pointwise", "linear_pointwise", "products"),
    ("", "", "other"),
])  # fmt: skip
def test_kernels_have_short_names_and_families(name, short, does):
    assert short_name(name) == short
    assert family(short) == does
    assert does in FAMILIES


# ---- a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_run_the_same_kernels_with_fewer_gaps(tmp_path):
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 512, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1408, "vocab_size": 5000,
              "max_position_embeddings": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = {}
    for eager in (True, False):
        with LLM(tmp_path, load_format="dummy", skip_tokenizer_init=True, enforce_eager=eager, gpu_memory_utilization=0.3) as llm:
            found[eager] = Timeline.record(llm, PROMPTS, GREEDY.clone(max_tokens=20, detokenize=False))
    eager, graphs = found[True], found[False]
    assert eager.tokens == graphs.tokens
    assert [s.tokens for s in eager.steps] == [s.tokens for s in graphs.steps] == [43] + [2] * 19
    assert (eager.graphs, graphs.graphs, eager.capture_ms, list(graphs.capture_ms)) == (False, True, {}, [2])
    eager, graphs = eager.decode(4, 6), graphs.decode(4, 6)
    assert {n: k.count for n, k in eager.by_kernel().items()} == {n: k.count for n, k in graphs.by_kernel().items()}
    assert graphs.busy > eager.busy
    assert graphs.plain_ms < eager.plain_ms
