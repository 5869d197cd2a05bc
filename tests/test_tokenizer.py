"""Token ids must be those of transformers' AutoTokenizer, whichever way the folder is read."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Rust

from llmkit.errors import InvalidRequestError, TokenizerError
from llmkit.tokenizer import Tokenizer
from llmkit.tokenizer_pipelines import QWEN2_WORDS

CORPUS = [
    "Hello world, how are you? I'm fine, thanks: 12345 times.",
    "你好，世界！今天天气怎么样？我很好，谢谢。",
    "Family 👨‍👩‍👧‍👦 and flags 🇨🇳, café naïve coöperate.",
    "def f(x):\n    return x + 1\n\n",
] * 4
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\nand lines\t",
    "你好，世界",
    "👨‍👩‍👧‍👦 cafe\u0301",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>Hello</s> again<s>\nx",
    "the <tool> is 12345",
]
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(normalizer=None, words=None, specials=CHAT) -> Rust:
    rust = Rust(models.BPE())
    if normalizer is not None:
        rust.normalizer = normalizer
    rust.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=specials))
    return rust


def qwen2() -> Rust:
    split = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(normalizers.NFC(), pre_tokenizers.Sequence([split, plain]))


def llama2() -> Rust:
    """SentencePiece style: ▁ for spaces, bytes as <0xE4>, a dummy space in front, bos added."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Rust(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(CORPUS[:1] * 2, trainers.BpeTrainer(vocab_size=120, special_tokens=special))
    model = json.loads(trained.to_str())["model"]
    tokens = special + [f"<0x{b:02X}>" for b in range(256)] + [t for t in model["vocab"] if t not in special]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [tuple(m) for m in model["merges"]]
    rust = Rust(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.add_special_tokens(special)
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return rust


def save(folder: Path, rust: Rust, config: dict, model_type: str | None = None) -> Path:
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_same_as_auto(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    ours, auto = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special) == auto.encode(text, add_special_tokens=special), text
        ids = ours.encode(text)
        for skip in (True, False):
            theirs = auto.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == theirs
    assert ours.vocab_size == len(auto)
    assert ours.special_tokens == auto.special_tokens_map
    assert (ours.bos_token, ours.eos_token, ours.eos_token_id) == (auto.bos_token, auto.eos_token, auto.eos_token_id)
    assert ours.special_ids >= set(auto.all_special_ids)
    return ours


IM_END = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


def gemma() -> Rust:
    """As llama2, with Gemma's special tokens, and with the words' boundaries inside tokens."""
    rust = llama2()
    rust.add_special_tokens(["<bos>", "<eos>", "<pad>", "<mask>"])
    rust.normalizer = normalizers.Replace(" ", "▁")
    rust.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    rust.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", rust.token_to_id("<bos>"))])
    return rust


def more_merging(build) -> Rust:
    """A file whose own flags would give other ids."""
    rust = build()
    rust.model.fuse_unk, rust.model.byte_fallback, rust.model.ignore_merges = False, False, True
    rust.add_tokens([AddedToken("two  spaces", normalized=True)])
    return rust


FOLDERS = {  # name -> (rust tokenizer, tokenizer_config, model_type)
    "generic": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", **IM_END}, "llama"),
    "generic in a qwen2 folder": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", **IM_END}, "qwen2"),
    "generic in a qwen3 folder": (byte_level, {"tokenizer_class": "PreTrainedTokenizerFast", **IM_END}, "qwen3"),
    "no class": (byte_level, IM_END, "llama"),
    "llama3": (byte_level, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<|endoftext|>", **IM_END}, "llama"),
    "gpt2": (byte_level, {"tokenizer_class": "GPT2Tokenizer", **IM_END}, "llama"),
    "gpt2 of another build": (qwen2, {"tokenizer_class": "GPT2TokenizerFast", **IM_END}, "llama"),
    "gpt2 with a space in front": (byte_level, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, **IM_END}, "llama"),
    "qwen2": (qwen2, {"tokenizer_class": "Qwen2Tokenizer", **IM_END}, "qwen2"),
    "qwen2 adding bos": (qwen2, {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True, **IM_END}, "qwen3"),
    "qwen2 without NFC": (byte_level, {"tokenizer_class": "LlamaTokenizerFast", **IM_END}, "qwen2"),
    "qwen2 with other flags": (lambda: more_merging(qwen2), {"tokenizer_class": "Qwen2Tokenizer", **IM_END}, "qwen2"),
    "llama2": (llama2, LLAMA, "llama"),
    "llama2 legacy": (llama2, LLAMA | {"legacy": True}, "llama"),
    "llama2 silent": (llama2, {"tokenizer_class": "LlamaTokenizer"}, "llama"),
    "llama2 without a space in front": (llama2, LLAMA | {"add_prefix_space": False}, "llama"),
    "llama2 with other flags": (lambda: more_merging(llama2), LLAMA, "llama"),
    "llama2 no bos": (llama2, {n: v for n, v in LLAMA.items() if n != "bos_token"} | {"add_bos_token": False}, "llama"),
    "mistral": (llama2, LLAMA, "mistral"),
    "phi3": (llama2, LLAMA, "phi3"),
    "gemma": (gemma, {"tokenizer_class": "GemmaTokenizer"}, "gemma2"),
    "gemma with some named": (gemma, {"tokenizer_class": "GemmaTokenizerFast", "unk_token": "<unk>"}, "gemma3_text"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_auto_tokenizer_without_importing_it(name, tmp_path, monkeypatch):
    build, config, model_type = FOLDERS[name]
    used = []
    monkeypatch.setattr("llmkit.tokenizer._from_transformers", _spy("llmkit.tokenizer", "_from_transformers", used))
    assert_same_as_auto(save(tmp_path, build(), config, model_type))
    assert not used


def test_a_class_that_is_not_known_here_is_read_by_transformers(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr("llmkit.tokenizer._from_transformers", _spy("llmkit.tokenizer", "_from_transformers", used))
    assert_same_as_auto(save(tmp_path, byte_level(), {"tokenizer_class": "GPTNeoXTokenizer", **IM_END}, "gpt_neox"))
    assert used


def test_tokens_of_the_file_that_the_config_does_not_list(tmp_path):
    """A class that builds its pipeline anew adds what the config lists, and nothing of the file."""
    listed = {str(i): {"content": t, "special": True} for i, t in enumerate(["<unk>", "<s>"])}
    assert_same_as_auto(save(tmp_path, llama2(), LLAMA | {"added_tokens_decoder": listed}, "llama"))


def _spy(module: str, name: str, calls: list):
    original = getattr(sys.modules[module], name)
    return lambda *args: (calls.append(args), original(*args))[1]


def test_added_tokens_of_the_config_alone(tmp_path):
    rust = byte_level()
    size = rust.get_vocab_size()
    added = {
        str(size): {"content": "<tool>", "special": False, "normalized": False, "lstrip": True},
        str(size + 1): {"content": "<s>", "special": True, "normalized": False},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, "bos_token": "<s>", **IM_END}
    ours = assert_same_as_auto(save(tmp_path, rust, config | {"additional_special_tokens": ["</s>"]}))
    assert ours.id_of("<tool>") == size
    assert size not in ours.special_ids
    assert ours.id_of("</s>") in ours.special_ids


def test_special_tokens_map_of_old_folders(tmp_path):
    save(tmp_path, byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast"})
    token = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token, "bos_token": "<|im_start|>"}))
    assert assert_same_as_auto(tmp_path).eos_token == "<|im_end|>"


def test_saved_truncation_and_padding_are_off(tmp_path):
    rust = byte_level()
    rust.enable_truncation(3)
    rust.enable_padding(length=64)
    ours = Tokenizer.from_folder(save(tmp_path, rust, IM_END))
    assert ours.decode(ours.encode(CORPUS[0])) == CORPUS[0]
    assert len(ours.encode("a")) == 1


def test_vocab_and_merges_without_tokenizer_json(tmp_path):
    qwen2().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", **IM_END}))
    assert json.loads(assert_same_as_auto(tmp_path).backend_json())["model"]["type"] == "BPE"


def test_python_only_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "he@@": 1, "llo": 2, "llo</w>": 3, "wo@@": 4, "y": 5}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl l\nll o</w>\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"}))
    ours = Tokenizer.from_folder(tmp_path)
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(str(tmp_path))
    assert ours.encode_batch(["hello y", "y"]) == [auto.encode("hello y"), auto.encode("y")]
    assert ours.decode([5, 999]) == auto.decode([5])
    assert (ours.token_text(5), ours.token_bytes(5), ours.id_of("y"), ours.id_of("zz")) == ("y", None, 5, None)
    with pytest.raises(TokenizerError, match="Python only"):
        ours.backend_json()


def test_plain_folder_needs_no_transformers(tmp_path):
    save(tmp_path, qwen2(), {"tokenizer_class": "Qwen2Tokenizer", **IM_END}, "qwen2")
    code = (
        "import sys; from llmkit.tokenizer import Tokenizer; "
        f"Tokenizer.from_folder({str(tmp_path)!r}).encode('hi'); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({"chat_template.jinja": "A"}, {"chat_template": "B"}, "A"),
        ({}, {"chat_template": "B"}, "B"),
        ({"chat_template.json": '{"chat_template": "C"}'}, {}, "C"),
        ({}, {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}, None),
        ({}, {}, "none"),
    ],
)
def test_chat_template_sources(tmp_path, files, config, expected):
    save(tmp_path, byte_level(), IM_END | config)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    template = Tokenizer.from_folder(tmp_path).chat_template
    assert template == {"A": "A", "B": "B", "C": "C", None: {"default": "D", "tool_use": "T"}, "none": None}[expected]


def test_named_template_files(tmp_path):
    save(tmp_path, byte_level(), IM_END)
    (tmp_path / "chat_template.jinja").write_text("main")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert Tokenizer.from_folder(tmp_path).chat_template == {"default": "main", "tool_use": "tools"}


def test_bytes_and_text_of_tokens(tmp_path):
    ours = Tokenizer.from_folder(save(tmp_path, byte_level(), IM_END))
    for text in ("👨‍👩‍👧‍👦 你好 café", " Hello"):
        ids = ours.encode(text)
        assert b"".join(ours.token_bytes(i) or b"" for i in ids) == text.encode()
    assert ours.token_text(ours.encode(" world")[0])[0] == " "
    assert ours.token_text(ours.id_of("<|im_end|>") or 0) == "<|im_end|>"
    assert (ours.token_bytes(10**6), ours.token_text(10**6), ours.decode([10**6])) == (None, "", "")


def test_bytes_of_sentencepiece_tokens(tmp_path):
    ours = Tokenizer.from_folder(save(tmp_path, llama2(), {"eos_token": "</s>"}))
    assert ours.token_bytes(3 + 0xE4) == b"\xe4"
    assert ours.token_text(3 + 0xE4) == "\ufffd"
    assert ours.token_text(ours.encode(" world", False)[0]).startswith(" ")


def test_other_decoders_have_no_bytes(tmp_path):
    rust = Rust(models.WordPiece({"[UNK]": 0, "hello": 1, "##s": 2}, unk_token="[UNK]"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    rust.add_special_tokens([AddedToken("[UNK]")])
    ours = Tokenizer.from_folder(save(tmp_path, rust, {}))
    assert (ours.decode(ours.encode("hellos")), ours.token_bytes(1), ours.token_text(1)) == ("hellos", None, "hello")


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["a"], "\ud800", "a\udc00b"])
def test_bad_text_is_refused(tmp_path, bad):
    ours = Tokenizer.from_folder(save(tmp_path, byte_level(), IM_END))
    with pytest.raises(InvalidRequestError):
        ours.encode(bad)
    with pytest.raises(InvalidRequestError):
        ours.encode_batch(["fine", bad])


@pytest.mark.parametrize("bad", [[-1], ["x"], [1.5], [2**40]])
def test_bad_ids_are_refused(tmp_path, bad):
    with pytest.raises(InvalidRequestError, match="token ids"):
        Tokenizer.from_folder(save(tmp_path, byte_level(), IM_END)).decode(bad)


def test_threads_share_one_tokenizer(tmp_path):
    ours = Tokenizer.from_folder(save(tmp_path, byte_level(), IM_END))
    expected = [ours.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ours.encode, TEXTS * 50)) == expected * 50


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(TokenizerError, match="not a folder"):
        Tokenizer.from_folder(tmp_path / "nothing")
    with pytest.raises(TokenizerError, match=r"the folder needs tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    save(tmp_path, byte_level(), {})
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match="not an object"):
        Tokenizer.from_folder(tmp_path)


def test_remote_code_is_named_in_the_hint(tmp_path):
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    with pytest.raises(TokenizerError, match="trust_remote_code=True"):
        Tokenizer.from_folder(tmp_path)


def test_missing_package_is_named_in_the_hint(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"no such model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    from transformers import AutoTokenizer

    def without_it(*_, **__):
        raise ImportError("LlamaTokenizer requires the SentencePiece library but it was not found in your environment")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", without_it)  # tiktoken, where installed, hides that this one is not
    with pytest.raises(TokenizerError, match=r"pip install sentencepiece"):
        Tokenizer.from_folder(tmp_path)
