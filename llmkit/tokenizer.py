"""Text to token ids and back: one `Tokenizer` per model folder.

A folder with tokenizer.json is read by the `tokenizers` library alone (about 0.1 s); transformers (2 s to import, up to 10 on a
cold machine) is called only for classes that are not known here. In all cases the ids are those of transformers' AutoTokenizer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from llmkit.errors import InvalidRequestError, TokenizerError
from llmkit.tokenizer_pipelines import fit_to_class, steps_of

ChatTemplates = str | dict[str, str] | None  # one template, or several by name ("default", "tool_use", ...)

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Backend(Protocol):
    """What `Tokenizer` asks of the library beneath: `RustBackend`, `SlowBackend` for the few without a Rust twin, `NoBackend`."""

    size: int
    special_ids: frozenset[int]

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def id_to_token(self, token_id: int, /) -> str | None: ...
    def token_to_id(self, token: str, /) -> int | None: ...


class RustBackend:
    """A `tokenizers.Tokenizer` that neither truncates nor pads; never changed after construction, so threads may share it."""

    def __init__(self, rust: tokenizers.Tokenizer) -> None:
        rust.no_truncation()
        rust.no_padding()
        self.rust, self.size = rust, rust.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, t in rust.get_added_tokens_decoder().items() if t.special)
        self.id_to_token, self.token_to_id = rust.id_to_token, rust.token_to_id

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # encode_batch_fast leaves out character offsets: same ids, half the time on long prompts
        return [e.ids for e in self.rust.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.rust.decode(ids, skip_special_tokens=skip_special_tokens)


class SlowBackend:
    """A Python-only tokenizer of transformers (or of the model's own code)."""

    def __init__(self, hf: Any) -> None:
        self._hf, self.size = hf, len(hf)
        self.special_ids = frozenset(hf.all_special_ids)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [self._hf.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        known = [i for i in ids if self.id_to_token(i) is not None]
        return self._hf.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def id_to_token(self, token_id: int) -> str | None:
        return self._hf.convert_ids_to_tokens(token_id) if 0 <= token_id < self.size else None

    def token_to_id(self, token: str) -> int | None:
        return self._hf.get_vocab().get(token)


class NoBackend:
    """Stands where there is no tokenizer: refuses text, and makes none."""

    size, special_ids = 0, frozenset[int]()

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if texts:
            raise InvalidRequestError(
                "this engine was started without a tokenizer (skip_tokenizer_init=True)",
                "give prompts as token ids, or start it with the tokenizer",
            )
        return []

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return ""

    def id_to_token(self, token_id: int) -> str | None:
        return None

    def token_to_id(self, token: str) -> int | None:
        return None


class Tokenizer:
    """Encodes, decodes, and knows the special tokens and chat templates of one model. Safe to share between threads.

    vocab_size: tokens including added ones (a model's embedding may have more rows). special_ids: ids that
    `skip_special_tokens` hides. special_tokens: name -> text ("bos_token" -> "<s>"), what chat templates see.
    """

    def __init__(self, backend: Backend, special_tokens: dict[str, str], chat_template: ChatTemplates = None) -> None:
        self._backend = backend
        self.special_tokens, self.chat_template = special_tokens, chat_template
        self.vocab_size, self.special_ids = backend.size, backend.special_ids
        self.bos_token, self.eos_token = special_tokens.get("bos_token"), special_tokens.get("eos_token")
        self.bos_token_id = None if self.bos_token is None else self.id_of(self.bos_token)
        self.eos_token_id = None if self.eos_token is None else self.id_of(self.eos_token)

    @classmethod
    def from_folder(cls, folder: str | Path, trust_remote_code: bool = False) -> Tokenizer:
        """Read a model folder. Raises TokenizerError when it holds no tokenizer, a broken one, or one that needs more."""
        folder = Path(folder)
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is not a folder", "give the model's folder, or an id to llmkit.download()")
        config = read_config(folder)
        backend = None if _wants_remote_code(config, trust_remote_code) else _plain_backend(folder, config)
        if backend is None:
            return _from_transformers(folder, trust_remote_code)
        return cls(backend, _special_texts(config), config.get("chat_template"))

    @classmethod
    def absent(cls) -> Tokenizer:
        """For engines that see token ids only: encoding text raises InvalidRequestError, decoding makes none."""
        return cls(NoBackend(), {})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises InvalidRequestError for what is not text (also lone surrogates)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, in parallel over the processor's cores."""
        texts = [_checked_text(t) for t in texts]
        return self._backend.encode(texts, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token (padding of the embedding) are silent."""
        try:
            return self._backend.decode(list(ids), skip_special_tokens)
        except (OverflowError, TypeError) as e:
            raise InvalidRequestError(f"token ids must be integers from 0 to {self.vocab_size - 1}: {e}") from e

    def id_of(self, token: str) -> int | None:
        """Id of a token by its exact spelling in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        """Printable text of one token (logprobs' decoded_token): bytes that are no whole character show as U+FFFD."""
        if self.byte_kind:
            return self.byte_table(skip_special_tokens=False)[token_id].decode("utf-8", "replace")
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self.special_ids:
            return token or ""
        return " " + token[1:].replace("▁", " ") if token.startswith("▁") else self.decode([token_id], False)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes one token stands for, or None when it is no token or its kind of tokenizer cannot say."""
        if not self.byte_kind or self._backend.id_to_token(token_id) is None:
            return None
        return self.byte_table(skip_special_tokens=False)[token_id]

    def backend_json(self) -> str:
        """tokenizer.json as text, for grammar engines. Raises TokenizerError where there is no Rust tokenizer."""
        if not isinstance(self._backend, RustBackend):
            what = "this tokenizer runs in Python only and has no tokenizer.json"
            raise TokenizerError(what if self.vocab_size else "there is no tokenizer", "structured outputs need one")
        return self._backend.rust.to_str()

    @functools.cached_property
    def byte_kind(self) -> str | None:
        """How tokens spell bytes: "byte_level" (GPT-2's alphabet), "byte_fallback" (▁ and <0xE4>), or None (unknown)."""
        return _byte_kind(self._decoder_steps)

    @functools.cached_property
    def strips_first_space(self) -> bool:
        """True when decoding drops one space at the start of the text (SentencePiece's dummy prefix)."""
        return any(step["type"] == "Strip" for step in self._decoder_steps)

    def byte_table(self, skip_special_tokens: bool) -> ByteTable:
        """id -> bytes; only for tokenizers with a `byte_kind`."""
        return self._hiding_table if skip_special_tokens else self._showing_table

    @functools.cached_property
    def _hiding_table(self) -> ByteTable:
        return ByteTable(self._backend.id_to_token, _SPELLINGS[self.byte_kind or ""], self.special_ids)

    @functools.cached_property
    def _showing_table(self) -> ByteTable:
        return ByteTable(self._backend.id_to_token, _SPELLINGS[self.byte_kind or ""], frozenset())

    @functools.cached_property
    def _decoder_steps(self) -> list[dict[str, Any]]:
        return steps_of(self._backend.rust.decoder, "decoders") if isinstance(self._backend, RustBackend) else []


# --- bytes of tokens ---------------------------------------------------------------------------------------------------


class ByteTable(dict[int, bytes]):
    """Token id -> bytes, filled as ids are met (a whole vocabulary of 150k would cost every start 0.1 s)."""

    def __init__(self, token_of: Callable[[int], str | None], spell: Callable[[str], bytes], hidden: frozenset[int]) -> None:
        super().__init__()
        self._token_of, self._spell, self._hidden = token_of, spell, hidden

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._hidden else self._token_of(token_id)
        self[token_id] = value = b"" if token is None else self._spell(token)
        return value


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte: Latin-1's printable ones are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(rest)}


_ALPHABET = _byte_level_alphabet()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[c] for c in token])
    except KeyError:  # an added token such as <｜begin▁of▁sentence｜>: it is written as it is
        return token.encode()


def _spell_byte_fallback(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


_SPELLINGS: dict[str, Callable[[str], bytes]] = {"byte_level": _spell_byte_level, "byte_fallback": _spell_byte_fallback}


def _byte_kind(steps: list[dict[str, Any]]) -> str | None:
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level"
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or (steps[0]["pattern"], steps[0]["content"]) != ({"String": "▁"}, " "):
        return None
    strip_one = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return "byte_fallback" if steps[3:] in ([], strip_one) else None


# --- reading a folder --------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json joined with special_tokens_map.json, the template files and config.json's model_type.

    Precedence is transformers': template files over the config's entry; special_tokens_map.json only counts in old folders
    that have no added_tokens_decoder.
    """
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json")
    config["chat_template"] = _read_templates(folder) or _named_templates(config.get("chat_template"))
    model = _read_json(folder / "config.json")
    config["model_type"] = model.get("model_type")
    config.setdefault("tokenizer_class", model.get("tokenizer_class"))
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise TokenizerError(f"{path} is not valid JSON: {e}", "download the model again") from e
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object", "download the model again")
    return value


def _read_templates(folder: Path) -> ChatTemplates:
    """Templates in files of their own: chat_template.jinja, additional_chat_templates/*.jinja, or chat_template.json."""
    named = {p.stem: p.read_text(encoding="utf-8") for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    main = folder / "chat_template.jinja"
    if main.is_file():
        named["default"] = main.read_text(encoding="utf-8")
    if not named:
        return _named_templates(_read_json(folder / "chat_template.json").get("chat_template"))
    return named["default"] if list(named) == ["default"] else named


def _named_templates(value: Any) -> ChatTemplates:
    """tokenizer_config.json writes several templates as [{"name": ..., "template": ...}]."""
    return {t["name"]: t["template"] for t in value} if isinstance(value, list) else value


def _wants_remote_code(config: dict[str, Any], trust_remote_code: bool) -> bool:
    return trust_remote_code and "AutoTokenizer" in (config.get("auto_map") or {})


def _plain_backend(folder: Path, config: dict[str, Any]) -> RustBackend | None:
    """tokenizer.json as it is, or None when there is none or transformers would rebuild it into something else."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        rust = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception for anything it cannot parse
        raise TokenizerError(f"{path} cannot be read: {e}", "download the model again, or upgrade tokenizers") from e
    if not fit_to_class(rust, config):
        return None
    rust.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add_tokens(rust, config)
    return RustBackend(rust)


def _add_tokens(rust: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that the config knows and tokenizer.json may lack, in the order in which transformers adds them."""
    listed = {int(i): _added_token(t) for i, t in (config.get("added_tokens_decoder") or {}).items()}
    rust.add_tokens([listed[i] for i in sorted(listed)])
    by_text = {t.content: t for t in listed.values()} or {t.content: t for t in rust.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
    wanted = [_added_token(t) for t in [*(v for k, v in config.items() if _is_named_token(k, v)), *extra]]
    rust.add_special_tokens([by_text.get(t.content, t) for t in wanted])


def _added_token(value: str | dict[str, Any]) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    flags = {k: v for k, v in value.items() if k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return tokenizers.AddedToken(value["content"], **flags)


def _is_named_token(key: str, value: Any) -> bool:
    return isinstance(value, str) if key not in _NAMED and key.endswith("_token") else key in _NAMED and value is not None


def _special_texts(config: dict[str, Any]) -> dict[str, str]:
    named = {k: v for k, v in config.items() if _is_named_token(k, v)}
    return {k: v if isinstance(v, str) else v["content"] for k, v in named.items()}


def _from_transformers(folder: Path, trust_remote_code: bool) -> Tokenizer:
    """Let AutoTokenizer read the folder; its Rust tokenizer is used where it has one."""
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as e:  # remote code and a dozen formats: any exception means "cannot be read", and it is shown as the cause
        raise TokenizerError(f"no tokenizer can be read from {folder}: {_first_line(e)}", _hint(folder, e)) from e
    rust = getattr(hf, "backend_tokenizer", None)
    backend = RustBackend(rust) if isinstance(rust, tokenizers.Tokenizer) else SlowBackend(hf)
    return Tokenizer(backend, dict(hf.special_tokens_map), hf.chat_template)


def _hint(folder: Path, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "its tokenizer is code of its own: read it, then pass trust_remote_code=True"
    binary = [*folder.glob("*.model"), *folder.glob("*.tiktoken")]  # formats that want a package of their own
    missing = [p for p in ("sentencepiece", "tiktoken", "protobuf") if binary and p in str(error).lower()]
    if missing:
        return f"pip install {' '.join(missing)}"
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    return f"the folder needs tokenizer.json (or tokenizer.model, or vocab.json with merges.txt); it has: {found}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(f"a prompt must be text, got {type(text).__name__}", "pass a str, or a list of token ids")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequestError(
            f"the text holds a lone surrogate (U+{ord(text[e.start]):04X}) at position {e.start}, which is no character",
            "read files with errors='replace', or clean it by text.encode('utf-8', 'replace').decode()",
        ) from e
    return text
