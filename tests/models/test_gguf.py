"""GGUF conversion against independent truth: the gguf library's dequantize, transformers' model and tokenizer."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from llmkit.errors import TokenizerError, UnsupportedModelError, WeightsError
from llmkit.models import gguf as converter
from llmkit.models.gguf import convert_gguf
from llmkit.models.gguf_file import GGUFFile
from llmkit.models.weights import open_weights

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 2
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = "<think>"


def byte_vocabulary() -> list[str]:
    """The 256 byte-level symbols, then two merges, as GPT-2 spells them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others))), "he", "Ġt"]


def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    layer = {
        "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_down.weight": (HIDDEN, FFN),
    }  # fmt: skip
    if arch == "phi3":
        layer |= {"attn_qkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), "ffn_up.weight": (2 * FFN, HIDDEN)}
    else:
        layer |= {"attn_q.weight": (HEADS * HEAD_DIM, HIDDEN), "ffn_gate.weight": (FFN, HIDDEN), "ffn_up.weight": (FFN, HIDDEN)}
        layer |= {f"attn_{x}.weight": (KV_HEADS * HEAD_DIM, HIDDEN) for x in "kv"}
    if arch == "qwen2":
        layer |= {"attn_q.bias": (HEADS * HEAD_DIM,)} | {f"attn_{x}.bias": (KV_HEADS * HEAD_DIM,) for x in "kv"}
    if arch == "qwen3":
        layer |= {f"attn_{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
    top = {"token_embd.weight": (len(MARKERS) + 259, HIDDEN), "output_norm.weight": (HIDDEN,)}
    return top | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def write_gguf(path: Path, arch="llama", qtype=Q.F32, extra=None, tensors=None, pre="smollm", **options) -> dict[str, np.ndarray]:
    """A tiny but complete GGUF file; returns its stored tensors, dequantised by the gguf library."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            key, value
        )
    (add_sentencepiece if pre is None else add_byte_level)(writer, pre)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in options.items():
        getattr(writer, f"add_{name}")(value)
    stored, random = {}, np.random.default_rng(0)
    for name, shape in (shapes(arch) | (tensors or {})).items():
        value = shape if isinstance(shape, np.ndarray) else random.standard_normal(shape, np.float32)
        kind = qtype if value.ndim > 1 else Q.F32
        packed = pack(value, kind, random)
        writer.add_tensor(name, packed, raw_dtype=kind)
        stored[name] = gguf.dequantize(packed, kind).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_byte_level(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens = [*MARKERS, *byte_vocabulary(), THINK]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(MARKERS) + [1] * (len(tokens) - len(MARKERS) - 1) + [4])
    writer.add_token_merges(["h e", "Ġ t"])


def add_sentencepiece(writer: gguf.GGUFWriter, _: None) -> None:
    pieces = ["▁", "h", "e", "he", "▁he"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces])
    writer.add_token_scores([0.0] * 259 + [-5.0, -4.0, -3.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_unk_token_id(0)


def pack(value: np.ndarray, kind: Q, random: np.random.Generator) -> np.ndarray:
    """Quantised bytes. The library cannot quantise to K types: there any bytes with small half-float scales are a valid block."""
    try:
        return gguf.quantize(value, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (value.shape[0], value.shape[1] // block, size), np.uint8)
        scales = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}[kind]
        for at in scales:
            raw[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return raw.reshape(value.shape[0], -1)


def rotary_halves(stored: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's pairing by its definition: stored rows 2j and 2j+1 of a head were rows j and j + half."""
    out, dim = np.empty_like(stored), stored.shape[0] // heads
    for head in range(heads):
        for j in range(dim // 2):
            out[head * dim + j] = stored[head * dim + 2 * j]
            out[head * dim + j + dim // 2] = stored[head * dim + 2 * j + 1]
    return out


def expected(stored: dict[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), LAYERS).mapping
    ours = {}
    for hf, (_, ggml) in names.items():
        if hf.startswith(("model.", "lm_head")) and not hf.startswith("model.model."):
            for kind in ("weight", "bias"):
                if (name := f"{ggml}.{kind}") in stored:
                    heads = (
                        {"attn_q": HEADS, "attn_k": KV_HEADS}.get(ggml.split(".")[-1]) if arch in ("llama", "smollm3") else None
                    )
                    ours.setdefault(name, []).append(
                        (f"{hf}.{kind}", rotary_halves(stored[name], heads) if heads else stored[name])
                    )
    return {hf: value for candidates in ours.values() for hf, value in candidates}


@pytest.mark.parametrize(
    "kind",
    [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K],
    ids=lambda k: k.name,
)
def test_every_type_becomes_what_the_library_dequantises(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(converter, "CHUNK", 5000)  # rows are taken in several odd-sized blocks
    stored = write_gguf(tmp_path / "m.gguf", "llama", kind)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    source, truth = open_weights(folder), expected(stored, "llama")
    dtype = {Q.F32: torch.float32, Q.F16: torch.float16}.get(kind, torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert set(source.names()) <= set(truth)
    assert len(source.names()) == len(stored)
    for name in source.names():
        assert torch.equal(source.get(name), torch.from_numpy(truth[name]).to(dtype)), name


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "smollm3"])
def test_transformers_loads_the_folder_and_finds_every_weight(tmp_path, arch):
    from transformers import AutoModelForCausalLM

    stored = write_gguf(tmp_path / "m.gguf", arch)
    model, info = AutoModelForCausalLM.from_pretrained(
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out"), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    truth, weights = expected(stored, arch), model.state_dict()
    assert all(np.array_equal(weights[n].numpy(), truth[n]) for n in weights if n in truth)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    config = model.config
    assert (config.rms_norm_eps, config.max_position_embeddings, config.vocab_size) == (1e-6, 128, len(MARKERS) + 259)
    assert config.rope_parameters["rope_theta"] == 50000.0
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_config_of_untied_mistral_with_scaling(tmp_path):
    extra = {"llama.attention.sliding_window": 32, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    write_gguf(tmp_path / "m.gguf", extra=extra, tensors={"output.weight": (262, HIDDEN)}, eot_token_id=0)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["tie_word_embeddings"]) == ("mistral", 32, False)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert open_weights(folder).has("lm_head.weight")


def test_llama3_rope_factors_become_config_and_foreign_ones_are_refused(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama import LlamaConfig

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters={"rope_theta": 50000.0, **scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 50000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)})
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    assert not any("rope" in name for name in open_weights(folder).names())
    write_gguf(tmp_path / "n.gguf", tensors={"rope_freqs.weight": np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)})
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        convert_gguf(tmp_path / "n.gguf", tmp_path / "out2")


TEXTS = [
    "Hello the world",
    "你好，世界",
    "def f(x):\n\treturn x ** 2\n",
    "🙂 naïve café",
    "<|im_start|>user\nhe<|im_end|>\n",
    "",
    "a <think> b 12",
]


def test_tokenizer_equals_transformers_own_reading(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf")
    ours = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours("<|im_start|>")["input_ids"] == [1]
    assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert ours.decode([1, *ours(THINK)["input_ids"]], skip_special_tokens=True) == THINK
    assert ours.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "  12", ["  ", "1", "2"]),  # every digit apart, so the spaces stay together
        ("default", "  12", [" ", " 12"]),
        ("llama-bpe", "a12345 I'LL", ["a", "123", "45", " I", "'LL"]),
        ("qwen2", "a123 b", ["a", "1", "2", "3", " b"]),
        ("tekken", "helloWorld 12", ["hello", "World", " ", "1", "2"]),
        ("gpt-4o", "helloWorld's/\n", ["hello", "World's", "/\n"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_name_says(tmp_path, pre, text, pieces):
    from tokenizers import Tokenizer

    write_gguf(tmp_path / "m.gguf", pre=pre)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    cut = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in cut] == pieces


def test_sentencepiece_vocabulary(tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf", pre=None)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    assert tokenizer("he")["input_ids"] == [1, 263]  # <s>, which llama.cpp adds unless the file says no; ▁he
    text = "he 好🙂\the"
    ids = tokenizer(text)["input_ids"]
    assert {3 + b for b in "好".encode()} <= set(ids)  # unknown characters become their bytes
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_bos_is_added_when_the_file_says_so(tmp_path):
    from tokenizers import Tokenizer

    write_gguf(tmp_path / "m.gguf", add_bos_token=True)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("he").ids[0] == 1
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_unknown_pre_tokenizer_and_unknown_architecture_are_refused_with_the_list(tmp_path):
    write_gguf(tmp_path / "m.gguf", pre="martian")
    with pytest.raises(TokenizerError, match=r"(?s)'martian'.*qwen2"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    gguf_writer = gguf.GGUFWriter(tmp_path / "n.gguf", "mamba")
    gguf_writer.write_header_to_file()
    gguf_writer.write_kv_data_to_file()
    gguf_writer.close()
    with pytest.raises(UnsupportedModelError, match=r"(?s)'mamba'.*llama, phi3, qwen2, qwen3, smollm3"):
        convert_gguf(tmp_path / "n.gguf", tmp_path / "out")


def test_a_type_that_cannot_be_dequantised_names_file_tensor_and_type(tmp_path):
    write_gguf(tmp_path / "m.gguf", qtype=Q.Q8_0)
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.0.attn_output.weight"
    at = data.index(name) + len(name) + 4 + 16  # after the name: rank, two dimensions, then the type
    (tmp_path / "m.gguf").write_bytes(data[:at] + int(Q.Q8_K).to_bytes(4, "little") + data[at + 4 :] + b"\0" * 99999)
    with pytest.raises(WeightsError, match=r"m\.gguf: tensor 'blk\.0\.attn_output\.weight' has the type Q8_K"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_files_fail_at_every_cut_and_leave_nothing(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    for keep in (0, 10, 24, 500, 3000, len(data) // 2, len(data) - 1):
        (tmp_path / "m.gguf").write_bytes(data[:keep])
        with pytest.raises(WeightsError, match=r"m\.gguf"):
            convert_gguf(tmp_path / "m.gguf", tmp_path / "cut" / "out")
    assert not [p for p in (tmp_path / "cut").glob("*") if not p.name.endswith(".lock")]


def test_metadata_equals_the_librarys_reader(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    ours, theirs = GGUFFile(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {n: (t.type_id, t.start) for n, t in ours.tensors.items()} == {
        t.name: (t.tensor_type, t.data_offset) for t in theirs.tensors
    }


def test_the_cached_folder_is_reused_and_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "m.gguf")
    first = convert_gguf(tmp_path / "m.gguf")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert first.is_relative_to(tmp_path / "home" / "gguf")
    assert convert_gguf(tmp_path / "m.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(tmp_path / "m.gguf", qtype=Q.F16)
    assert convert_gguf(tmp_path / "m.gguf") != first


def test_two_at_once_convert_once(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    plain, runs = converter._write, []

    def counted(*args):
        runs.append(args)
        time.sleep(0.3)
        plain(*args)

    monkeypatch.setattr(converter, "_write", counted)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: convert_gguf(tmp_path / "m.gguf", tmp_path / "out"), range(2)))
    assert folders == [tmp_path / "out"] * 2
    assert len(runs) == 1


def _slow_conversion(path: str, out: str) -> None:
    """Convert, but stop in the middle of the weights until killed."""
    plain = converter._write_tensor

    def write_then_hang(*args):
        plain(*args)
        Path(out).with_suffix(".reached").touch()
        time.sleep(60)

    converter._write_tensor = write_then_hang
    convert_gguf(Path(path), Path(out))


def test_kill_in_the_middle_leaves_nothing_that_loads_and_the_next_call_cleans_up(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    child = multiprocessing.get_context("fork").Process(
        target=_slow_conversion, args=(str(tmp_path / "m.gguf"), str(tmp_path / "out"))
    )
    child.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "out.reached").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.partial-*"))
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not list(tmp_path.glob(".out.partial-*"))
    assert len(open_weights(folder).names()) == len(shapes("llama"))


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["diary.txt"]


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"(?s)needs .* MB .*only 1 B are free.*LLMKIT_HOME"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
