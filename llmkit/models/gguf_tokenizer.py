"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json.

A GGUF names its vocabulary, merges and token types, and only the *name* of how text is cut before merging
(`tokenizer.ggml.pre`). The table below holds those cuts. An unknown name is refused: a wrong cut gives plausible but wrong ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.errors import TokenizerError
from llmkit.models.gguf_file import GGUFFile

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITAL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
TEKKEN = rf"{_CASED}|{_CAPITAL}|\p{{N}}|{_SLASH_TAIL}"
GPT4O = rf"{_CASED}{_ENDINGS}?|{_CAPITAL}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
GPT2, DIGITS = "gpt2", "digits"  # ByteLevel's own cut; the same after every digit was set apart

CUTS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"), LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), QWEN2),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
}
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Vocabularies in which a word that is a token is taken whole, without merging (`ignore_merges`)."""
STARTS_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")  # when the file does not say


def save_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of `file` into `folder`. TokenizerError for an unknown kind."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        _byte_level(file).save(str(folder / "tokenizer.json"))
    elif kind == "llama":
        _sentencepiece(file).save(str(folder / "tokenizer.json"))
    else:
        raise TokenizerError(
            f"{file.path}: tokenizer kind {kind!r} is not supported",
            "supported kinds: gpt2 (byte-level BPE), llama (sentencepiece)",
        )
    config = json.dumps(_config(file), ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


def _tokens(file: GGUFFile) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise TokenizerError(
            f"{file.path}: the file holds no vocabulary (tokenizer.ggml.tokens)", "pass tokenizer= with a folder that has one"
        )
    return tokens


def _byte_level(file: GGUFFile) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in CUTS:
        raise TokenizerError(
            f"{file.path}: pre-tokenizer {pre!r} is not known",
            f"known ones: {', '.join(sorted(CUTS))}; use the model's safetensors, or pass tokenizer= with its original tokenizer",
        )
    tokens = _tokens(file)
    merges = [tuple(m.split(" ", 1)) for m in file.metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS))
    if CUTS[pre] == QWEN2:
        tokenizer.normalizer = normalizers.NFC()  # as Qwen's own tokenizer.json does
    tokenizer.pre_tokenizer = _cut(CUTS[pre], bool(file.metadata.get("tokenizer.ggml.add_space_prefix", False)))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _ends(file)
    _add_whole_tokens(tokenizer, tokens, file.metadata.get("tokenizer.ggml.token_type", []))
    return tokenizer


def _cut(cut: str, prefix_space: bool) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if cut == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    if cut == DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(prefix_space)])
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(prefix_space, use_regex=False)]
    )


def _add_whole_tokens(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Markers such as <|im_start|> are matched whole. Control tokens are special (hidden from text), user-defined are text."""
    from tokenizers import AddedToken

    def of(kind: int, special: bool) -> list[Any]:
        return [AddedToken(token, normalized=False, special=special) for token, t in zip(tokens, types) if t == kind and token]

    tokenizer.add_special_tokens(of(CONTROL, True))
    tokenizer.add_tokens(of(USER_DEFINED, False))


def _ends(file: GGUFFile) -> Any:
    """The post-processor: BOS and EOS around the text, where the file asks for them."""
    from tokenizers import processors

    special = {role: _special(file, role) for role in ("bos", "eos") if _adds(file, role) and _special(file, role)}
    if not special:
        return processors.ByteLevel(trim_offsets=False)
    parts = [special.get("bos"), "$A", special.get("eos")]
    pairs = [(token, file.metadata[f"tokenizer.ggml.{role}_token_id"]) for role, token in special.items()]
    return processors.TemplateProcessing(single=[p for p in parts if p], special_tokens=pairs)


def _adds(file: GGUFFile, role: str) -> bool:
    """Whether the tokenizer puts BOS (EOS) before (after) a text; llama.cpp's defaults where the file is silent."""
    pre, kind = file.metadata.get("tokenizer.ggml.pre"), file.metadata.get("tokenizer.ggml.model")
    default = role == "bos" and (kind == "llama" or pre in STARTS_WITH_BOS)
    return bool(file.metadata.get(f"tokenizer.ggml.add_{role}_token", default))


def _special(file: GGUFFile, role: str) -> str | None:
    token_id, tokens = file.metadata.get(f"tokenizer.ggml.{role}_token_id"), _tokens(file)
    return tokens[token_id] if token_id is not None and 0 <= token_id < len(tokens) else None


def _sentencepiece(file: GGUFFile) -> Any:
    """transformers' reading: its rules for spaces differ by architecture and are nowhere in the file. Runs once, 4 s."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    return tokenizer.backend_tokenizer


def _config(file: GGUFFile) -> dict[str, Any]:
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokens = {f"{role}_token": _special(file, name) for role, name in roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(file, "bos"),
        "add_eos_token": _adds(file, "eos"),
        **{key: token for key, token in tokens.items() if token is not None},
        **({"chat_template": template} if (template := file.metadata.get("tokenizer.chat_template")) else {}),
    }
